"""Measures ops and prints one JSON object per line, with its provenance.

python bench/run.py                                                   # every op and case, to bench/results/<device>.jsonl
python bench/run.py --op linear_policy_loss --output -                # one op, printed only
python bench/run.py --op linear_policy_loss --case peaked --provider native --provider gemms --output -
python bench/run.py --quick --output -                                # the small cases, few rounds: does it run?

Rows are appended case by case. A second run with the same sources, packages, machine and threads continues where the
first one stopped; ``--fresh`` measures everything again. ``bench/report.py`` makes the READMEs' tables and plots from
the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from ops.inputs import Case
from ops.providers import Op
from ops.registry import OPS, applicable, sizes_row
from ops.timing import MAX_ROUNDS, MIN_SAMPLE_SECONDS, Measurement, copy_bandwidth, gemm_rate, measure
from support.provenance import SAME, moment, provenance
from support.rows import RESULTS, append_rows, earlier_rows, target_path

SOURCES = (
    "kernels/ops/**/*.py",
    "kernels/csrc/**/*",
    "bench/ops/inputs.py",
    "bench/ops/providers.py",
    "bench/ops/registry.py",
    "bench/ops/timing.py",
    "bench/ops/peers.py",
)


def case_rows(op: Op, case: Case, measured: Measurement, device: torch.device, bandwidth: float) -> Iterator[dict]:
    """The rows of one case: one per provider and pass, and one per provider that was left out."""
    common = {"op": op.name, "device_type": device.type, **sizes_row(case), "bfloat16_error": measured.bfloat16_error}
    ceilings = {t.direction: t.median_ms for t in measured.timings if op.providers[t.provider].ceiling}
    floors = dict(zip(("forward", "both"), op.floor_bytes(case), strict=True))
    floors["backward"] = floors["both"] - floors["forward"]
    for timing in measured.timings:
        ceiling_ms = ceilings.get(timing.direction) or 1e3 * floors[timing.direction] / bandwidth or None
        yield {
            **common,
            **asdict(timing),
            "ceiling": "gemms" if ceilings else "copy",
            "ceiling_ms": ceiling_ms,
            # The time of the irreducible work, as a percentage of this provider's time.
            "percent_of_ceiling": None if not ceiling_ms else 100.0 * ceiling_ms / timing.median_ms,
        }
    for name, reason in measured.skipped.items():
        yield {**common, "provider": name, "skipped": reason}


def expected_seconds(op: Op, case: Case, device: torch.device, budget: float, bandwidth: float) -> float:
    """An estimate of the seconds that a case takes, from its floor, the number of providers, and the budget of the
    timed rounds."""
    flops = op.floor_flops(case)[1]
    floor = flops / gemm_rate(case.dtype, device) if flops else op.floor_bytes(case)[0] / bandwidth
    if case.memory_only:
        return 3.0 * floor
    num_providers = sum(p.unavailable(device) is None for p in applicable(op, case).values())
    rounds = MAX_ROUNDS * num_providers * max(2 * MIN_SAMPLE_SECONDS, 2.0 * floor)
    return 10.0 * floor * num_providers + min(budget, rounds)


def measured_already(path: Path | None, where: dict[str, object]) -> set[tuple[str, str]]:
    """The (op, case) of earlier rows that were measured under the same conditions as this run."""
    return {(row["op"], row["case"]) for row in earlier_rows(path, where, SAME)}


def selected(arguments: argparse.Namespace) -> list[tuple[Op, Case]]:
    """The ops and cases that the command line selects, in the order of the registry."""
    found = []
    for name in arguments.op or OPS:
        op = OPS[name]
        if arguments.provider:
            op = replace(op, providers={n: p for n, p in op.providers.items() if n in arguments.provider})
        names = {case.name for case in op.cases}
        for case in op.cases:
            if arguments.device.type not in case.devices or (arguments.quick and not case.small):
                continue
            # A complete name selects only that case, even if other names contain it.
            if all(part == case.name if part in names else part in case.name for part in arguments.case or ()):
                found.append((op, case))
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=list(OPS), action="append", help="may be repeated; default: all")
    parser.add_argument("--case", action="append", help="part of a case's name; may be repeated, all must match")
    parser.add_argument("--provider", action="append", help="may be repeated; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--threads", type=int, help="of torch and of the native library")
    parser.add_argument("--seconds", type=float, default=20.0, help="budget of the timed rounds of a case")
    parser.add_argument("--max_seconds", type=float, default=400.0, help="cases expected to take longer are left out")
    parser.add_argument("--quick", action="store_true", help="small cases, shortest rounds")
    parser.add_argument(
        "--list", action="store_true", help="what would be measured and about how long it takes; stop there"
    )
    parser.add_argument("--repeat", type=int, default=1, help="so many runs, one after the other; implies --fresh")
    parser.add_argument("--fresh", action="store_true", help="measure again what the output file has")
    parser.add_argument("--output", help="JSON lines are appended here; '-': printed only; default: by device")
    return parser.parse_args()


def main() -> None:
    """Measures the selected cases, prints every row, and appends the rows of each case when the case is complete."""
    arguments = parse_arguments()
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = provenance(device, SOURCES)
    output = target_path(arguments.output, RESULTS / f"{device.type}.jsonl")
    done = set() if arguments.fresh or arguments.repeat > 1 else measured_already(output, where)
    bandwidth = copy_bandwidth(device)
    budget = 0.2 if arguments.quick else arguments.seconds
    for op, case in selected(arguments) * arguments.repeat:
        label = f"{op.name} {case.name}"
        guess = expected_seconds(op, case, device, budget, bandwidth)
        if (op.name, case.name) in done:
            print(f"# {label}: measured already", file=sys.stderr)
        elif guess > arguments.max_seconds:
            print(f"# {label}: about {guess:.0f} s, over --max_seconds; left out", file=sys.stderr)
        elif arguments.list:
            print(f"{guess:6.0f} s  {label}")
        else:
            print(f"# {label}: about {guess:.0f} s", file=sys.stderr, flush=True)
            stamp = moment()
            rows = case_rows(op, case, measure(op, case, device, budget), device, bandwidth)
            append_rows([{**row, **stamp, "copy_bytes_per_second": bandwidth, **where} for row in rows], output)


if __name__ == "__main__":
    main()
