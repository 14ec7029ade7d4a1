"""Reads Hugging Face data sets saved on disk. This is the only module that imports ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from balcaprl.data.records.forms import IMAGE_KEYS, REFERENCE_KEYS, TURN_KEYS, RecordError, read_fields
from balcaprl.data.records.records import DatasetError, LoadReport, Record, RecordBuilder
from balcaprl.extras import install_extra

_OTHER_COLUMNS = ("prompt", "completion", "instruction", "id", "facts")
_BATCH_ROWS = 1000


class TableImages:
    """The images of a data set by row, undecoded and as they are stored, whatever type the column declares."""

    def __init__(self, table: Any, column: str) -> None:
        self._table, self._column = table.select_columns([column]).with_format("arrow"), column

    def __getitem__(self, row: int) -> Any:
        """Return the stored image of a row; see ``readers.ImageColumn``."""
        return self._table[row][self._column][0].as_py()


def read_hf_folder(path: Path, instruction: str, report: LoadReport) -> tuple[list[Record], TableImages]:
    """Read a folder that ``datasets.Dataset.save_to_disk`` wrote; images stay on disk until they are drawn.

    Columns are named like the keys in ``forms.py``. In a folder with splits, ``train`` is read; if there is no such
    split, the only one is read.

    Raises:
        DatasetError: ``datasets`` is not installed, the folder cannot be read, a column is missing, or there are
            several splits and none is ``train``.
    """
    table = _load_table(path)
    columns = table.column_names
    image_column = next((name for name in IMAGE_KEYS if name in columns), None)
    texts = [name for name in (*REFERENCE_KEYS, *TURN_KEYS, "completion") if name in columns]
    if image_column is None or not texts:
        raise DatasetError(
            f"data.path: {path} has the columns {columns}; expected one of {IMAGE_KEYS} and one of "
            f"{(*REFERENCE_KEYS, *TURN_KEYS)}"
        )
    builder = RecordBuilder(instruction, report)
    others = [name for name in _OTHER_COLUMNS if name in columns and name not in texts]
    plain = table.select_columns([*texts, *others]).with_format("arrow")
    row = 0
    for batch in plain.iter(batch_size=_BATCH_ROWS):
        for entry in batch.to_pylist():
            try:
                builder.add(f"row {row}", read_fields(entry, turns_first=False, image=row), row)
            except RecordError as error:
                builder.exclude(error.reason, f"row {row}: {error}")
            row += 1
    return builder.records, TableImages(table, image_column)


def _load_table(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(f"data.kind hf needs the package 'datasets': {install_extra('hf')}") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, JSON and path errors alike
        raise DatasetError(
            f"data.path: {path} is not a data set folder as datasets.Dataset.save_to_disk writes it: {error}; of a folder "
            "of Parquet files make one with datasets.load_dataset('parquet', data_files=...).save_to_disk(...)"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) != 1:
            raise DatasetError(f"data.path: {path} has the splits {sorted(loaded)}; give the folder of one of them")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded
