"""Prompts drawn ahead: the same ones, whatever the thread does, and a state that knows only what was used."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from balcaprl.config import SamplingConfig
from balcaprl.data import DatasetError, SampleStream
from balcaprl.prompts import PromptStream, room_for_prompt
from balcaprl.types import Prompt, Sample


class Numbers:
    """Samples 0 .. n-1; some have no decodable image."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return Sample(str(index), lambda: index, "reference", "instruction")


def prepare(sample):
    number = int(sample.sample_id)
    if number % 7 == 3:
        raise ValueError("absolute aspect ratio must be smaller than 200")
    return Prompt(sample, torch.zeros(10 + 90 * (number % 11 == 5), dtype=torch.long), {}, None, "")


def make(ahead, count=40):
    samples = SampleStream(Numbers(count), seed=0)
    return PromptStream(samples, prepare, max_prompt_tokens=50, ahead=ahead)


def ids(prompts):
    return [prompt.sample.sample_id for prompt in prompts]


def test_the_thread_changes_nothing():
    steps = []
    for ahead in (False, True):
        stream = make(ahead)
        drawn = []
        for _ in range(12):
            drawn.append((ids(stream.next(4)), stream.use(), stream.state_dict(), stream.num_skipped))
        steps.append(drawn)
        stream.close()
    assert steps[0] == steps[1]
    assert steps[0][-1][-1] > 0
    assert all(int(i) % 7 != 3 and int(i) % 11 != 5 for names, *_ in steps[0] for i in names)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_state_goes_on_after_the_last_step_that_was_used(ahead):
    stream = make(ahead)
    for _ in range(2):
        stream.next(3)
        stream.use()
    state, skipped = stream.state_dict(), stream.num_skipped
    expected = ids(stream.next(3))  # drawn, but not used
    stream.next(3)
    assert stream.state_dict() == state
    resumed = make(ahead)
    resumed.load_state_dict(state)
    assert resumed.num_skipped == skipped
    assert ids(resumed.next(3)) == expected
    stream.load_state_dict(state)
    assert ids(stream.next(3)) == expected
    stream.close()
    resumed.close()


def test_another_number_of_prompts_loses_none():
    stream, plain = make(True), make(False)
    assert ids(stream.next(4)) == ids(plain.next(4))
    assert ids(stream.next(2)) == ids(plain.next(2))
    assert ids(stream.next(4)) == ids(plain.next(4))
    stream.close()


def test_what_is_skipped_is_said(caplog):
    stream = make(False)
    with caplog.at_level(logging.WARNING):
        stream.next(30)
    stream.use()
    assert stream.num_skipped == len(caplog.messages)
    assert any("cannot be preprocessed: ValueError: absolute aspect ratio" in m for m in caplog.messages)
    assert any("prompt has 100 tokens, and 50 leave room" in m for m in caplog.messages)


def test_no_usable_prompt_at_all_is_an_error():
    def refuse(sample):
        raise RuntimeError("no such processor")

    stream = PromptStream(SampleStream(Numbers(5), seed=0), refuse)
    with pytest.raises(DatasetError, match=r"no usable prompt in 1000 samples; the last: .*no such processor"):
        stream.next(2)
    stream.close()


def test_room_for_a_prompt():
    sampling = SamplingConfig(max_completion_tokens=100)
    text = SimpleNamespace(max_position_embeddings=512)
    assert room_for_prompt(SimpleNamespace(get_text_config=lambda: text), sampling) == 412
    assert room_for_prompt(SimpleNamespace(get_text_config=SimpleNamespace), sampling) is None


def test_the_thread_has_no_team_of_its_own():
    """More OpenMP threads than cores make every operation of the process slow."""
    script = """
import os, torch
from balcaprl.prompts import _single_threaded_pool
work = lambda: torch.ones(1 << 20) * 2
torch.set_num_threads(2)
work()
before = len(os.listdir("/proc/self/task"))
pool = _single_threaded_pool()
pool.submit(work).result()
assert torch.get_num_threads() == 2
assert len(os.listdir("/proc/self/task")) == before + 1, "the pool's one thread"
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted by Linux's /proc")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
