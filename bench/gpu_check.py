"""Measures in a few minutes on a GPU what limits the speed of an update there; prints one JSON object per line.

    python bench/gpu_check.py --output rows.jsonl                         # all sections, about six minutes on an H200
    python bench/gpu_check.py --section update --case "3b B1" --output -  # one section, one case
    python bench/gpu_check.py --device cpu --size 3m --output -           # does it run?

==========  ==========================================================================================================
ceilings    rate of a large bf16 product, rate of a copy, time of a small operation, and of a small forward and backward
update      per provider and case: seconds from rollouts to gradients, seconds in which the GPU worked, seconds until
            the host had issued everything, launches, waits of the host, peak memory
waits       places in the code at which the host waits for the GPU between rollouts and gradients
compiled    the update with compiled decoder layers: seconds to compile, number of graphs and graph breaks
optimizer   one step of the optimiser, beside the time that moving its bytes takes
==========  ==========================================================================================================

Each row is printed with the bounds that the project holds itself to (``GOALS``), and appended to the output without
them. What the output already has for the same sources, section, case and provider is not measured again; the ceilings
are measured in every run.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.provenance import provenance, sources_digest
from torch.profiler import ProfilerActivity, profile
from update.providers import PROVIDERS, Shape, build_policy, make_rollouts
from update_step import SOURCES

from balcaprl.config import OptimConfig
from balcaprl.policy import Policy
from balcaprl.training.optim import PolicyOptimizer

Row = dict[str, Any]
GOALS = {
    "update 33m": "at least 4.5 times the repeated batch's speed",
    "update 3b B1": "at most 75 ms, and at least 3.3 times the speed of the repeated batch and of TRL",
    "update 3b B8": "at least 55% of the large product's rate",
    "update": "the GPU works for at least 85% of the time",
    "waits": "none between the end of packing and the read of the metrics",
    "compiled": "no graph break, one graph a region",
    "optimizer": "at most 1.2 times the time of its bytes (28 a parameter)",
}
BYTES_PER_UPDATED_PARAMETER = 28
"""bf16 gradient read, float32 master and two moments read and written, bf16 weight written."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def seconds(call: Callable[[], Any], device: torch.device, rounds: int = 1) -> float:
    """Mean seconds per call, until the device has finished."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / rounds


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished; does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceilings(device: torch.device) -> Row:
    """Measures the rates of the device at its best, and the time of small operations."""
    side = 8192 if device.type == "cuda" else 512
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds(lambda: square @ square, device, 3)
    product = seconds(lambda: square @ square, device, 10)
    source = torch.empty(side * side * 32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds(lambda: target.copy_(source), device)
    copied = seconds(lambda: target.copy_(source), device, 10)
    small = torch.zeros(16, device=device)
    leaf = small.clone().requires_grad_()
    for _ in range(100):
        (leaf * 2).sum().backward()
    return {
        "tflops": 2 * side**3 / product / 1e12,
        "copy_tb_s": 2 * source.numel() / copied / 1e12,
        "us_small_operation": 1e6 * seconds(lambda: small.add_(1), device, 2000),
        "us_multiply_sum_backward": 1e6 * seconds(lambda: (leaf * 2).sum().backward(), device, 500),
    }


def step_of(policy: Policy, shape: Shape, provider: str) -> Callable[[], None]:
    """Returns a function that runs one update's forward and backward, from rollouts to gradients."""
    forward = PROVIDERS[provider](policy, make_rollouts(shape, policy))

    def step() -> None:
        policy.model.zero_grad(set_to_none=True)
        forward().backward()

    return step


def profiled(step: Callable[[], None], device: torch.device, table: Path | None) -> Row:
    """Launches, waits and the GPU's working time of one call; ``table`` gets the times of each operation."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as run:
        step()
        synchronize(device)
    events = run.events()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    if table is not None:
        averages = run.key_averages()
        by_host = averages.table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=70)
        by_gpu = (
            averages.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70) if kernels else ""
        )
        table.write_text(by_host + "\n" + by_gpu, encoding="utf-8")
    return {
        "launches": len(kernels),
        "gpu_busy_s": sum(event.device_time for event in kernels) / 1e6,
        "waits": sum(event.name in WAITS for event in events),
        "copies": sum(event.name.startswith("cudaMemcpy") for event in events),
    }


def update(policy: Policy, shape: Shape, provider: str, rounds: int, table: Path | None) -> Row:
    """Measures one provider's update on one case."""
    device = policy.device
    step = step_of(policy, shape, provider)
    step()
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    walls, issued = [], []
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        step()
        issued.append(time.perf_counter() - begin)
        synchronize(device)
        walls.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    row = {"median_s": statistics.median(walls), "low_s": min(walls), "issued_s": statistics.median(issued)}
    return {**row, "peak_bytes": peak, **profiled(step, device, table)}


def waits(policy: Policy, shape: Shape) -> Row:
    """Counts our update's waits for the GPU by place in the code, in one call after two others."""
    step = step_of(policy, shape, "ours")
    step()
    step()
    places: collections.Counter[str] = collections.Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "synchronizing" in str(each.message):
            places["/".join(Path(each.filename).parts[-3:]) + f":{each.lineno}"] += 1
    return {"num_waits": sum(places.values()), "places": dict(places.most_common())}


def compiled(policy: Policy, shape: Shape, rounds: int) -> Row:
    """Measures our update with compiled layers; the policy stays compiled."""
    from torch._dynamo.utils import counters

    policy.compile_layers()
    begin = time.perf_counter()
    step = step_of(policy, shape, "ours")
    step()
    took = time.perf_counter() - begin
    step()
    samples = [seconds(step, policy.device) for _ in range(rounds)]
    row = {"compile_s": took, "median_s": statistics.median(samples), "low_s": min(samples)}
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return {**row, "graphs": graphs, "graph_breaks": breaks, **profiled(step, policy.device, None)}


def optimizer(policy: Policy, rounds: int, copy_rate: float) -> Row:
    """Measures one step of the optimiser on gradients of the weights' dtype."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    made = PolicyOptimizer(policy.model.named_parameters(), OptimConfig(), 100)
    device = policy.device
    samples = []
    for index in range(rounds + 2):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        samples.append(seconds(made.step, device))
        if index < 2:
            samples.clear()
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-4)
    count = sum(p.numel() for p in parameters)
    return {
        "median_s": statistics.median(samples),
        "floor_s": BYTES_PER_UPDATED_PARAMETER * count / copy_rate,
        "parameters": count,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        **profiled(made.step, device, None),
    }


def attempt(measure: Callable[[], Row], device: torch.device) -> Row:
    """A section's row, or its error: if one section fails, the others still run."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def rows(options: argparse.Namespace, done: set[tuple[str, str, str]]) -> Iterator[Row]:
    """The rows of the ceilings and of all other selected sections that are not done yet."""
    device, size = options.device, options.size
    wanted = set(options.section or ("ceilings", "update", "waits", "compiled", "optimizer"))
    top = ceilings(device)
    if "ceilings" in wanted:
        yield {"section": "ceilings", **top}
    cases = {
        Shape("33m", 8, 256, 64, ragged=False): ("ours", "repeated", "repeated-one-tower", "trl"),
        Shape(size, 8, 256, 128): ("ours", "repeated-one-tower", "repeated", "trl"),
        Shape(size, 8, 256, 128, groups=8): ("ours",),
    }
    policies: dict[str, Policy] = {}

    def policy_of(shape: Shape) -> Policy:
        if shape.size not in policies:
            policies.clear()  # two at once might not fit
            policies[shape.size] = build_policy(shape.size, device, torch.bfloat16)
        return policies[shape.size]

    def run(section: str, shape: Shape, provider: str, measure: Callable[[Policy], Row]) -> Iterator[Row]:
        selected = section in wanted and all(part in shape.name for part in options.case or ())
        selected = selected and provider in (options.provider or [provider])
        if selected and (section, shape.name, provider) not in done:
            policy = policy_of(shape)
            head = {"section": section, "case": shape.name, "provider": provider}
            yield {**head, **attempt(lambda: measure(policy), device)}
            policy.model.zero_grad(set_to_none=True)

    for shape, providers in cases.items():
        for name in providers:
            table = options.tables / f"{shape.size}_B{shape.groups}_{name}.txt" if options.tables else None
            yield from run(
                "update", shape, name, lambda p, s=shape, n=name, t=table: update(p, s, n, options.rounds, t)
            )
        if device.type == "cuda":
            yield from run("waits", shape, "ours", lambda p, s=shape: waits(p, s))
    one_group = Shape(size, 8, 256, 128)
    copy_rate = 1e12 * top["copy_tb_s"]
    yield from run("optimizer", one_group, "ours", lambda p: optimizer(p, options.rounds, copy_rate))
    yield from run("compiled", one_group, "ours", lambda p: compiled(p, one_group, options.rounds))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", help="may be repeated; default: all")
    parser.add_argument("--case", action="append", help="part of a case's name; may be repeated, all must match")
    parser.add_argument("--provider", action="append", help="may be repeated; default: all")
    parser.add_argument("--size", default="3b", help="the larger model's size, of update/providers.py")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tables", type=Path, help="folder for tables of the time of each operation")
    parser.add_argument("--output", type=Path, required=True, help="where rows are appended; - prints them only")
    return parser.parse_args()


def main() -> None:
    """Measures what is selected and not done yet."""
    options = parse_arguments()
    where = {**provenance(options.device), "sources": sources_digest(SOURCES), "dtype": "bfloat16"}
    target = None if str(options.output) == "-" else options.output
    lines = target.read_text(encoding="utf-8").splitlines() if target is not None and target.is_file() else []
    earlier = [row for row in map(json.loads, lines) if row["sources"] == where["sources"] and "error" not in row]
    done = {(row["section"], row.get("case", ""), row.get("provider", "")) for row in earlier}
    for row in rows(options, done):
        goals = [text for key, text in GOALS.items() if f"{row['section']} {row.get('case', '')}".startswith(key)]
        print(json.dumps({**row, "goals": goals}), flush=True)
        if target is not None:
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"bench": "gpu_check", **row, **where}) + "\n")


if __name__ == "__main__":
    main()
