"""JSON and JSON Lines files in run folders: written in whole lines, read within bounds.

A run folder may be damaged, or come from somebody else. This module reads everything in it: it opens only ordinary
files, reads a bounded number of bytes, and counts what is broken.
"""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from balcaprl.files.ownership import write_atomically

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 << 20
"""Most bytes of a line; a longer line counts as broken."""
MAX_FILE_BYTES = 512 << 20
"""Most bytes read from a file of lines. Of a longer file, only the first and the last half of this amount are read."""
MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is read, in bytes."""

Record = dict[str, Any]


class UnreadableError(ValueError):
    """A file cannot be read; the message names the file and says why."""


# ---------------------------------------------------------------------------------------------------- writing


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Encode a record as one line of JSON in UTF-8, including the newline.

    NaN and infinities, which JSON lacks, become null.

    Raises:
        TypeError: a value is none of number, string, None, list and mapping; the message names its key.
    """
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # UTF-8 cannot encode a lone surrogate; its backslash form is the JSON escape of the same character.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def plain(value: Any, key: str = "") -> Any:
    """Convert a value to JSON's own types; ``key`` names the value in errors."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "item"):  # torch and NumPy scalars
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            raise TypeError(f"metric {key!r} has shape {tuple(value.shape)}; log a scalar of it") from None
        if isinstance(value, bool | int):
            return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"metric {key!r} is a {type(value).__name__}; only numbers, strings, lists and mappings are logged")


# ---------------------------------------------------------------------------------------------------- reading


def open_file(path: Path, root: Path | None = None) -> BinaryIO:
    """Open an ordinary file for reading; refuse devices, and pipes, which would block.

    Args:
        path: the file.
        root: folder that links may not lead out of; if None, links may lead anywhere.

    Raises:
        FileNotFoundError: the file does not exist.
        UnreadableError: the file is not an ordinary file, lies outside ``root``, or may not be read.
    """
    if root is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise UnreadableError(f"{path} is a link that leads out of {root}")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableError(f"{path} is no ordinary file")
    return open(descriptor, "rb")


def read_bytes(path: Path, max_bytes: int, root: Path | None = None) -> bytes:
    """Read the content of a file of at most ``max_bytes`` bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        UnreadableError: for the reasons of ``open_file``, or because the file is larger.
    """
    with open_file(path, root) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnreadableError(f"{path} is larger than {max_bytes:,} bytes and is not read")
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, root: Path | None = None) -> Any:
    """Read the value in a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        UnreadableError: for the reasons of ``read_bytes``, or because the content is not JSON or is nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, max_bytes, root))
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} cannot be read: {_why(error)}") from error


def _why(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


@dataclass
class Lines:
    """What was read from a file of JSON Lines."""

    records: list[Record] = field(default_factory=list)
    num_broken: int = 0
    num_bytes_left_out: int = 0
    """Number of bytes that were skipped in the middle of a file that is too large."""


def read_lines(
    path: Path,
    *,
    max_bytes: int = MAX_FILE_BYTES,
    max_records: int = 1 << 40,
    root: Path | None = None,
    keep: Callable[[Record], Record] | None = None,
) -> Lines:
    """Read the complete records of a JSON Lines file, within bounds.

    Args:
        path: the file; a missing file has no lines.
        max_bytes: most bytes to read. Of a longer file, only the first and the last half of this amount are read.
        max_records: most records to keep; further records count as broken.
        root: folder that links may not lead out of; see ``open_file``.
        keep: function that reduces a record to what is kept of it; None keeps everything.

    Raises:
        UnreadableError: for the reasons of ``open_file``.
    """
    lines = Lines()
    try:
        file = open_file(path, root)
    except FileNotFoundError:
        return lines
    with file:
        size = os.fstat(file.fileno()).st_size
        spans = [(0, size)] if size <= max_bytes else [(0, max_bytes // 2), (size - max_bytes // 2, size)]
        lines.num_bytes_left_out = size - sum(end - start for start, end in spans)
        for start, end in spans:
            file.seek(start)
            if start:
                file.readline(MAX_LINE_BYTES)  # skip the rest of a line that began earlier
            for line in bounded_lines(file, end - file.tell()):
                record = parse_line(line)
                if record is None or len(lines.records) >= max_records:
                    lines.num_broken += 1
                else:
                    lines.records.append(record if keep is None else keep(record))
    if lines.num_bytes_left_out:
        lines.num_broken = max(0, lines.num_broken - 1)  # the line cut at the end of the first half is not broken
    return lines


def read_jsonl(path: Path) -> list[Record]:
    """Read all complete records of a JSON Lines file; none if the file does not exist.

    Broken lines are counted and logged.

    Raises:
        UnreadableError: for the reasons of ``open_file``.
    """
    lines = read_lines(Path(path))
    if lines.num_broken:
        logger.warning("%s: %d lines are broken and left out", path, lines.num_broken)
    if lines.num_bytes_left_out:
        logger.warning("%s: %s bytes in its middle are left out", path, f"{lines.num_bytes_left_out:,}")
    return lines.records


def bounded_lines(file: Any, max_bytes: int) -> Iterator[bytes]:
    """Lines of an open binary file within the next ``max_bytes``; a line that is too long is replaced by ``b""``."""
    while max_bytes > 0:
        line = file.readline(min(MAX_LINE_BYTES, max_bytes))
        if not line:
            return
        max_bytes -= len(line)
        too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
        while too_long and max_bytes > 0 and line and not line.endswith(b"\n"):
            line = file.readline(min(MAX_LINE_BYTES, max_bytes))
            max_bytes -= len(line)
        yield b"" if too_long else line


def parse_line(line: bytes) -> Record | None:
    """Parse the record on a line; None unless it is complete and has a ``step``, an integer >= 0 and < 2**53."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 1 << 53 else None


def number(value: Any) -> float:
    """A value of a record as a float; NaN if it is not a number, or too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


# ---------------------------------------------------------------------------------------------------- cutting back


def truncate_jsonl(path: Path, last_step: int, *, after_step: int = -1) -> int:
    """Cut a JSON Lines file back to its complete records with ``after_step < step <= last_step``, atomically.

    A line that a kill left half-written is dropped too. A missing file stays missing. Returns the number of dropped
    lines.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    with open(path, "rb") as source:
        kept = Kept(bounded_lines(source, os.fstat(source.fileno()).st_size), after_step, last_step)
        write_atomically(path, kept)
    return kept.num_dropped


class Kept:
    """Iterates over the lines whose records lie in ``(after_step, last_step]``, and counts the others."""

    def __init__(self, lines: Iterator[bytes], after_step: int, last_step: int) -> None:
        self._lines, self._after, self._last = lines, after_step, last_step
        self.num_dropped = 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            record = parse_line(line)
            if record is not None and self._after < record["step"] <= self._last:
                yield line
            else:
                self.num_dropped += 1
