"""Splits records into training and held-out ones; all records of an image are on the same side."""

from __future__ import annotations

import logging

import numpy as np

from balcaprl.data.records.records import Record

logger = logging.getLogger(__name__)

DEFAULT_NUM_EVAL = 128
"""The default of ``data.num_eval``. Users who keep it did not ask for this number, so at most half of the images are
held out."""


def split_records(records: list[Record], num_eval: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Return the training records in the file's order, and the records of the held-out images; no image is in both.

    The images, in the order of their first records, are shuffled by ``seed``, and the last ones are held out.
    """
    images: dict[str, list[Record]] = {}
    for record in records:
        images.setdefault(record.image_id or record.sample_id, []).append(record)
    names = list(images)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
    num_train = len(names) - num_held_out(num_eval, len(names))
    held_out = [names[i] for i in order[num_train:]]
    apart = set(held_out)
    train = [record for record in records if (record.image_id or record.sample_id) not in apart]
    return train, [record for name in held_out for record in images[name]]


def num_held_out(wanted: int, num_images: int) -> int:
    """Return how many images to hold out: ``wanted`` if that fits, otherwise half of the images, with a warning.

    ``wanted`` does not fit if it leaves no image to train on, or if it is the default and more than half of the images.
    """
    fits = wanted < num_images and (wanted != DEFAULT_NUM_EVAL or 2 * wanted <= num_images)
    if fits or not wanted:
        return wanted
    half = num_images // 2
    logger.warning(
        "data.num_eval: %d held-out images would leave too few of %d to train on: %d are held out",
        wanted,
        num_images,
        half,
    )
    return half
