"""Files of JSON and of JSON Lines in run folders: written whole lines at a time, read within bounds.

A run folder may be damaged, or come from somebody else. Whatever lies in it is read through this module: ordinary files only,
so many bytes and no more, and what is broken is counted.
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

from balcaprl.ownership import write_atomically

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 16 << 20
"""A longer line is broken."""
MAX_FILE_BYTES = 512 << 20
"""Of a longer file of lines, the first and the last half of so much are read."""
MAX_JSON_BYTES = 16 << 20
"""A longer JSON file is not read."""

Record = dict[str, Any]


class UnreadableError(ValueError):
    """A file that cannot be read; the message names it and says why."""


# ---------------------------------------------------------------------------------------------------- writing


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One JSON line, UTF-8, newline included. NaN and infinities, which JSON lacks, become null.

    Raises:
        TypeError: a value is no number, string, list or mapping; the message names its key.
    """
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate cannot be UTF-8; its backslash form is the JSON escape of the same character.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def plain(value: Any, key: str = "") -> Any:
    """The value in JSON's own types; ``key`` names it in errors."""
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
    """Open an ordinary file for reading: never a pipe, which would block, nor a device.

    Args:
        path: the file.
        root: a folder that links may not lead out of; none: links may lead anywhere.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is no ordinary file, lies outside ``root``, or may not be read.
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
    """The content of a file of at most ``max_bytes``.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: as ``open_file``; or it is larger.
    """
    with open_file(path, root) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnreadableError(f"{path} is larger than {max_bytes:,} bytes and is not read")
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, root: Path | None = None) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: as ``read_bytes``; or it is no JSON, or nested too deeply.
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
    """What a file of JSON Lines gave."""

    records: list[Record] = field(default_factory=list)
    num_broken: int = 0
    num_bytes_left_out: int = 0
    """In the middle of a file that is too large."""


def read_lines(
    path: Path,
    *,
    max_bytes: int = MAX_FILE_BYTES,
    max_records: int = 1 << 40,
    root: Path | None = None,
    keep: Callable[[Record], Record] | None = None,
) -> Lines:
    """The whole records of a JSON Lines file, within bounds.

    Args:
        path: the file; missing, it has no lines.
        max_bytes: of a longer file the first and the last half of so much are read.
        max_records: no more are kept; those beyond count as broken.
        root: see ``open_file``.
        keep: what to keep of a record.

    Raises:
        UnreadableError: see ``open_file``.
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
                file.readline(MAX_LINE_BYTES)  # the rest of a line that began before
            for line in bounded_lines(file, end - file.tell()):
                record = parse_line(line)
                if record is None or len(lines.records) >= max_records:
                    lines.num_broken += 1
                else:
                    lines.records.append(record if keep is None else keep(record))
    if lines.num_bytes_left_out:
        lines.num_broken = max(0, lines.num_broken - 1)  # where the first half ends
    return lines


def read_jsonl(path: Path) -> list[Record]:
    """All whole records of a JSON Lines file; none where it does not exist. Broken lines are counted and logged.

    Raises:
        UnreadableError: it is no ordinary file.
    """
    lines = read_lines(Path(path))
    if lines.num_broken:
        logger.warning("%s: %d lines are broken and left out", path, lines.num_broken)
    if lines.num_bytes_left_out:
        logger.warning("%s: %s bytes in its middle are left out", path, f"{lines.num_bytes_left_out:,}")
    return lines.records


def bounded_lines(file: Any, max_bytes: int) -> Iterator[bytes]:
    """The lines of an open binary file, up to ``max_bytes`` from here; one that is too long comes as ``b""``."""
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
    """The record of a line, or None where the line is not a whole record with a step: an integer from 0 to 2**53."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 1 << 53 else None


def number(value: Any) -> float:
    """A value of a record as a float; NaN where it is no number, or none that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


# ---------------------------------------------------------------------------------------------------- cutting back


def truncate_jsonl(path: Path, last_step: int, *, after_step: int = -1) -> int:
    """Cut a JSON Lines file back to the whole records with ``after_step < step <= last_step``, atomically.

    What a kill left half-written is dropped too. Returns the number of dropped lines. A missing file stays missing.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    with open(path, "rb") as source:
        kept = Kept(bounded_lines(source, os.fstat(source.fileno()).st_size), after_step, last_step)
        write_atomically(path, kept)
    return kept.num_dropped


class Kept:
    """The lines whose records lie in ``(after_step, last_step]``; counts the others as it goes."""

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
