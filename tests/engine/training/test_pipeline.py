"""Completions reach the judge as they finish; with staleness a step is sampled while the last one is learnt from."""

import threading

import pytest
import torch

from balcaprl.config import RolloutConfig, SamplingConfig, TrainConfig
from balcaprl.reporting.metrics import PhaseTimer
from balcaprl.rollout.sampler import Draw
from balcaprl.training.pipeline import RolloutPipeline
from balcaprl.types import Completion, Prompt, Rollout, Sample


class CountingPrompts:
    """Prompts named by their place; remembers how many steps were used."""

    def __init__(self):
        self.drawn, self.used = 0, 0

    def next(self, count):
        self.drawn += 1
        return [Prompt(Sample(f"{self.drawn}-{i}", None, "r", "i"), torch.zeros(1), {}, None, "") for i in range(count)]

    def use(self):
        self.used += 1

    def close(self):
        pass


class RecordingScorer:
    """Notes what it was given, and when it was."""

    def __init__(self, events):
        self.events = events

    def open_group(self, sample):
        return RecordingHandle(sample.sample_id, self.events)

    def submit(self, group, handle):
        self.events.append(f"whole {handle.sample_id} {group.prompt.sample.sample_id}")


class RecordingHandle:
    def __init__(self, sample_id, events):
        self.sample_id, self.events = sample_id, events

    def add(self, position, rollout):
        assert rollout.completion.text == f"text {position}"
        self.events.append(f"judge {self.sample_id}: {rollout.completion.text}")


class BackwardsSampler:
    """Finishes the last prompt first; waits for ``go`` before each step."""

    name = "backwards"

    def __init__(self, events):
        self.events, self.go, self.policy_version = events, threading.Semaphore(100), 0
        self.fail = False

    def stream(self, prompts, group_size, sampling, *, seed, greedy=False):
        self.go.acquire()
        for index in reversed(range(len(prompts))):
            self.events.append(f"sampled {prompts[index].sample.sample_id}")
            if self.fail:
                raise RuntimeError("engine died")
            for position in reversed(range(group_size)):
                yield Draw(index, position, Rollout(Completion([seed], f"text {position}", [0.0], True)))


def make(staleness, group_size=1):
    events = []
    sampler, prompts = BackwardsSampler(events), CountingPrompts()
    pipeline = RolloutPipeline(
        RolloutConfig(prompts_per_step=2, group_size=group_size, max_staleness=staleness, sampling=SamplingConfig()),
        sampler,
        prompts,
        make_scorer=lambda: RecordingScorer(events),
        step_seed=lambda step: 100 + step,
        timer=PhaseTimer(),
    )
    return pipeline, sampler, prompts, events


def test_completions_are_judged_as_they_finish_and_returned_in_order():
    pipeline, _, prompts, events = make(0, group_size=2)
    sampled = pipeline.take(0)
    second = ["sampled 1-1", "judge 1-1: text 1", "judge 1-1: text 0"]
    first = ["sampled 1-0", "judge 1-0: text 1", "judge 1-0: text 0"]
    assert events == [*second, *first, "whole 1-0 1-0", "whole 1-1 1-1"]
    assert [g.prompt.sample.sample_id for g in sampled.groups] == ["1-0", "1-1"]
    assert [r.completion.text for g in sampled.groups for r in g.rollouts] == ["text 0", "text 1"] * 2
    assert sampled.seconds > 0
    pipeline.start(1)  # on-policy: nothing happens
    pipeline.settle()
    assert (prompts.drawn, prompts.used) == (1, 1)
    pipeline.close()


def test_with_staleness_the_next_step_is_sampled_meanwhile():
    pipeline, sampler, prompts, events = make(1)
    first = pipeline.take(0)
    sampler.go = threading.Semaphore(0)
    pipeline.start(1)
    assert (prompts.drawn, prompts.used) == (2, 1), "a checkpoint now must draw the second step again"
    assert len(events) == 6
    sampler.go.release()
    pipeline.settle()
    sampler.policy_version = 1  # the sync
    second = pipeline.take(1)
    assert [g.policy_version for g in (*first.groups, *second.groups)] == [0, 0, 0, 0]
    assert second.groups[0].rollouts[0].completion.token_ids == [101]
    assert (prompts.drawn, prompts.used) == (2, 2)
    pipeline.close()


def test_a_failure_in_the_thread_is_raised_where_its_groups_are_wanted():
    pipeline, sampler, _, _ = make(1)
    pipeline.take(0)
    sampler.fail = True
    pipeline.start(1)
    pipeline.settle()
    with pytest.raises(RuntimeError, match="engine died"):
        pipeline.take(1)
    pipeline.close()


def test_staleness_needs_its_correction_and_weights_apart():
    with pytest.raises(ValueError, match=r"needs loss\.sampling_ratio_cap"):
        TrainConfig.model_validate({"rollout": {"max_staleness": 1}})
    with pytest.raises(ValueError, match="weights of its own"):
        TrainConfig.model_validate(
            {"rollout": {"max_staleness": 1, "sampler": "hf"}, "loss": {"sampling_ratio_cap": 2}}
        )
