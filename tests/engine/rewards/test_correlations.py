"""Within-group correlations of the rewards."""

import math

import pytest

from balcaprl.rewards.correlations import within_group_correlations
from balcaprl.types import Completion, RewardBreakdown, Rollout, RolloutGroup


def group(*scores):
    rollouts = [Rollout(Completion([], "", [], True), RewardBreakdown(*row)) for row in scores]
    return RolloutGroup(None, rollouts)


def test_by_hand():
    rising = group((0.0, 0.2, 0.9), (0.5, 0.4, 0.5), (1.0, 0.6, 0.1))
    found = within_group_correlations([rising])
    assert found["precision_recall"] == pytest.approx(1.0)
    assert found["precision_linguistic"] == pytest.approx(-1.0)


def test_groups_are_averaged_not_pooled():
    up = group((0.0, 0.0, 0.5), (1.0, 1.0, 0.5))
    down = group((0.0, 1.0, 0.5), (1.0, 0.0, 0.5))
    found = within_group_correlations([up, up, down])
    assert found["precision_recall"] == pytest.approx(1 / 3)
    assert math.isnan(found["recall_linguistic"])


def test_missing_scores_are_left_out():
    with_gap = group((0.0, 0.0, 0.5), (math.nan, 0.5, 0.5), (1.0, 1.0, 0.5))
    assert within_group_correlations([with_gap])["precision_recall"] == pytest.approx(1.0)
    assert within_group_correlations([]) == {}
