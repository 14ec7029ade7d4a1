"""The three length rules."""

import math

import pytest
import torch

from balcaprl.config import RewardConfig
from balcaprl.kernels import grouped_advantages
from balcaprl.rewards.columns import advantage_inputs
from balcaprl.rewards.length import is_outside_bounds, length_vectors, linear_factor, measure_length
from balcaprl.types import Completion, Prompt, RewardBreakdown, Rollout, RolloutGroup, Sample

LENGTHS = [4.0, 5.0, 10.0, 20.0, 21.0, 0.0]  # of a reference of 10
LINGUISTIC = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


def scored_group():
    prompt = Prompt(Sample("s", lambda: None, "r", "?"), torch.zeros(1, dtype=torch.long), {}, None, "")
    rollouts = [
        Rollout(Completion([1], "", [0.0], True), RewardBreakdown(0.1 * i, 0.5, linguistic), length, 10.0)
        for i, (length, linguistic) in enumerate(zip(LENGTHS, LINGUISTIC, strict=True))
    ]
    return RolloutGroup(prompt, rollouts)


def advantages(rewards):
    """Straight from the definition of c-GDPO, in float64."""
    rewards = rewards.double()
    return ((rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4)).sum(1).float()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", LINGUISTIC),
        ("mask", [0.0, 0.8, 0.7, 0.6, 0.0, 0.0]),
        ("linear", [0.9 * 0.4, 0.8 * 0.5, 0.7, 0.0, 0.0, 0.0]),
    ],
)
def test_rules_by_hand(rule, expected):
    inputs = advantage_inputs([scored_group()], RewardConfig(length_rule=rule))
    rewards = torch.tensor([[0.1 * i, 0.5, value] for i, value in enumerate(expected)])
    actual = grouped_advantages(**inputs, group_size=len(LENGTHS))
    torch.testing.assert_close(actual, advantages(rewards), rtol=1e-5, atol=1e-5)


def test_bounds_come_from_the_config_and_include_their_ends():
    config = RewardConfig(tau_low=0.4, tau_high=2.1)
    assert advantage_inputs([scored_group()], config)["length_bounds"] == (0.4, 2.1)
    outside = [is_outside_bounds(length, 10.0, config) for length in LENGTHS]
    assert outside == [False] * 5 + [True]
    assert [is_outside_bounds(length, 10.0, RewardConfig()) for length in LENGTHS] == [True] + [False] * 3 + [True] * 2


def test_rules_do_not_change_the_breakdowns_and_keep_missing_scores():
    group = scored_group()
    group.rollouts[0].breakdown = RewardBreakdown(0.5, 0.5, math.nan)
    rewards = advantage_inputs([group], RewardConfig(length_rule="linear"))["rewards"]
    assert rewards[0, 2].isnan()
    assert [r.breakdown.linguistic for r in group.rollouts[1:]] == LINGUISTIC[1:]


def test_linear_factor_is_one_at_the_reference_and_zero_from_twice_on():
    factor = linear_factor(torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 90.0]), torch.full((6,), 10.0))
    torch.testing.assert_close(factor, torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0, 0.0]))


def test_lengths():
    assert measure_length(" two\nwords ", RewardConfig()) == 2
    assert measure_length("", RewardConfig()) == 0
    assert measure_length("abc", RewardConfig(length_unit="tokens"), len) == 3
    lengths, reference_lengths = length_vectors([scored_group()])
    assert lengths.tolist() == LENGTHS
    assert reference_lengths.tolist() == [10.0] * 6
    assert length_vectors([])[0].shape == (0,)
