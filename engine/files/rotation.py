"""The caption files of a long run: full files are compressed into parts, and the oldest parts are removed.

The newest lines are in ``completions.jsonl``. When a step fills this file, its lines move into
``completions-FIRST-LAST.jsonl.gz``, named after the steps of its first and last line, and a new file is begun. A part
therefore ends where a step ends, the same lines give the same bytes, and a run that resumes at any step can restore the
files as they were at that step, except for parts that were removed. ``eval_captions.jsonl``, with the captions of
held-out images, is kept in the same way, except that its first part always stays, because it holds the captions before
training.
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

from balcaprl.files.jsonl import Kept, UnreadableError, bounded_lines, open_file, parse_line, truncate_jsonl
from balcaprl.files.ownership import fsync_folder, write_atomically

logger = logging.getLogger(__name__)

COMPLETIONS = "completions.jsonl"
EVAL_CAPTIONS = "eval_captions.jsonl"
ROTATED = (COMPLETIONS, EVAL_CAPTIONS)
PART_BYTES = 32 << 20
"""Size at which a file of captions is compressed into a part, in bytes."""
MAX_BYTES = 1 << 30
"""Default bound on the compressed size of all parts of one file together, in bytes."""
_PART = re.compile(r"(completions|eval_captions)-(\d{8,16})-(\d{8,16})\.jsonl\.gz")
_MAX_PART_BYTES = 8 << 30
"""Number of unpacked bytes after which a part is read no further; no run writes a larger part."""


@dataclass(frozen=True, order=True)
class Part:
    """A compressed part and the steps of its first and last line."""

    first: int
    last: int
    path: Path

    def lines(self, max_bytes: int | None = None, root: Path | None = None) -> Iterator[bytes]:
        """Lines of the part, up to ``max_bytes`` of unpacked data.

        If the part is damaged, the lines before the damage are given, and a warning is logged. Links that lead out of
        ``root`` are not followed; if ``root`` is None, links may lead anywhere.
        """
        try:
            with open_file(self.path, root) as packed, gzip.GzipFile(fileobj=packed) as file:
                yield from bounded_lines(file, _MAX_PART_BYTES if max_bytes is None else max_bytes)
        except (OSError, UnreadableError, EOFError, zlib.error) as error:
            logger.warning("%s is damaged, and the rest of it is left out: %s", self.path, error)


def is_part(name: str) -> bool:
    """Whether ``name`` is the file name of a part."""
    return _PART.fullmatch(name) is not None


def list_parts(folder: Path, name: str = COMPLETIONS) -> list[Part]:
    """The compressed parts of one of the ``ROTATED`` files, oldest first."""
    found = ((path, _PART.fullmatch(path.name)) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(
        Part(int(match[2]), int(match[3]), path)
        for path, match in found
        if match and f"{match[1]}.jsonl" == name and path.is_file()
    )


def read_captions(folder: Path, name: str = COMPLETIONS) -> Iterator[dict[str, Any]]:
    """Every caption that a run still holds, oldest first, as made by ``rollout_record``; broken lines are left out."""
    packed_to = -1
    for part in list_parts(folder, name):
        for line in part.lines():
            record = parse_line(line)
            if record is not None and packed_to < record["step"] <= part.last:
                yield record
        packed_to = max(packed_to, part.last)
    try:
        file = open_file(folder / name)
    except FileNotFoundError:
        return
    with file:
        for record in map(parse_line, bounded_lines(file, os.fstat(file.fileno()).st_size)):
            # A kill between writing a part and removing the file leaves the same lines in both.
            if record is not None and record["step"] > packed_to:
                yield record


def cut_back(folder: Path, last_step: int, name: str = COMPLETIONS) -> int:
    """Restore a file and its parts to what they were when step ``last_step`` had been written.

    A call that was killed at any moment can be repeated. Returns the number of dropped lines, not counting those of
    parts that are removed as a whole.
    """
    live = folder / name
    parts = list_parts(folder, name)
    for part in parts:
        if part.first <= last_step < part.last:  # at that step, its lines up to ``last_step`` were still in the file
            kept = Kept(part.lines(), -1, last_step)
            write_atomically(live, kept)
            _remove([p for p in parts if p.first >= part.first])
            return kept.num_dropped
    packed_to = max((part.last for part in parts if part.last <= last_step), default=-1)
    dropped = truncate_jsonl(live, last_step, after_step=packed_to)
    _remove([part for part in parts if part.last > last_step])
    return dropped


def discard(folder: Path) -> None:
    """Remove the ``ROTATED`` files and all their parts."""
    for name in ROTATED:
        _remove(list_parts(folder, name))
        (folder / name).unlink(missing_ok=True)


def pack(folder: Path, max_bytes: int, name: str = COMPLETIONS) -> None:
    """Compress a file into a part, then remove the oldest parts until all together fit into ``max_bytes``.

    The part is on disk before the file is removed. The newest part always stays, and so does the first part of
    ``eval_captions.jsonl``.
    """
    live = folder / name
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
    write_atomically(folder / f"{live.stem}-{first:08d}-{last:08d}.jsonl.gz", buffer.getvalue())
    live.unlink()
    fsync_folder(folder)
    parts = list_parts(folder, name)
    surplus = sum(part.path.stat().st_size for part in parts) - max_bytes
    doomed = []
    for part in parts[1 if name == EVAL_CAPTIONS else 0 : -1]:
        if surplus > 0:
            doomed.append(part)
            surplus -= part.path.stat().st_size
    if doomed:
        logger.info(
            "%s: steps %d to %d make room (logging.completions_max_mib)", name, doomed[0].first, doomed[-1].last
        )
        _remove(doomed)


def _remove(parts: list[Part]) -> None:
    for part in parts:
        part.path.unlink(missing_ok=True)
