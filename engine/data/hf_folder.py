"""Hugging Face data sets saved on disk. The only importer of ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from balcaprl.data.records import DatasetError, LoadReport, Record, RecordBuilder
from balcaprl.extras import install_extra

IMAGE_COLUMN = "image"
REFERENCE_COLUMNS = ("reference", "caption", "text")
"""The first of these that a data set has is the reference caption."""
ID_COLUMN, INSTRUCTION_COLUMN = "id", "instruction"
"""Used where they exist."""


class ImageColumn:
    """The undecoded images of a data set, by row: bytes of an image file, or a path."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __getitem__(self, row: int) -> bytes | str | None:
        """None where the row holds no image."""
        value = self._table[row][IMAGE_COLUMN]
        if isinstance(value, dict):  # an Image feature, undecoded
            value = value.get("bytes") or value.get("path")
        return value or None


def read_hf_folder(path: Path, instruction: str, report: LoadReport) -> tuple[list[Record], ImageColumn]:
    """Read a folder that ``datasets.Dataset.save_to_disk`` wrote; images stay on disk until they are drawn.

    Columns: ``image`` (Image feature, bytes, or a path), the reference caption (``REFERENCE_COLUMNS``), and optionally
    ``id`` and ``instruction``. Of a folder with several splits ``train`` is taken, or the only one there is.

    Raises:
        DatasetError: ``datasets`` is not installed, the folder cannot be read, or a column is missing.
    """
    table = _load_table(path)
    columns = table.column_names
    reference_column = next((name for name in REFERENCE_COLUMNS if name in columns), None)
    if IMAGE_COLUMN not in columns or reference_column is None:
        raise DatasetError(
            f"data.path: {path} has the columns {columns}; expected {IMAGE_COLUMN!r} and one of {REFERENCE_COLUMNS}"
        )
    rows = len(table)
    optional = [table[name] if name in columns else [None] * rows for name in (INSTRUCTION_COLUMN, ID_COLUMN)]
    builder = RecordBuilder(instruction, report)
    for row, (reference, own, own_id) in enumerate(zip(table[reference_column], *optional, strict=True)):
        builder.add(f"row {row}", image=row, reference=reference, instruction=own, own_id=own_id)
    return builder.records, ImageColumn(table.select_columns([IMAGE_COLUMN]))


def _load_table(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(f"data.kind hf needs the package 'datasets': {install_extra('hf')}") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, JSON and path errors alike
        raise DatasetError(
            f"data.path: {path} is not a data set folder as datasets.Dataset.save_to_disk writes it: {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) != 1:
            raise DatasetError(f"data.path: {path} has the splits {sorted(loaded)}; give the folder of one of them")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if IMAGE_COLUMN in loaded.column_names and isinstance(loaded.features[IMAGE_COLUMN], datasets.Image):
        loaded = loaded.cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
    return loaded
