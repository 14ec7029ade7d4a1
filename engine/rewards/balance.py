"""Do the three rewards say different things? Within-group correlations, from rollouts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from balcaprl.metrics import nanmean
from balcaprl.types import REWARD_NAMES, RewardBreakdown, RolloutGroup


def within_group_correlations(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Mean over groups of the correlation of each pair of rewards over a group's rollouts.

    Correlations near 1 mean that the rewards are one signal, and that balancing them changes nothing. Rewards are taken as
    judged, before any length rule. A group counts for a pair if both rewards vary in it.

    Returns:
        ``precision_recall``, ``precision_linguistic`` and ``recall_linguistic``; NaN where no group counts.
    """
    correlations: dict[str, list[float]] = {}
    for group in groups:
        scores = np.array([(rollout.breakdown or RewardBreakdown()).rewards for rollout in group.rollouts], float)
        scores = scores[np.isfinite(scores).all(axis=1)]
        for a, b in itertools.combinations(range(len(REWARD_NAMES)), 2):
            values = correlations.setdefault(f"{REWARD_NAMES[a]}_{REWARD_NAMES[b]}", [])
            if len(scores) > 1 and scores[:, a].std() > 0 and scores[:, b].std() > 0:
                values.append(float(np.corrcoef(scores[:, a], scores[:, b])[0, 1]))
    return {pair: nanmean(values) for pair, values in correlations.items()}
