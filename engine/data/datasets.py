"""Loads data sets as samples: reads, checks and splits them.

    dataset = load_dataset(config.data, seed=config.seed)
    stream = dataset.train_stream(seed=config.seed)
    samples = stream.next_decodable(8)

All records that show the same image are trained on together or held out together (``split.py``).

Loading checks three things of each record: its text, its image path (inside the image folder, an existing file of an
allowed size) and, with ``data.check_headers``, the header of its image. A record that fails is counted, and all counts
are logged in one message. Pixels are decoded when a sample is drawn; a file that then turns out to be damaged is
skipped by ``SampleStream.next_decodable`` and counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from balcaprl.config import DataConfig
from balcaprl.data.records.readers import ImageColumn, read_json
from balcaprl.data.records.record_images import RecordImages
from balcaprl.data.records.records import DatasetError, LoadReport, Record
from balcaprl.data.split import split_records
from balcaprl.data.stream import SampleSource, SampleStream
from balcaprl.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A loaded data set: what to train on, what to hold out, and what was left out."""

    train: SampleSource
    evaluation: SampleSource
    report: LoadReport
    shuffle: bool = True

    def train_stream(self, *, seed: int) -> SampleStream:
        """Return the resumable order in which training draws its samples."""
        return SampleStream(self.train, seed=seed, shuffle=self.shuffle)

    def some_references(self, most: int = 256) -> list[str]:
        """Return up to ``most`` reference captions, spread over the training samples, to check language and length."""
        step = max(1, len(self.train) // most)
        return [self.train[index].reference for index in range(0, len(self.train), step)[:most]]


def load_dataset(config: DataConfig, *, seed: int) -> Dataset:
    """Read, check and split the data set of ``config``, and log one message that accounts for all records.

    ``seed`` chooses the held-out images. The same files, config and seed give the same data set.

    Raises:
        DatasetError: the file cannot be read or has another format, or nothing usable is left.
    """
    if config.kind == "scenes":
        return _load_scenes(config)
    path, root = locate(config)
    report = LoadReport(f"{config.kind} {path}")
    records, column = _read(config, path, report)
    images = RecordImages(config, root, column)
    records = images.checked(records, report)
    if not records:
        raise DatasetError(f"no usable record is left; mend the data or data.image_root ({root})\n{report}")
    train, held_out = split_records(records, config.num_eval, seed)
    report.num_train, report.num_eval = len(train), len(held_out)
    report.num_eval_images = len({record.image_id for record in held_out})
    logger.log(logging.WARNING if report.num_excluded else logging.INFO, "%s", report)
    return Dataset(RecordSource(train, images), RecordSource(held_out, images), report, config.shuffle)


def _load_scenes(config: DataConfig) -> Dataset:
    from balcaprl.data.scenes import scene_samples

    train = scene_samples("train", instruction=config.instruction)
    validation = scene_samples("validation", instruction=config.instruction)
    if config.num_eval > len(validation):
        raise DatasetError(f"data.num_eval: {config.num_eval} exceeds the {len(validation)} validation scenes")
    report = LoadReport("scenes", num_train=len(train), num_eval=config.num_eval)
    logger.info("%s", report)
    return Dataset(train, _FirstSamples(validation, config.num_eval), report, config.shuffle)


def locate(config: DataConfig) -> tuple[Path, Path]:
    """Return the data set's path and the image folder.

    Raises:
        DatasetError: one of them is missing, or is not the file or folder that ``data.kind`` expects.
    """
    if config.path is None:
        raise DatasetError(f"data.path: needed for data.kind {config.kind}")
    path = config.path
    if not path.exists():
        raise DatasetError(f"data.path: {path} does not exist")
    if path.is_dir() != (config.kind == "hf"):
        expected = "the folder of a saved data set" if config.kind == "hf" else "a file"
        raise DatasetError(f"data.path: {path}: data.kind {config.kind} expects {expected}")
    root = config.image_root or (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise DatasetError(f"data.image_root: {root} is not a folder")
    return path, root


def _read(config: DataConfig, path: Path, report: LoadReport) -> tuple[list[Record], ImageColumn]:
    if config.kind == "hf":
        from balcaprl.data.records.hf_folder import read_hf_folder

        return read_hf_folder(path, config.instruction, report)
    return read_json(path, config.instruction, report, turns_first=config.kind == "sharegpt4v")


# ------------------------------------------------------------------------------------------------ sources


@dataclass(frozen=True)
class RecordSource:
    """Records as samples whose images are decoded when they are asked for."""

    records: list[Record]
    images: RecordImages

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        load = partial(self.images.load, record)
        return Sample(record.sample_id, load, record.reference, record.instruction, record.facts, record.image_id)


@dataclass(frozen=True)
class _FirstSamples:
    """The first ``size`` samples of a source."""

    source: SampleSource
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.source[index]
