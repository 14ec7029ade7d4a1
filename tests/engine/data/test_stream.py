"""The data cursor: deterministic, resumable, and patient with bad images."""

import json
import logging

import pytest
from PIL import Image

from balcaprl.data import DatasetError, ImageError, SampleStream
from balcaprl.data.stream import MAX_PERMUTED
from balcaprl.types import Sample


class Numbers:
    """``size`` samples named by their index, of which ``bad`` do not decode."""

    def __init__(self, size, bad=()):
        self.size, self.bad, self.num_decoded = size, set(bad), 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        def load():
            self.num_decoded += 1
            if index in self.bad:
                raise ImageError(f"{index} is broken")
            return Image.new("RGB", (1, 1))

        return Sample(str(index), load, "A.", "What?")


def ids(samples):
    return [int(s.sample_id) for s in samples]


def test_each_epoch_is_another_permutation():
    stream = SampleStream(Numbers(50), seed=3)
    epochs = [ids(stream.next(50)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(SampleStream(Numbers(50), seed=3).next(150)) == [i for epoch in epochs for i in epoch]
    assert ids(SampleStream(Numbers(50), seed=4).next(50)) != epochs[0]


def test_without_shuffle_the_order_is_the_source():
    assert ids(SampleStream(Numbers(3), seed=3, shuffle=False).next(7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drawn", [0, 1, 9, 10, 11, 25])
def test_resume_is_exact(drawn, shuffle):
    stream = SampleStream(Numbers(10, bad=[2, 5]), seed=1, shuffle=shuffle)
    stream.next_decodable(drawn)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = SampleStream(Numbers(10, bad=[2, 5]), seed=1, shuffle=shuffle)
    resumed.next(4)
    resumed.load_state_dict(state)
    assert resumed.num_undecodable == stream.num_undecodable
    assert ids(resumed.next_decodable(31)) == ids(stream.next_decodable(31))
    assert resumed.state_dict() == stream.state_dict()


@pytest.mark.parametrize("other", [{"seed": 2}, {"shuffle": False}, {"source": Numbers(11)}])
def test_a_state_of_another_run_is_refused(other):
    state = SampleStream(Numbers(10), seed=1).state_dict()
    options = {"source": Numbers(10), "seed": 1, "shuffle": True, **other}
    with pytest.raises(DatasetError, match="the data set or the seed changed"):
        SampleStream(options.pop("source"), **options).load_state_dict(state)


@pytest.mark.parametrize("damage", [{"position": 10}, {"position": -1}, {"epoch": -1}])
def test_a_damaged_state_is_refused(damage):
    stream = SampleStream(Numbers(10), seed=1)
    with pytest.raises(DatasetError, match="damaged"):
        stream.load_state_dict({**stream.state_dict(), **damage})


def test_huge_sources_are_drawn_in_order_from_a_place_by_seed():
    size = 2**31
    assert size > MAX_PERMUTED
    first = ids(SampleStream(Numbers(size), seed=1).next(5))
    assert first == list(range(first[0], first[0] + 5))
    assert ids(SampleStream(Numbers(size), seed=2).next(1)) != first[:1]
    assert ids(SampleStream(Numbers(size), seed=2, shuffle=False).next(2)) == [0, 1]
    stream = SampleStream(Numbers(size), seed=1)
    stream.load_state_dict({**stream.state_dict(), "position": size - 1})
    wrapped = ids(stream.next(2))
    assert wrapped == [(first[0] - 1) % size, first[0]]


def test_bad_images_are_skipped_counted_and_logged_once(caplog):
    caplog.set_level(logging.WARNING)
    source = Numbers(6, bad=[1, 4])
    stream = SampleStream(source, seed=0, shuffle=False)
    assert ids(stream.next_decodable(9)) == [0, 2, 3, 5, 0, 2, 3, 5, 0]
    assert stream.num_undecodable == 2
    assert [r.args[0] for r in caplog.records] == ["1", "4"]


def test_an_image_is_decoded_once():
    source = Numbers(4)
    (sample,) = SampleStream(source, seed=0).next_decodable(1)
    assert sample.load_image() is sample.load_image()
    assert source.num_decoded == 1


def test_an_epoch_without_a_good_image_is_an_error():
    with pytest.raises(DatasetError, match="no training image decodes"):
        SampleStream(Numbers(5, bad=range(5)), seed=0).next_decodable(1)
    assert ids(SampleStream(Numbers(5, bad=range(4)), seed=0).next_decodable(3)) == [4, 4, 4]


def test_other_errors_are_not_swallowed():
    class Failing(Numbers):
        def __getitem__(self, index):
            return Sample("0", lambda: 1 / 0, "A.", "What?")

    with pytest.raises(ZeroDivisionError):
        SampleStream(Failing(2), seed=0).next_decodable(1)


def test_an_empty_source_is_an_error():
    with pytest.raises(DatasetError, match="without samples"):
        SampleStream(Numbers(0), seed=0)
