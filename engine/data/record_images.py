"""The images of records: checked at start without decoding, decoded when they are drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from balcaprl.config import DataConfig
from balcaprl.data.images import (
    ImageError,
    check_image,
    check_image_bytes,
    check_image_file,
    decode_image,
    load_image,
)
from balcaprl.data.records import LoadReport, Record

if TYPE_CHECKING:
    from PIL import Image

    from balcaprl.data.hf_folder import ImageColumn

# Checks of files wait for the disk, not for the processor: more threads than cores pay, above all on network disks.
_CHECK_THREADS = 16
_CHUNK = 256
_BAR_FROM = 5_000


class RecordImages:
    """Finds the image of a record: a file below ``root``, or a row of a Hugging Face data set."""

    def __init__(self, config: DataConfig, root: Path, column: ImageColumn | None) -> None:
        self._root = root
        self._column = column
        self._check_headers = config.check_headers
        self._limits = {
            "max_pixels": config.max_pixels,
            "max_source_pixels": config.max_source_pixels,
            "max_file_bytes": config.max_file_bytes,
        }

    def load(self, record: Record) -> Image.Image:
        """Decode; raises ``ImageError``."""
        image = self._find(record)
        if isinstance(image, bytes):
            return decode_image(image, record.sample_id, **self._limits)
        return load_image(image, self._root, **self._limits)

    def check(self, record: Record) -> None:
        """Raise the ``ImageError`` of a record that is known to be bad without decoding.

        Without ``check_headers`` a file is not opened, and a row of a Hugging Face data set not read.
        """
        if self._check_headers:
            image = self._find(record)
            if isinstance(image, bytes):
                check_image_bytes(image, record.sample_id, **self._limits)
            else:
                check_image(image, self._root, **self._limits)
        elif isinstance(record.image, str):
            check_image_file(record.image, self._root, max_file_bytes=self._limits["max_file_bytes"])

    def checked(self, records: Sequence[Record], report: LoadReport) -> list[Record]:
        """The records that pass ``check``, in their order; the others are counted in ``report``.

        Runs in threads, with a progress bar on a terminal where it takes a while.
        """
        chunks = [records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK)]
        kept = []
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            failures = chain.from_iterable(_with_bar(pool.map(self._failures, chunks), len(chunks), len(records)))
            for record, failure in zip(records, failures, strict=True):
                if failure is None:
                    kept.append(record)
                else:
                    report.exclude(failure.reason, f"{record.sample_id}: {failure}")
        return kept

    def _failures(self, records: Sequence[Record]) -> list[ImageError | None]:
        return [self._failure(record) for record in records]

    def _failure(self, record: Record) -> ImageError | None:
        try:
            self.check(record)
        except ImageError as error:
            return error
        return None

    def _find(self, record: Record) -> bytes | str:
        if isinstance(record.image, str):
            return record.image
        assert self._column is not None  # only its reader makes records of rows
        image = self._column[record.image]
        if image is None:
            raise ImageError(f"{record.sample_id}: the row holds no image", "no image")
        return image


def _with_bar(
    chunks: Iterator[list[ImageError | None]], num_chunks: int, num_records: int
) -> Iterator[list[ImageError | None]]:
    hidden = num_records < _BAR_FROM or not sys.stderr.isatty()
    console = Console(stderr=True)
    yield from track(chunks, "Checking images", num_chunks, console=console, transient=True, disable=hidden)
