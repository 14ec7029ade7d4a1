"""Scoring a step: whatever a judge does, every completion gets a valid breakdown or is counted as unscorable."""

import logging
import math

import pytest
import torch

from balcaprl.config import AdvantageConfig, RewardConfig
from balcaprl.kernels import grouped_advantages
from balcaprl.rewards import (
    LexicalJudge,
    advantage_inputs,
    make_judge,
    reward_matrix,
    score_groups,
    write_advantages,
)
from balcaprl.types import Completion, Prompt, RewardBreakdown, Rollout, RolloutGroup, Sample

REFERENCE = "A red cup is on a table."


def group(*texts, reference=REFERENCE):
    prompt = Prompt(Sample("s", lambda: None, reference, "?"), torch.zeros(1, dtype=torch.long), {}, None, "")
    return RolloutGroup(prompt, [Rollout(Completion([1], text, [0.0], True)) for text in texts])


class FakeJudge:
    """Answers with ``answer(caption)``; an exception is raised."""

    name = "fake"

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def score(self, sample, captions):
        self.calls.append(list(captions))
        answers = [self.answer(caption) for caption in captions]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


def good(precision=0.5, recall=0.25, linguistic=1.0):
    return RewardBreakdown(precision, recall, linguistic)


def breakdowns(groups):
    return [r.breakdown for g in groups for r in g.rollouts]


def test_breakdowns_and_lengths_are_filled_in():
    groups = [group("A red cup.", "One two three four five six"), group("x", reference="A b.")]
    judge = FakeJudge(lambda caption: good(precision=len(caption) / 100))
    stats = score_groups(judge, groups, RewardConfig())
    assert judge.calls == [["A red cup.", "One two three four five six"], ["x"]]
    assert [b.precision for b in breakdowns(groups)] == [0.1, 0.27, 0.01]
    assert [(r.length, r.reference_length) for g in groups for r in g.rollouts] == [(3, 7), (6, 7), (1, 2)]
    assert (stats.num_captions, stats.num_unscorable, stats.num_outside_bounds) == (3, 0, 1)
    assert stats.metrics() == {"num_unscorable": 0.0, "masked_fraction": pytest.approx(1 / 3)}
    assert "masked_fraction" not in score_groups(judge, groups, RewardConfig(length_rule="none")).metrics()


def test_lengths_in_tokens():
    groups = [group("ab", "")]
    config = RewardConfig(length_unit="tokens")
    score_groups(LexicalJudge(), groups, config, count_tokens=len)
    assert [(r.length, r.reference_length) for r in groups[0].rollouts] == [(2, len(REFERENCE)), (0, len(REFERENCE))]
    score_groups(LexicalJudge(), groups, config, count_tokens=lambda text: 0)
    assert groups[0].rollouts[0].reference_length == 1
    with pytest.raises(ValueError, match="count_tokens"):
        score_groups(LexicalJudge(), groups, config)


@pytest.mark.parametrize(
    "bad",
    [
        good(precision=1.01),
        good(recall=-0.1),
        good(linguistic=math.inf),
        good(precision=-math.inf),
        good(precision="many"),
        good(precision=None),
        good(precision=10**400),
        RewardBreakdown(),
        RewardBreakdown(0.5, 0.5, 0.5, error="half done"),
        None,
        0.5,
        ValueError("no answer"),
        TimeoutError(),
    ],
    ids=repr,
)
def test_one_bad_answer_spoils_one_caption(bad):
    groups = [group("fine", "bad", "also fine"), group("fine")]
    stats = score_groups(FakeJudge(lambda c: bad if c == "bad" else good()), groups, RewardConfig())
    scored = breakdowns(groups)
    assert [b.error is None for b in scored] == [True, False, True, True]
    assert all(math.isnan(r) for r in scored[1].rewards)
    assert (stats.num_captions, stats.num_unscorable) == (4, 1)
    assert list(stats.errors.values()) == [1]
    advantages = grouped_advantages(**advantage_inputs(groups[:1], RewardConfig()), group_size=3)
    assert torch.isfinite(advantages).all()
    assert advantages[1] == 0


@pytest.mark.parametrize("answers", [[], [good()] * 3, None, 5])
def test_a_wrong_number_of_answers_spoils_the_group(answers):
    class Wrong:
        name = "wrong"

        def score(self, sample, captions):
            return answers

    groups = [group("a", "b")]
    assert score_groups(Wrong(), groups, RewardConfig()).num_unscorable == 2
    assert all(math.isnan(r) for b in breakdowns(groups) for r in b.rewards)


def test_a_judge_that_only_fails_on_groups_still_scores():
    class OneByOne(FakeJudge):
        def score(self, sample, captions):
            answers = super().score(sample, captions)
            return answers if len(captions) == 1 else answers[:-1]

    groups = [group("a", "b")]
    assert score_groups(OneByOne(lambda c: good()), groups, RewardConfig()).num_unscorable == 0


def test_missing_single_scores_are_kept_and_rounding_is_clamped():
    groups = [group("a", "b")]
    answers = {"a": good(recall=math.nan), "b": good(precision=1.0 + 1e-9, recall=-1e-9)}
    stats = score_groups(FakeJudge(answers.__getitem__), groups, RewardConfig())
    assert stats.num_unscorable == 0
    assert math.isnan(groups[0].rollouts[0].breakdown.recall)
    assert groups[0].rollouts[1].breakdown.rewards == (1.0, 0.0, 1.0)


def test_interrupts_are_not_swallowed():
    def interrupt(caption):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_groups(FakeJudge(interrupt), [group("a")], RewardConfig())


def test_each_error_is_logged_once_and_never_the_caption_or_a_key(caplog):
    caplog.set_level(logging.WARNING)
    caption = "A secret cup\nis on the 'table'."
    key = "sk-abc123def456ghi789jkl"

    def fail(text):
        return RuntimeError(
            f"no JSON in answer to {text!r} ({text}) with key={key}, Bearer {key}, at https://u:p@host/x"
        )

    for _ in range(3):
        groups = [group(caption, caption)]
        stats = score_groups(FakeJudge(fail), groups, RewardConfig())
    assert stats.errors.total() == 2
    assert len(caplog.records) == 1
    for text in (caplog.text, *(b.error for b in breakdowns(groups))):
        assert "RuntimeError: no JSON in answer" in text
        assert "secret cup" not in text
        assert key not in text
        assert "u:p@" not in text


@pytest.mark.parametrize(
    ("choice", "kind", "name"),
    [
        ("auto", "scenes", "scene"),
        ("auto", "jsonl", "lexical"),
        ("lexical", "scenes", "lexical"),
        ("scene", "scenes", "scene"),
    ],
)
def test_make_judge(choice, kind, name):
    assert make_judge(RewardConfig(judge=choice), kind).name == name


def test_the_scene_judge_needs_scenes():
    with pytest.raises(ValueError, match=r"reward\.judge: scene knows drawn scenes only, data\.kind is hf"):
        make_judge(RewardConfig(judge="scene"), "hf")


def test_reward_matrix_keeps_the_order_of_groups():
    groups = [group("a", "bb"), group("ccc")]
    score_groups(FakeJudge(lambda c: good(len(c) / 10, math.nan, 0.5)), groups, RewardConfig())
    matrix = reward_matrix(groups, torch.float64)
    assert matrix.dtype == torch.float64
    assert matrix[:, 0].tolist() == [0.1, 0.2, 0.3]
    assert matrix[:, 1].isnan().all()
    assert reward_matrix([]).shape == (0, 3)
    with pytest.raises(ValueError, match="not judged"):
        reward_matrix([group("a")])


def test_advantages_of_groups_of_one_size_only():
    groups = [group("a", "bb"), group("ccc", "d")]
    score_groups(FakeJudge(lambda c: good(len(c) / 10)), groups, RewardConfig())
    write_advantages(groups, RewardConfig(), AdvantageConfig())
    of_lengths = [rollout.advantage for g in groups for rollout in g.rollouts]
    assert of_lengths[1] > 0 > of_lengths[0]
    assert of_lengths[2] > 0 > of_lengths[3]
    groups[1].rollouts.pop()
    with pytest.raises(ValueError, match=r"groups: expected groups of one size, got sizes \[1, 2\]"):
        write_advantages(groups, RewardConfig(), AdvantageConfig())
