"""The places that a run reads and writes, looked at before anything heavy is loaded: a typing error costs no minute."""

from __future__ import annotations

from pathlib import Path

from balcaprl.config import DataConfig, TrainConfig
from balcaprl.data.datasets import locate
from balcaprl.model_path import refuse_no_model
from balcaprl.ownership import refuse_filled_folder, refuse_no_folder


def check_places(config: TrainConfig) -> None:
    """Raise what the trainer would for the output folder, the data set and the model, if it is to be seen by their paths.

    Raises:
        NotADirectoryError: ``output_dir`` cannot be a folder.
        DatasetError: See ``balcaprl.data.datasets.locate``.
        ModelFilesError: ``model.path`` names no folder, and cannot be a hub id.
    """
    refuse_no_folder(config.output_dir, option="output_dir")
    check_data_path(config.data)
    checkpoints = config.output_dir / "checkpoints"
    # A resumed run takes its model from its checkpoint.
    if config.model.path != "demo" and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        refuse_no_model(config.model.path)


def check_data_path(config: DataConfig) -> None:
    """Raise DatasetError where no data set can be; see ``balcaprl.data.datasets.locate``."""
    if config.kind != "scenes":
        locate(config)


def check_merge(checkpoint: Path, out: Path, base: str | None) -> None:
    """Raise what ``balcaprl.merge.merge_checkpoint`` would, if it is to be seen by the paths.

    Raises:
        ModelFilesError: ``checkpoint`` or ``base`` names no folder, and cannot be a hub id.
        ForeignPathError: ``out`` holds something.
    """
    refuse_no_model(checkpoint, option="CHECKPOINT")
    refuse_filled_folder(out, option="OUT")
    if base not in (None, "demo"):
        refuse_no_model(base, option="--base")
