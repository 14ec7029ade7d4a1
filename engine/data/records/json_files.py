"""Reads JSON arrays and JSON Lines; the content tells which of the two a file is, not its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balcaprl.data.records.records import DatasetError
from balcaprl.logtext import printable

MAX_LINE_BYTES = 128 << 20
"""Longest allowed line of a JSON Lines file; an embedded image of ``data.max_file_bytes`` fits."""


class RepeatedKey(dict[str, Any]):
    """A JSON object in which a key occurs twice, so that the object's meaning is not clear."""


@dataclass(frozen=True)
class Item:
    """One entry of a file."""

    where: str
    """The entry's place: ``record 3`` in an array, ``line 4`` in JSON Lines."""
    key: int
    """The key with which ``JsonFile.again`` finds the entry."""
    value: Any = None
    problem: tuple[str, str] | None = None
    """Reason and message, if the entry cannot be read."""


class JsonFile:
    """Reads the entries of a file, and later gives those with an embedded image again.

    From JSON Lines in UTF-8, an entry is then read again, so that no image stays in memory. Of other files, the entries
    that were passed to ``hold`` stay in memory.

    Args:
        path: a JSON array, or one JSON value per line. The encoding is UTF-8, or UTF-16 or UTF-32 if a byte order mark
            or zero bytes show it.
        lenient: whether to read a file line by line if it begins like an array but is not valid JSON.
    """

    def __init__(self, path: Path, *, lenient: bool) -> None:
        self.path, self._lenient = path, lenient
        self._held: dict[int, Any] | None = None

    def items(self) -> Iterator[Item]:
        """Yield all entries, without blank lines.

        Raises:
            DatasetError: the file cannot be read; or it begins like an array but is not valid JSON, and ``lenient`` is
                false.
        """
        try:
            with open(self.path, "rb") as file:
                head = file.read(1 << 16)
            encoding = json.detect_encoding(head[:4])
            start = head.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
            if start.startswith("["):
                array = self._array()
                if array is not None:
                    yield from array
                    return
            if encoding.startswith("utf-8"):
                yield from self._lines()
            else:
                self._held = {}
                text = self.path.read_bytes().decode(encoding, "replace").removeprefix("\ufeff")
                for number, line in enumerate(text.split("\n"), 1):
                    if line.strip():
                        yield _parsed(f"line {number}", number, line)
        except OSError as error:
            raise DatasetError(f"data.path: {self.path} cannot be read: {error.strerror}") from error

    def hold(self, item: Item) -> None:
        """Make sure that ``again`` finds an entry. If the file is not UTF-8 JSON Lines, the entry stays in memory."""
        if self._held is not None:
            self._held[item.key] = item.value

    def again(self, key: int) -> Any:
        """Return the value of an entry again; None if the file has changed so that the entry cannot be read."""
        if self._held is not None:
            return self._held.get(key)
        try:
            with open(self.path, "rb") as file:
                file.seek(key)
                return _parsed("", key, file.readline(MAX_LINE_BYTES)).value
        except OSError:
            return None

    def _array(self) -> Iterator[Item] | None:
        try:
            content = json.loads(self.path.read_bytes(), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            if self._lenient:
                return None
            raise DatasetError(f"data.path: {self.path} is not valid JSON: {printable(error)}") from error
        if not isinstance(content, list):
            return None
        self._held = {}
        return (Item(f"record {index}", index, value) for index, value in enumerate(content))

    def _lines(self) -> Iterator[Item]:
        with open(self.path, "rb") as file:
            number = offset = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                where = f"line {number}"
                whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
                if not whole:
                    yield Item(where, offset, problem=("line too long", f"{where}: over {MAX_LINE_BYTES:,} bytes"))
                    while line and not line.endswith(b"\n"):
                        line = file.readline(1 << 20)
                elif line.strip():
                    yield _parsed(where, offset, line)
                offset = file.tell()


def _parsed(where: str, key: int, line: bytes | str) -> Item:
    try:
        return Item(where, key, json.loads(line, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or nested too deep
        return Item(where, key, problem=("broken line", f"{where}: {printable(error)}"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKey(found)
