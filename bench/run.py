"""Measures ops and prints one JSON object a line, provenance included.

python bench/run.py --op grouped_advantages
python bench/run.py --op policy_loss --quick --output results.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from registry import OPS, Op
from timing import copy_bandwidth, measure, passes_of

import balcaprl
from balcaprl.kernels import native

ROOT = Path(__file__).resolve().parents[1]


def provenance(device: torch.device) -> dict[str, object]:
    """Where, with what, and on which sources the figures were taken."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "bench", "CMakeLists.txt")
        ),
        "balcaprl": balcaprl.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "native": native.is_available(),
    }


def rows(op: Op, device: torch.device, quick: bool) -> Iterator[dict[str, object]]:
    """One row per shape, pass and provider."""
    where = provenance(device)
    bandwidth = copy_bandwidth(device)
    for sizes in op.shapes[:1] if quick else op.shapes:
        floor_ms = op.floor_bytes(sizes) / bandwidth * 1e3
        for direction in passes_of(op):
            for timing in measure(op, sizes, direction, device, rounds=3 if quick else 21):
                yield {
                    "op": op.name,
                    **{f"size_{name}": size for name, size in sizes.items()},
                    **asdict(timing),
                    "floor_bytes": op.floor_bytes(sizes),
                    "copy_bytes_per_second": bandwidth,
                    # Of the time that moving the least bytes would take at the measured bandwidth.
                    "percent_of_floor": 100.0 * floor_ms / timing.median_ms,
                    **where,
                }


def main() -> None:
    """Parses arguments, prints rows as they are measured, and appends them to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="may be repeated; default: all")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--quick", action="store_true", help="smallest shape, few rounds: does it run?")
    parser.add_argument("--output", type=Path, help="JSON lines are appended here too")
    arguments = parser.parse_args()
    if arguments.op != ["policy_loss"] and not native.is_available():
        sys.exit(f"the native provider of grouped_advantages cannot run: {native.unavailable_reason()}")
    for name in arguments.op or sorted(OPS):
        for row in rows(OPS[name], arguments.device, arguments.quick):
            line = json.dumps(row)
            print(line, flush=True)
            if arguments.output:
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


def _git(*arguments: str) -> str | None:
    """Output of a git command; None outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
