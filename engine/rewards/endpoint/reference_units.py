"""Reference units on disk, beside the data set, so that each reference caption is taken apart only once.

The file has one JSON line per reference: its SHA-256, the prompt that took it apart, the judge model, and the units.
Lines are appended, each in one write. A last line that a kill left half-written is cut away when the file is opened for
appending. A file that does not begin with such a line belongs to somebody else, and is not opened for appending.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from balcaprl.config import EndpointConfig, ProtocolConfig
from balcaprl.files.ownership import refuse_foreign_file
from balcaprl.logtext import printable
from balcaprl.rewards.endpoint.protocol import TASKS

logger = logging.getLogger(__name__)

_MOST_UNITS = 512
SUFFIX = ".units.jsonl"
_MAX_LINE_BYTES = 16 << 20


def units_path(data_path: Path) -> Path:
    """Path of the units of a data set: ``captions.json`` -> ``captions.json.units.jsonl``."""
    return data_path.with_name(data_path.name + SUFFIX)


def judge_model(protocol: ProtocolConfig, endpoint: EndpointConfig) -> str:
    """The names by which the servers are asked for the judge model, joined by commas."""
    return ", ".join(sorted({server.model or protocol.model for server in endpoint.servers} or {protocol.model}))


def reference_digest(reference: str) -> str:
    """SHA-256 of a reference in hex, by which its units are found."""
    return hashlib.sha256(reference.encode("utf-8", "replace")).hexdigest()


class UnitStore:
    """The units of references that were taken apart with the current prompt; other units count as absent.

    Args:
        path: the file; it may be missing.
        model: the judge model whose units count; None: units of any model count.
    """

    def __init__(self, path: Path, model: str | None = None) -> None:
        self.path = path
        self.model = model
        self._others: dict[str, str] = {}
        """Digest of a reference -> the other prompt or model that took it apart."""
        self.num_broken = 0
        self._units: dict[str, tuple[str, ...]] = {}
        self._file: BinaryIO | None = None
        if path.is_file():
            with open(path, "rb") as file:
                for line in file:
                    self._read(line)
        others = Counter(source for reference, source in self._others.items() if reference not in self._units)
        for source, count in others.most_common(3):
            logger.warning(
                "%s: %d references were taken apart by %s, not by the judge model %r: they are not used, and asked for anew",
                path,
                count,
                printable(source),
                model,
            )

    def __len__(self) -> int:
        return len(self._units)

    def get(self, reference: str) -> tuple[str, ...] | None:
        """The units of a reference, or None if it was not taken apart."""
        return self._units.get(reference_digest(reference))

    def add(self, reference: str, units: Sequence[str], model: str) -> None:
        """Keep the units of a reference; they are written to the file before this returns."""
        digest = reference_digest(reference)
        record = {"reference": digest, "prompt": TASKS["decompose"].identity, "model": model, "units": list(units)}
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        if self._file is None:
            self._file = self._open()
        self._file.write(line)
        self._units[digest] = tuple(units)

    def close(self) -> None:
        """Force all lines to disk and close; closing twice is harmless."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def refuse_foreign(self, option: str) -> None:
        """Raise ``ForeignPathError`` if the file exists but is not ours; ``option`` is the setting that names it."""
        refuse_foreign_file(self.path, _begins_with_units, what="file of reference units", option=option)

    def _open(self) -> BinaryIO:
        self.refuse_foreign("endpoint.units")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open_for_append(self.path)

    def _read(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            units = record["units"]
            whole = line.endswith(b"\n") and isinstance(units, list) and 0 < len(units) <= _MOST_UNITS
            whole = whole and all(isinstance(unit, str) and unit.strip() for unit in units)
            self.num_broken += not whole
            if not whole:
                return
            if record["prompt"] != TASKS["decompose"].identity:
                self._others[str(record["reference"])] = f"the prompt {record['prompt']}"
            elif self.model is not None and record["model"] != self.model:
                self._others[str(record["reference"])] = f"the model {record['model']!r}"
            else:
                self._units[str(record["reference"])] = tuple(units)
        except (ValueError, KeyError, TypeError, RecursionError):
            self.num_broken += 1


def begins_with(head: bytes, keys: Sequence[str]) -> bool:
    """Whether a file's first line is a JSON object whose first keys are ``keys``, or the cut-off start of one."""
    line, newline, _ = head.partition(b"\n")
    if newline:
        with suppress(ValueError, RecursionError):
            first = json.loads(line)
            return isinstance(first, dict) and list(first)[: len(keys)] == list(keys)
        return False
    start = b'{"%s": "' % keys[0].encode()
    return line[: len(start)] == start[: len(line)]


def _begins_with_units(head: bytes) -> bool:
    return begins_with(head, ("reference", "prompt"))


def open_for_append(path: Path) -> BinaryIO:
    """Open a file of JSON lines for unbuffered appending.

    If the last line has no newline, it is cut away, because a kill left it half-written; but if it is a whole JSON
    object, as an editor may leave it, it gets its newline.
    """
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 - the caller closes it
    end = file.seek(0, os.SEEK_END)
    start = end
    while start:
        step = min(1 << 16, start)
        file.seek(start - step)
        newline = file.read(step).rfind(b"\n")
        if newline >= 0:
            start = start - step + newline + 1
            break
        start -= step
    if start < end:
        file.seek(start)
        if _is_object(file.read(min(end - start, _MAX_LINE_BYTES))):
            file.write(b"\n")
        else:
            file.truncate(start)
    file.seek(0, os.SEEK_END)
    return file


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
