"""Prompts drawn ahead: the same ones, whatever the thread does, and a state that knows only what was used."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from balcaprl.config import SamplingConfig
from balcaprl.data import DatasetError, ImageError, SampleStream
from balcaprl.rollout.prompts import PromptMaker, PromptStream, held_out_prompts, room_for_prompt
from balcaprl.types import Prompt, PromptError, Sample


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
    return PromptStream(samples, PromptMaker(prepare, 50), ahead=ahead)


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


def test_a_sample_is_warned_of_and_counted_once_not_once_per_draw(caplog):
    stream = make(False, count=12)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):  # several epochs
            stream.next(8)
            stream.use()
    assert stream.num_skipped == len(caplog.messages) == len(set(caplog.messages)) == 3  # 3 and 10; 5
    resumed = make(False, count=12)
    resumed.load_state_dict(stream.state_dict())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resumed.next(16)
        resumed.use()
    assert (resumed.num_skipped, caplog.messages) == (3, [])
    resumed.load_state_dict({**stream.state_dict(), "skipped_prompts": 40})  # as older checkpoints have it


def test_after_some_warnings_the_rest_is_only_counted(caplog):
    def refuse(sample):
        if int(sample.sample_id) < 100:
            raise PromptError("its instruction is bad\x1b[2J" + "x" * 10_000)
        return Prompt(sample, torch.zeros(1, dtype=torch.long), {}, None, "")

    stream = PromptStream(SampleStream(Numbers(101), seed=0), PromptMaker(refuse), ahead=False)
    with caplog.at_level(logging.WARNING):
        stream.next(2)
    stream.use()
    assert stream.num_skipped == 100
    assert len(caplog.messages) == 20
    assert caplog.messages[-1].endswith("(further cases are only counted)")
    assert all(m.isprintable() and len(m) < 400 for m in caplog.messages)


class Images(Numbers):
    """Samples of which every fifth does not decode."""

    def __getitem__(self, index):
        def load():
            if index % 5 == 1:
                raise ImageError(f"{index} is broken")
            return index

        return Sample(str(index), load, "reference", "instruction")


def test_evaluation_leaves_out_what_training_would(caplog):
    dataset = SimpleNamespace(evaluation=Images(12))
    held_out = held_out_prompts(dataset, PromptMaker(prepare, 50))
    assert ids(held_out.prompts) == ["0", "2", "4", "7", "8", "9"]  # not 1, 6, 11; 3, 10; 5
    assert held_out.num_excluded == 6
    (message,) = caplog.messages
    assert message.startswith(
        "6 of 12 held-out samples cannot be used: 1: 1 is broken; 3: its image cannot be preprocessed"
    )


def test_held_out_samples_of_which_none_can_be_used_are_an_error():
    with pytest.raises(DatasetError, match=r"4 of 4 held-out .* prompt has 10 tokens, and 5 leave .*num_eval"):
        held_out_prompts(SimpleNamespace(evaluation=Images(1 + 3)), PromptMaker(prepare, 5))
    assert held_out_prompts(SimpleNamespace(evaluation=Images(0)), PromptMaker(prepare)).prompts == []


def test_no_usable_prompt_at_all_is_an_error():
    def refuse(sample):
        raise RuntimeError("no such processor")

    stream = PromptStream(SampleStream(Numbers(5), seed=0), PromptMaker(refuse))
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
from balcaprl.rollout.prompts import _single_threaded_pool
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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
