"""Builds the reward matrix that advantages are computed from: K columns, conditions, length rules.

The first three columns are those of ``REWARD_NAMES``; ``reward.custom`` adds more. A *condition*, as in GDPO, lets a
reward count only where another reward, as judged, reaches a threshold. The first reward becomes 0 where the other one
is below the threshold, and missing where the other one is missing. Conditions come before the length rule, and both
come before any normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balcaprl.config import AdvantageConfig, RewardConfig
from balcaprl.kernels import grouped_advantages
from balcaprl.rewards.length import length_vectors, linear_factor
from balcaprl.types import REWARD_NAMES, RewardBreakdown, RolloutGroup

LINGUISTIC = REWARD_NAMES.index("linguistic")


def reward_matrix(
    groups: Sequence[RolloutGroup], dtype: torch.dtype = torch.float32, names: Sequence[str] = REWARD_NAMES
) -> Tensor:
    """Return (R, K): the rewards of all rollouts as judged, group after group, with one column per name in ``names``.

    NaN marks a missing score.

    Raises:
        ValueError: a rollout was not judged.
    """
    rows = []
    for group in groups:
        for rollout in group.rollouts:
            if rollout.breakdown is None:
                raise ValueError(f"{group.prompt.sample.sample_id}: a rollout was not judged; call score_groups first")
            rows.append([reward_of(rollout.breakdown, name) for name in names])
    return torch.tensor(rows, dtype=dtype).reshape(-1, len(names))


def reward_of(breakdown: RewardBreakdown, name: str) -> float:
    """Return one reward by its name; NaN if there is no score."""
    return float(getattr(breakdown, name) if name in REWARD_NAMES else breakdown.extra.get(name, math.nan))


def apply_conditions(rewards: Tensor, config: RewardConfig) -> Tensor:
    """(R, K) -> (R, K): test each condition on the rewards as judged, so that the conditions' order does not matter."""
    result = rewards.clone()
    for condition in config.conditions:
        looked_at = rewards[:, config.names.index(condition.on)]
        column = result[:, config.names.index(condition.reward)]
        column[looked_at < condition.at_least] = 0.0
        column[looked_at.isnan()] = math.nan
        column[rewards[:, config.names.index(condition.reward)].isnan()] = math.nan
    return result


def advantage_inputs(groups: Sequence[RolloutGroup], config: RewardConfig) -> dict[str, Any]:
    """Return the arguments of ``balcaprl.kernels.grouped_advantages`` that carry the rewards and the length rule.

    Returns:
        ``rewards`` (R, K) float32, and for the ``mask`` rule also ``lengths``, ``reference_lengths``, ``masked_reward``
        and ``length_bounds``; the mask of custom rewards is already applied in ``rewards``.
    """
    rewards = apply_conditions(reward_matrix(groups, names=config.names), config)
    lengths, reference_lengths = length_vectors(groups)
    custom = [len(REWARD_NAMES) + i for i, custom in enumerate(config.custom) if custom.mask]
    if config.length_rule == "mask":
        ratio = lengths.double() / reference_lengths.double()
        outside = (ratio < config.tau_low) | (ratio > config.tau_high)
        for column in custom:
            rewards[outside & ~rewards[:, column].isnan(), column] = 0.0
        return {
            "rewards": rewards,
            "lengths": lengths,
            "reference_lengths": reference_lengths,
            "masked_reward": LINGUISTIC,
            "length_bounds": (config.tau_low, config.tau_high),
        }
    if config.length_rule == "linear":
        for column in (LINGUISTIC, *custom):
            rewards[:, column] *= linear_factor(lengths, reference_lengths)
    return {"rewards": rewards}


def write_advantages(groups: Sequence[RolloutGroup], reward: RewardConfig, settings: AdvantageConfig) -> None:
    """Compute the advantages of all rollouts and store each in its rollout; all groups must have the same size.

    Raises:
        ValueError: the groups differ in size.
    """
    sizes = sorted({len(group.rollouts) for group in groups})
    if len(sizes) != 1:
        raise ValueError(f"groups: expected groups of one size, got sizes {sizes}")
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    advantages = grouped_advantages(
        **advantage_inputs(groups, reward),
        group_size=sizes[0],
        weights=reward.weights,
        method=settings.method,
        eps=settings.eps,
    )
    for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
        rollout.advantage = advantage
