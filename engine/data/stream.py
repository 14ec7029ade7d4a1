"""The data cursor: a deterministic, endless, resumable order of samples."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from balcaprl.data.images.paths import ImageError
from balcaprl.data.records.records import DatasetError
from balcaprl.logtext import log_few, printable
from balcaprl.types import Sample

logger = logging.getLogger(__name__)

MAX_PERMUTED = 10_000_000
"""Larger sources are drawn in order: a permutation would take too much memory, and no run reaches the epoch's end."""


class SampleSource(Protocol):
    """Samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleStream:
    """Draws samples epoch after epoch; the same source, seed and state give the same samples.

    The order of an epoch is a permutation that seed and epoch determine; without ``shuffle`` it is the source's order.
    A source of more than ``MAX_PERMUTED`` samples is always drawn in order; with ``shuffle``, each epoch starts at a
    place that the seed determines.

    Args:
        source: the samples to draw from, at least one.
        seed: the seed of the order.
        shuffle: draw in a random order that changes with each epoch.
    """

    def __init__(self, source: SampleSource, *, seed: int, shuffle: bool = True) -> None:
        if len(source) == 0:
            raise DatasetError("a data set without samples cannot be drawn from")
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        self._undecodable: set[int] = set()
        self._start_epoch(0)

    @property
    def num_undecodable(self) -> int:
        """Number of distinct samples whose image did not decode."""
        return len(self._undecodable)

    def next(self, count: int) -> list[Sample]:
        """Return the next ``count`` samples, undecoded; when an epoch ends, the next one follows."""
        return [self._source[self._next_index()] for _ in range(count)]

    def next_decodable(self, count: int) -> list[Sample]:
        """Return the next ``count`` samples whose images decode; each is decoded here, once, and kept with its sample.

        A sample whose image does not decode is skipped and counted in ``num_undecodable``; the first few are logged.

        Raises:
            DatasetError: the number of samples in a row that do not decode reaches the length of an epoch.
        """
        samples: list[Sample] = []
        failures_in_a_row = 0
        while len(samples) < count:
            index = self._next_index()
            sample = self._source[index]
            try:
                samples.append(decoded(sample))
                failures_in_a_row = 0
            except ImageError as error:
                self._note_undecodable(index, sample, error)
                failures_in_a_row += 1
                if failures_in_a_row >= len(self._source):
                    raise DatasetError(f"no training image decodes; the last: {printable(error)}") from error
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as plain JSON values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "undecodable": sorted(self._undecodable),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the place in the order at which ``state`` was taken.

        Raises:
            DatasetError: the state belongs to another seed, order or number of samples, or is damaged.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DatasetError(
                    f"the saved data cursor has {name} = {state.get(name)}, this run has {value}: the data set or the "
                    "seed changed, so the order cannot be continued; start a new run"
                )
        if not 0 <= state["position"] < len(self._source) or state["epoch"] < 0:
            raise DatasetError(f"damaged data cursor: epoch {state['epoch']}, position {state['position']}")
        self._start_epoch(state["epoch"])
        self._position = state["position"]
        self._undecodable = set(state["undecodable"])

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "shuffle": self._shuffle, "num_samples": len(self._source)}

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order: np.ndarray | None = None
        self._offset = 0
        if not self._shuffle:
            return
        if len(self._source) > MAX_PERMUTED:
            self._offset = int(np.random.Generator(np.random.PCG64(self._seed)).integers(len(self._source)))
        else:
            self._order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._source))

    def _next_index(self) -> int:
        if self._order is None:
            index = (self._position + self._offset) % len(self._source)
        else:
            index = int(self._order[self._position])
        self._position += 1
        if self._position == len(self._source):
            self._start_epoch(self._epoch + 1)
        return index

    def _note_undecodable(self, index: int, sample: Sample, error: ImageError) -> None:
        if index not in self._undecodable:
            self._undecodable.add(index)
            log_few(
                logger,
                len(self._undecodable),
                "skipped %s, its image does not decode: %s",
                printable(sample.sample_id),
                printable(error),
            )


def decoded(sample: Sample) -> Sample:
    """Return the sample with its image decoded and kept; raises ``ImageError`` if the image does not decode."""
    image = sample.load_image()
    return replace(sample, load_image=lambda: image)
