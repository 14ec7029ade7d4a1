"""Measures ops and prints one JSON object per line, with its provenance.

python bench/run.py                                                   # every op and case, to bench/results/<device>.jsonl
python bench/run.py --op linear_policy_loss --output -                # one op, printed only
python bench/run.py --op linear_policy_loss --case peaked --provider native --provider gemms --output -
python bench/run.py --quick --output -                                # the small cases, few rounds: does it run?

Rows are appended case by case. A second run with the same sources, machine and threads continues where the first one
stopped; ``--fresh`` measures everything again. ``bench/report.py`` makes the READMEs' tables and plots from the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from inputs import Case
from providers import Op
from registry import OPS, applicable, sizes_row
from timing import MAX_ROUNDS, MIN_SAMPLE_SECONDS, Measurement, copy_bandwidth, gemm_rate, measure

import balcaprl
from balcaprl.kernels.support import native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "trl", "liger-kernel")
SOURCES = (
    "kernels/ops/**/*.py",
    "kernels/csrc/**/*",
    "bench/inputs.py",
    "bench/providers.py",
    "bench/registry.py",
    "bench/timing.py",
    "bench/peers.py",
)
SAME = ("sources", "device", "threads", "simd", *PACKAGES)
"""Fields that must agree with the current run for a row of an earlier run to count as measured."""


def provenance(device: torch.device) -> dict[str, object]:
    """The machine, packages, settings and sources with which figures are measured."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "bench/*.py")),
        "sources": sources_digest(),
        "balcaprl": balcaprl.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": _simd_level() if device.type == "cpu" else None,
    }


def sources_digest(patterns: Iterable[str] = SOURCES) -> str:
    """A short hash of the sources behind the figures.

    Unlike the commit, it changes neither when results are added nor when files are only moved or renamed.
    """
    files = {p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file() and p.suffix not in (".so", ".pyc")}
    contents = sorted(hashlib.sha256(path.read_bytes()).digest() for path in files)
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12]


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


def measured_already(path: Path, where: dict[str, object]) -> set[tuple[str, str]]:
    """The (op, case) of earlier rows that were measured under the same conditions as this run."""
    if not path.is_file():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {(row["op"], row["case"]) for row in rows if all(row.get(name) == where[name] for name in SAME)}


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
    where = provenance(device)
    output = None if arguments.output == "-" else Path(arguments.output or RESULTS / f"{device.type}.jsonl")
    again = arguments.fresh or arguments.repeat > 1
    done = set() if output is None or again else measured_already(output, where)
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
            stamp = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load": os.getloadavg()[0]}
            rows = case_rows(op, case, measure(op, case, device, budget), device, bandwidth)
            write([{**row, **stamp, "copy_bytes_per_second": bandwidth, **where} for row in rows], output)


def write(rows: list[dict[str, object]], output: Path | None) -> None:
    """Prints rows and appends them to a file in one write."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    print(lines, end="", flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(lines)


def _simd_level() -> str | None:
    """The instruction set of the native library: the best of this machine, or the one that ``BALCAPRL_SIMD`` names."""
    return native.set_simd_level(os.environ.get("BALCAPRL_SIMD")) if native.is_available() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of a git command; None outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
