"""Reads a JSON file into records and a column of the images that are embedded in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from balcaprl.data.images.paths import ImageError
from balcaprl.data.images.values import image_source
from balcaprl.data.records.forms import RecordError, read_fields
from balcaprl.data.records.json_files import Item, JsonFile, RepeatedKey
from balcaprl.data.records.records import LoadReport, Record, RecordBuilder


class ImageColumn(Protocol):
    """The undecoded images that are embedded in a data set."""

    def __getitem__(self, key: int, /) -> Any:
        """Return an image in a form that ``image_source`` takes; None if there is none."""
        ...


class EmbeddedImages:
    """The images embedded in a JSON file, read again when they are asked for."""

    def __init__(self, file: JsonFile, turns_first: bool) -> None:
        self._file, self._turns_first = file, turns_first

    def __getitem__(self, key: int) -> Any:
        """Return the image of the entry with this key; see ``ImageColumn``."""
        try:
            return read_fields(self._file.again(key), turns_first=self._turns_first).image
        except (RecordError, AttributeError):  # the file has changed since it was read
            return None


def read_json(
    path: Path, instruction: str, report: LoadReport, *, turns_first: bool
) -> tuple[list[Record], ImageColumn]:
    """Read a JSON array of objects, or one JSON object per line, whatever the file is called.

    Args:
        path: the file.
        instruction: the instruction for records that have none of their own.
        report: the report in which left-out entries are counted.
        turns_first: see ``read_fields``; if true, a broken array is also an error, and is not read as broken lines.

    Raises:
        DatasetError: the file cannot be read, or, with ``turns_first``, is a broken array.
    """
    builder = RecordBuilder(instruction, report)
    file = JsonFile(path, lenient=not turns_first)
    for item in file.items():
        problem = item.problem or _add(builder, file, item, turns_first)
        if problem is not None:
            builder.exclude(*problem)
    return builder.records, EmbeddedImages(file, turns_first)


def _add(builder: RecordBuilder, file: JsonFile, item: Item, turns_first: bool) -> tuple[str, str] | None:
    """Make records of one entry; return the reason and a message if that is impossible, otherwise None."""
    entry = item.value
    if not isinstance(entry, dict):
        return "not an object", item.where
    if isinstance(entry, RepeatedKey):
        return "repeated key", f"{item.where}: a key occurs twice"
    named = item.where if entry.get("id") is None else f"{item.where} (id {entry['id']!r:.80})"
    try:
        fields = read_fields(entry, turns_first=turns_first)
        image = image_source(fields.image)
    except (RecordError, ImageError) as error:
        return error.reason, f"{named}: {error}"
    if isinstance(image, bytes):
        file.hold(item)
    builder.add(item.where, fields, image if isinstance(image, str) else item.key)
    return None
