"""Measures time and memory of one update, from the same rollouts to the same gradients, by our code and in other ways.

python bench/update_step.py                                     # the sweep, to bench/results/update_step/<device>.jsonl
python bench/update_step.py --case "33m" --provider ours --provider repeated --output -
python bench/update_step.py --list                              # what would be measured, and about how long it takes
python bench/update_step.py --quick --output -                  # one tiny case: does it run?

The other ways are the repeated batch, TRL and prefix grouping (see ``update/providers.py``). First, every provider's
gradients are compared with those of the stock model on the repeated batch. If ours are wrong, the run stops; a peer
that fails is left out, and its row gives the reason. In every round each provider runs once, in rotating order. Medians
and quartiles are over rounds. ``peak_bytes`` is what one call takes beyond weights and gradients.

``predicted_ratio`` is the repeated batch's number of floating-point operations divided by the provider's. The number
includes the matrix products of the model's own layers (counted from the shapes that go through them), attention over
the pairs of tokens that see each other, and the head at the positions that predict, or for TRL and prefix grouping
wherever they compute it.

Rows are appended case by case. A second run with the same sources, packages, machine, threads and dtype continues where
the first one stopped.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ops import timing
from support.provenance import SAME, cpu_name, moment, provenance
from support.rows import append_rows, device_file, earlier_rows, target_path
from torch import Tensor, nn
from update.providers import PROVIDERS, SIZES, Forward, Rollouts, Shape, build_policy, make_rollouts

from balcaprl.policy import Policy

ACCEPTANCE = Shape("33m", 8, 256, 64, ragged=False)
_BASE = Shape("8m", 8, 256, 64)
CASES = [
    ACCEPTANCE,
    *(Shape(size, 8, 256, 64) for size in ("3m", "33m", "120m")),
    *(Shape("8m", group_size, 256, 64) for group_size in (2, 4, 8, 16, 32)),
    *(Shape("8m", 8, image_tokens, 64) for image_tokens in (16, 64, 576, 1024)),
    *(Shape("8m", 8, 256, completion) for completion in (32, 128, 256, 512)),
    Shape("8m", 8, 256, 64, groups=4),
    # In these cases sharing the prompt saves little.
    Shape("8m", 2, 16, 64),
    Shape("8m", 2, 16, 512),
    Shape("8m", 4, 16, 128, groups=4),
]
GPU_CASES = [ACCEPTANCE, Shape("3b", 8, 256, 128), Shape("3b", 8, 256, 512), Shape("3b", 8, 576, 64)]
"""Cases that fit 80 GB without gradient checkpointing, including the repeated batch's activations."""
QUICK = Shape("3m", 3, 16, 8)
SOURCES = (
    "kernels/ops/**/*.py",
    "kernels/csrc/**/*",
    "engine/policy/**/*.py",
    "bench/update_step.py",
    "bench/update/providers.py",
    "bench/ops/timing.py",
    "bench/ops/peers.py",
)
MIN_ROUNDS, MAX_ROUNDS = 3, 15
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest allowed 2-norm of the difference over the 2-norm of the stock model's gradient. In bfloat16 both gradients
are rounded: they were 5.4e-2 apart on an H200 with 3 billion random weights."""


# Floating-point operations.


class _LayerCounter:
    """Counts the operations of ``nn.Linear`` and convolutions during a model's forward, except the head's."""

    def __init__(self, model: nn.Module) -> None:
        self.flops = 0
        self._model = model

    def __enter__(self) -> _LayerCounter:
        kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        layers = [m for m in self._model.modules() if isinstance(m, kinds) and m is not head]
        self._hooks = [layer.register_forward_hook(self._count) for layer in layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, layer: nn.Module, _: Any, output: Tensor) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.flops += 2 * output.numel() * weight[0].numel()


def forward_flops(name: str, policy: Policy, shape: Shape, layer_flops: int) -> int:
    """Floating-point operations of one forward: layers as counted while it ran, attention and head by formula."""
    hidden = policy.lm_head_weight.shape[1]
    lengths = [n for group in shape.lengths() for n in group]
    return layer_flops + _attention_flops(name, shape, lengths) + _head_flops(name, policy, shape, lengths, hidden)


def _attention_flops(name: str, shape: Shape, lengths: list[int]) -> int:
    size, prompt = SIZES[shape.size], shape.prompt
    if name in ("ours", "prefix-grouper"):
        own = shape.groups * prompt * (prompt + 1) // 2
        pairs = own + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
    else:
        pairs = sum((prompt + n) * (prompt + n + 1) // 2 for n in lengths)
    text = 4 * pairs * size["hidden"] * size["layers"]
    patches, window = 4 * shape.image_tokens, 64
    full = 2
    tower_pairs = full * patches**2 + (size["blocks"] - full) * patches * min(window, patches)
    num_images = shape.groups if name in ("ours", "repeated-one-tower", "prefix-grouper") else len(lengths)
    return text + num_images * 4 * tower_pairs * size["tower"]


def _head_flops(name: str, policy: Policy, shape: Shape, lengths: list[int], hidden: int) -> int:
    vocabulary = policy.lm_head_weight.shape[0]
    if name == "trl" and policy.device.type != "cuda":
        positions = len(lengths) * (shape.prompt + max(lengths) - 1)
    elif name == "prefix-grouper":
        positions = shape.groups * (shape.prompt + max(sum(group) for group in shape.lengths()))
    else:
        positions = sum(lengths)
    return 2 * positions * vocabulary * hidden


# Measuring.


def gradients_of(policy: Policy, forward: Forward) -> tuple[Tensor, ...]:
    """Runs one update's forward and backward and returns the gradients of all parameters. The parameters' own ``grad``
    is None afterwards."""
    policy.model.zero_grad(set_to_none=True)
    forward().backward()
    parameters = list(policy.model.parameters())
    gradients = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    policy.model.zero_grad(set_to_none=True)
    return gradients


def difference(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The 2-norm of the difference of all gradients together, over the 2-norm of the exact gradients."""
    apart = sum(float((a.double() - e.double()).square().sum()) for a, e in zip(actual, exact, strict=True))
    return (apart / max(sum(float(e.double().square().sum()) for e in exact), 1e-60)) ** 0.5


def prepare(shape: Shape, policy: Policy, rollouts: Rollouts, names: list[str]) -> Iterator[dict[str, Any]]:
    """Yields a row for each provider: with its forward, operations and gradient error if it can run and is right,
    otherwise with the reason.

    Raises:
        AssertionError: the gradient of ``ours`` or ``repeated-one-tower`` is wrong.
    """
    exact: tuple[Tensor, ...] | None = None
    for name in ["repeated", *(each for each in names if each != "repeated")]:
        try:
            forward = PROVIDERS[name](policy, rollouts)
            with _LayerCounter(policy.stock_model) as counter:
                gradients = gradients_of(policy, forward)
        except Exception as error:
            if name in ("ours", "repeated", "repeated-one-tower"):
                raise
            yield {"provider": name, "skipped": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        exact = gradients if exact is None else exact
        error_norm, limit = difference(gradients, exact), GRADIENT_TOLERANCE[policy.dtype]
        if error_norm > limit:
            reason = f"its gradient differs from the stock model's by {error_norm:.1e}, more than {limit:.0e}"
            if name in ("ours", "repeated-one-tower"):
                raise AssertionError(f"{name}, {shape.name}: {reason}")
            yield {"provider": name, "skipped": reason}
            continue
        flops = forward_flops(name, policy, shape, counter.flops)
        yield {"provider": name, "forward": forward, "flops": 3 * flops, "gradient_difference": error_norm}


def measure(shape: Shape, names: list[str], device: torch.device, dtype: torch.dtype, seconds: float) -> list[dict]:
    """Measures the providers on one shape; returns one row for each."""
    policy = build_policy(shape.size, device, dtype)
    rollouts = make_rollouts(shape, policy)
    prepared = list(prepare(shape, policy, rollouts, names))
    rows = {row["provider"]: row for row in prepared if "skipped" not in row}
    repeated_flops = rows["repeated"]["flops"]
    calls = {name: functools.partial(gradients_of, policy, row.pop("forward")) for name, row in rows.items()}
    for name in [each for each in rows if each not in names]:
        del calls[name], rows[name]
    for name, row in rows.items():
        row["peak_bytes"] = timing._peak_bytes(calls[name], device)
    samples = interleaved(calls, device, seconds)
    common = {
        **shape_row(shape),
        "device_type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "num_parameters": policy.num_parameters,
        "weight_bytes": sum(p.numel() * p.element_size() for p in policy.model.parameters()),
        "auto_shares": policy.pack(rollouts.groups).prefix_layout is not None,
    }
    done = []
    for row in (each for each in prepared if each["provider"] in (*rows, *names)):
        if "skipped" not in row:
            values = samples[row["provider"]]
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            row |= {"median_s": median, "low_s": low, "high_s": high, "rounds": len(values)}
            row["predicted_ratio"] = repeated_flops / row["flops"]
        done.append({"bench": "update_step", **common, **row})
    return done


def interleaved(calls: dict[str, Any], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Runs rounds of all calls in rotating order; returns the seconds of each call, one value per round."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for index in range(MAX_ROUNDS if names else 0):
        if index >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(timing._sample(calls[name], 1, device))
    return samples


def shape_row(shape: Shape) -> dict[str, Any]:
    """The fields of a row that describe a shape."""
    return {
        "case": shape.name,
        "size": shape.size,
        "groups": shape.groups,
        "group_size": shape.group_size,
        "image_tokens": shape.image_tokens,
        "prompt_tokens": shape.prompt,
        "completion": shape.completion,
        "ragged": shape.ragged,
        "acceptance": shape == ACCEPTANCE,
    }


# What is left to do.


def expected_seconds(shape: Shape, names: list[str], rate: float, seconds: float) -> float:
    """An estimate of a case's seconds: 6 operations per parameter and token, times the calls of each provider."""
    millions = float(shape.size[:-1]) * {"m": 1, "b": 1000}[shape.size[-1]]
    tokens = {True: shape.groups * shape.prompt, False: shape.groups * shape.group_size * shape.prompt}
    completions = shape.groups * shape.group_size * shape.completion
    shared = ("ours", "prefix-grouper")
    once = sum(6e6 * millions * (tokens[name in shared] + completions) for name in {*names, "repeated"}) / rate
    return 2 * once + min(max(MIN_ROUNDS * once, seconds), MAX_ROUNDS * once)


def measured_already(path: Path | None, where: dict[str, Any]) -> set[tuple[str, str]]:
    """The (case, provider) of earlier rows that were measured under the same conditions as this run."""
    return {(row["case"], row["provider"]) for row in earlier_rows(path, where, (*SAME, "dtype"))}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="part of a case's name; may be repeated, all must match")
    parser.add_argument("--provider", action="append", choices=list(PROVIDERS), help="may be repeated; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="of torch and of the native library")
    parser.add_argument("--seconds", type=float, default=10.0, help="budget of the timed rounds of a case")
    parser.add_argument("--max_seconds", type=float, default=200.0, help="cases expected to take longer are left out")
    parser.add_argument("--quick", action="store_true", help="one tiny case, fewest rounds")
    parser.add_argument("--list", action="store_true", help="what would be measured and about how long; stop there")
    parser.add_argument("--fresh", action="store_true", help="measure again what the output file has")
    parser.add_argument("--output", type=Path, help="where rows are appended; - prints them only")
    return parser.parse_args()


def main() -> None:
    """Measures the selected cases that the output file does not have yet."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device_name = torch.cuda.get_device_name() if options.device.type == "cuda" else cpu_name()
    target = target_path(options.output, device_file("update_step", device_name))
    where = {**provenance(options.device, SOURCES), "dtype": options.dtype}
    done = set() if options.fresh else measured_already(target, where)
    rate = timing.gemm_rate(getattr(torch, options.dtype), options.device)
    names, total = options.provider or list(PROVIDERS), 0.0
    cases = GPU_CASES if options.device.type == "cuda" else CASES
    for shape in [QUICK] if options.quick else cases:
        # A case is measured with all its providers or skipped, because ratios must come from one interleaved run.
        if all((shape.name, name) in done for name in names):
            continue
        if not all(part in shape.name for part in options.case or ()):
            continue
        seconds = 0.0 if options.quick else options.seconds
        expected = expected_seconds(shape, names, rate, seconds)
        if options.list or expected > options.max_seconds:
            kept = expected <= options.max_seconds
            total += expected * kept
            print(
                f"{shape.name}: about {expected:.0f} s" + ("" if kept else ", left out: see --max_seconds"), flush=True
            )
            continue
        for row in measure(shape, names, options.device, getattr(torch, options.dtype), seconds):
            append_rows([{**row, **where, **moment()}], target)
    if options.list:
        print(f"in all about {total / 60:.0f} min")


if __name__ == "__main__":
    main()
