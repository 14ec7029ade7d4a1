"""The images of records: checked at the start without decoding, and decoded when they are drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from balcaprl.config import DataConfig
from balcaprl.data.images.files import check_image, check_image_bytes, content_digest, decode_image, load_image
from balcaprl.data.images.paths import ImageError, check_image_file
from balcaprl.data.images.values import image_source
from balcaprl.data.records.records import LoadReport, Record
from balcaprl.logtext import printable

if TYPE_CHECKING:
    from PIL import Image

    from balcaprl.data.records.readers import ImageColumn

# File checks wait for the disk, not the processor, so having more threads than cores pays, above all on network disks.
_CHECK_THREADS = 16
_CHUNK = 256
_BAR_FROM = 5_000
_Outcomes = dict[str | int, str | ImageError]
"""For each ``Record.image``, the image's id, or the error that says why the image cannot be used."""


class RecordImages:
    """Finds the image of a record: a file below ``root``, or an image that is embedded in the data set."""

    def __init__(self, config: DataConfig, root: Path, column: ImageColumn | None) -> None:
        self._root = root
        self._column = column
        self._check_headers = config.check_headers
        self._limits = {
            "max_pixels": config.max_pixels,
            "max_source_pixels": config.max_source_pixels,
            "max_file_bytes": config.max_file_bytes,
        }
        self._byte_limit = {"max_file_bytes": config.max_file_bytes}

    def load(self, record: Record) -> Image.Image:
        """Decode the image of a record; raises ``ImageError`` if that fails."""
        image = self._find(record)
        if isinstance(image, bytes):
            return decode_image(image, printable(record.sample_id), **self._limits)
        return load_image(image, self._root, **self._limits)

    def check(self, record: Record) -> str:
        """Return an id for a record's image, or raise the ``ImageError`` that can be found without decoding.

        Without ``check_headers`` a file is not opened. Its id is then made from its real path, so a copy of the file
        counts as another image.
        """
        image = self._find(record)
        if isinstance(image, bytes):
            if self._check_headers:
                check_image_bytes(image, printable(record.sample_id), **self._limits)
            return content_digest(image)
        if self._check_headers:
            return check_image(image, self._root, **self._limits)
        resolved = check_image_file(image, self._root, **self._byte_limit)
        return content_digest(os.fsencode(resolved))

    def checked(self, records: Sequence[Record], report: LoadReport) -> list[Record]:
        """Return the records that pass ``check``, in order and with ``image_id``; count the others in ``report``.

        Each image is checked once. The checks run in threads; a terminal shows a progress bar for 5,000 images or more.
        """
        distinct = list({record.image: record for record in reversed(records)}.values())
        chunks = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            outcomes = chain.from_iterable(_with_bar(pool.map(self._outcomes, chunks), len(chunks), len(distinct)))
            found = {record.image: outcome for record, outcome in zip(distinct, outcomes, strict=True)}
            found |= self._told_apart(found, pool)
        kept = []
        for record in records:
            outcome = found[record.image]
            if isinstance(outcome, ImageError):
                report.exclude(outcome.reason, f"{printable(record.sample_id)}: {outcome}")
            else:
                kept.append(replace(record, image_id=outcome))
        return kept

    def _told_apart(self, found: _Outcomes, pool: ThreadPoolExecutor) -> _Outcomes:
        """Return ids made from the whole content for files that share an id.

        Such files may be equal only in length, beginning and end. If a data set also embeds images, all its files get
        ids of this kind, because embedded images have them.
        """
        if not self._check_headers:
            return {}
        files: dict[str, list[str]] = {}
        for image, outcome in found.items():
            if isinstance(image, str) and isinstance(outcome, str):
                files.setdefault(outcome, []).append(image)
        embeds = any(isinstance(image, int) for image in found)
        alike = [image for same in files.values() if embeds or len(same) > 1 for image in same]
        return dict(zip(alike, pool.map(self._whole_digest, alike), strict=True))

    def _whole_digest(self, image: str) -> str:
        try:
            return content_digest(check_image_file(image, self._root, **self._byte_limit).read_bytes())
        except (ImageError, OSError):  # the file has changed since its check: it counts as an image of its own
            return content_digest(image.encode("utf-8", "replace"))

    def _outcomes(self, records: Sequence[Record]) -> list[str | ImageError]:
        return [self._outcome(record) for record in records]

    def _outcome(self, record: Record) -> str | ImageError:
        try:
            return self.check(record)
        except ImageError as error:
            return error

    def _find(self, record: Record) -> bytes | str:
        if isinstance(record.image, str):
            return record.image
        assert self._column is not None  # a reader that makes records of embedded images returns a column of them
        return image_source(self._column[record.image])


def _with_bar(
    chunks: Iterator[list[str | ImageError]], num_chunks: int, num_records: int
) -> Iterator[list[str | ImageError]]:
    hidden = num_records < _BAR_FROM or not sys.stderr.isatty()
    console = Console(stderr=True)
    yield from track(chunks, "Checking images", num_chunks, console=console, transient=True, disable=hidden)
