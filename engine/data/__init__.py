"""Turns data sets into samples: drawn scenes, ShareGPT4V, JSON Lines, Hugging Face data sets.

``load_dataset`` reads and checks a data set and splits off the held-out images; ``SampleStream`` is the resumable order
in which training draws the rest. Records that cannot be used are counted by reason and logged once, in one message.
"""

from balcaprl.data.datasets import Dataset, SampleSource, load_dataset
from balcaprl.data.images.files import decode_image, load_image
from balcaprl.data.images.paths import ImageError
from balcaprl.data.records.records import DatasetError, LoadReport
from balcaprl.data.stream import SampleStream

__all__ = [
    "Dataset",
    "DatasetError",
    "ImageError",
    "LoadReport",
    "SampleSource",
    "SampleStream",
    "decode_image",
    "load_dataset",
    "load_image",
]
