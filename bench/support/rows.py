"""The files of results: one JSON object per line, appended as it is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "results"


def append_rows(rows: Iterable[Row], target: Path | None) -> None:
    """Prints rows, and appends them to the target file, if there is one, in one write."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    print(lines, end="", flush=True)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            file.write(lines)


def target_path(output: str | Path | None, default: Path) -> Path | None:
    """The file that ``--output`` names: the default without the option, no file for ``-``."""
    return None if str(output) == "-" else Path(output or default)


def device_file(name: str, device: str) -> Path:
    """The file of a measurement's results on one processor or GPU, by its name."""
    return RESULTS / name / f"{device.replace(' ', '_').replace('/', '_')}.jsonl"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_folder(folder: Path) -> list[Row]:
    """The rows of all ``*.jsonl`` files of a folder."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]


def earlier_rows(path: Path | None, where: Row, same: Sequence[str]) -> list[Row]:
    """The rows of a file, if there is one, that were measured under the same conditions.

    Args:
        path: the file.
        where: the conditions of this run.
        same: names of the fields in which a row must agree with ``where``.
    """
    rows = read_rows(path) if path is not None and path.is_file() else []
    return [row for row in rows if all(row.get(name) == where.get(name) for name in same)]
