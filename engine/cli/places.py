"""Checks the paths that a run reads and writes before anything heavy is loaded, so that typing errors show at once."""

from __future__ import annotations

from pathlib import Path

from balcaprl.config import DataConfig, TrainConfig
from balcaprl.data.datasets import locate
from balcaprl.files.model_path import refuse_no_model
from balcaprl.files.ownership import refuse_filled_folder, refuse_no_folder


def check_places(config: TrainConfig) -> None:
    """Raise the trainer's errors about output folder, data set and model that can be seen from the paths alone.

    Raises:
        NotADirectoryError: ``output_dir`` cannot be a folder.
        DatasetError: for the reasons of ``balcaprl.data.datasets.locate``.
        ModelFilesError: ``model.path`` names no folder, and cannot be a hub id.
    """
    refuse_no_folder(config.output_dir, option="output_dir")
    check_data_path(config.data)
    checkpoints = config.output_dir / "checkpoints"
    # A resumed run takes its model from its checkpoint.
    if config.model.path != "demo" and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        refuse_no_model(config.model.path)


def check_data_path(config: DataConfig) -> None:
    """Raise DatasetError if no data set can be at the path; see ``balcaprl.data.datasets.locate``."""
    if config.kind != "scenes":
        locate(config)


def check_merge(checkpoint: Path, out: Path, base: str | None) -> None:
    """Raise the errors of ``balcaprl.checkpoints.merge.merge_checkpoint`` that can be seen from the paths alone.

    Raises:
        ModelFilesError: ``checkpoint`` or ``base`` names no folder, and cannot be a hub id.
        ForeignPathError: ``out`` holds something.
    """
    refuse_no_model(checkpoint, option="CHECKPOINT")
    refuse_filled_folder(out, option="OUT")
    if base not in (None, "demo"):
        refuse_no_model(base, option="--base")
