"""``completions.jsonl`` of a long run: full parts are compressed, and the oldest make room.

The newest lines are in ``completions.jsonl``. When a step fills it, its lines move into ``completions-FIRST-LAST.jsonl.gz``,
named after the steps of its first and last line, and a new file is begun. So a part ends where a step ends, the same
lines give the same bytes, and a run that goes on at any step can bring the files back to what they were there.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balcaprl.jsonl import Kept, bounded_lines, open_file, parse_line, truncate_jsonl
from balcaprl.ownership import fsync_folder, write_atomically

logger = logging.getLogger(__name__)

COMPLETIONS = "completions.jsonl"
PART_BYTES = 32 << 20
"""Size at which ``completions.jsonl`` is compressed into a part."""
MAX_BYTES = 1 << 30
"""Bound of all parts of a run together, compressed."""
_PART = re.compile(r"completions-(\d{8,16})-(\d{8,16})\.jsonl\.gz")
_MAX_PART_BYTES = 8 << 30
"""A part that unpacks to more is read no further: no run writes such a one."""


@dataclass(frozen=True, order=True)
class Part:
    """A compressed part and the steps of its first and last line."""

    first: int
    last: int
    path: Path

    def lines(self) -> Iterator[bytes]:
        """Its lines; where it is damaged, those before the damage, and a warning."""
        try:
            with open_file(self.path) as packed, gzip.GzipFile(fileobj=packed) as file:
                yield from bounded_lines(file, _MAX_PART_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            logger.warning("%s is damaged, and the rest of it is left out: %s", self.path, error)


def is_part(name: str) -> bool:
    """Whether a part has such a name."""
    return _PART.fullmatch(name) is not None


def list_parts(folder: Path) -> list[Part]:
    """The compressed parts of a run, oldest first."""
    found = ((path, _PART.fullmatch(path.name)) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(Part(int(match[1]), int(match[2]), path) for path, match in found if match and path.is_file())


def read_completions(folder: Path) -> Iterator[dict[str, Any]]:
    """Every completion that a run still holds, oldest first, a record of ``rollout_record`` each; broken lines are left out."""
    packed_to = -1
    for part in list_parts(folder):
        for line in part.lines():
            record = parse_line(line)
            if record is not None and packed_to < record["step"] <= part.last:
                yield record
        packed_to = max(packed_to, part.last)
    try:
        file = open_file(folder / COMPLETIONS)
    except FileNotFoundError:
        return
    with file:
        for record in map(parse_line, bounded_lines(file, os.fstat(file.fileno()).st_size)):
            # A kill between packing and emptying leaves the same lines in both.
            if record is not None and record["step"] > packed_to:
                yield record


def cut_back(folder: Path, last_step: int) -> int:
    """Bring all files back to the lines of steps up to ``last_step``, as they were when that step had been written.

    Killed at any moment, it can be done again. Returns the number of dropped lines, those of whole parts not counted.
    """
    live = folder / COMPLETIONS
    parts = list_parts(folder)
    for part in parts:
        if part.first <= last_step < part.last:  # its lines up to there had not been packed yet
            kept = Kept(part.lines(), -1, last_step)
            write_atomically(live, kept)
            _remove([p for p in parts if p.first >= part.first])
            return kept.num_dropped
    packed_to = max((part.last for part in parts if part.last <= last_step), default=-1)
    dropped = truncate_jsonl(live, last_step, after_step=packed_to)
    _remove([part for part in parts if part.last > last_step])
    return dropped


def discard(folder: Path) -> None:
    """Remove all parts, and ``completions.jsonl``."""
    _remove(list_parts(folder))
    (folder / COMPLETIONS).unlink(missing_ok=True)


def pack(folder: Path, max_bytes: int) -> None:
    """Compress ``completions.jsonl`` into a part, then drop the oldest parts that exceed ``max_bytes`` together.

    The part is on disk before its lines are taken out of ``completions.jsonl``. The newest part always stays.
    """
    live = folder / COMPLETIONS
    buffer = io.BytesIO()
    first = last = None
    with open_file(live) as source, gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as target:
        for line in bounded_lines(source, os.fstat(source.fileno()).st_size):
            record = parse_line(line)
            if record is not None:
                first = record["step"] if first is None else first
                last = record["step"]
                target.write(line)
    if first is None or last is None:
        return
    write_atomically(folder / f"completions-{first:08d}-{last:08d}.jsonl.gz", buffer.getvalue())
    live.unlink()
    fsync_folder(folder)
    parts = list_parts(folder)
    sizes = [part.path.stat().st_size for part in parts]
    surplus = sum(sizes) - max_bytes
    doomed = []
    for part, size in list(zip(parts, sizes, strict=True))[:-1]:
        if surplus > 0:
            doomed.append(part)
            surplus -= size
    if doomed:
        logger.info(
            "completions of steps %d to %d make room (logging.completions_max_mib)", doomed[0].first, doomed[-1].last
        )
        _remove(doomed)


def _remove(parts: list[Part]) -> None:
    for part in parts:
        part.path.unlink(missing_ok=True)
