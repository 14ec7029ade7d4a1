"""Within-group correlations of the rewards, which show whether the rewards measure different things."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from balcaprl.reporting.metrics import nanmean
from balcaprl.rewards.columns import reward_of
from balcaprl.types import REWARD_NAMES, RewardBreakdown, RolloutGroup


def within_group_correlations(groups: Sequence[RolloutGroup], names: Sequence[str] = REWARD_NAMES) -> dict[str, float]:
    """Return for each pair of rewards the correlation over a group's rollouts, averaged over groups.

    Correlations near 1 mean that the rewards are one signal, and that balancing them changes nothing. Rewards are taken
    as judged, before any length rule. A group counts for a pair only if both rewards vary within the group.

    Returns:
        ``precision_recall``, ``precision_linguistic``, ... for each pair of ``names``; NaN for a pair without such a
        group.
    """
    correlations: dict[str, list[float]] = {}
    for group in groups:
        breakdowns = [rollout.breakdown or RewardBreakdown() for rollout in group.rollouts]
        scores = np.array([[reward_of(breakdown, name) for name in names] for breakdown in breakdowns], float)
        for a, b in itertools.combinations(range(len(names)), 2):
            values = correlations.setdefault(f"{names[a]}_{names[b]}", [])
            pair = scores[np.isfinite(scores[:, [a, b]]).all(axis=1)][:, [a, b]] if len(scores) else scores
            if len(pair) > 1 and pair[:, 0].std() > 0 and pair[:, 1].std() > 0:
                values.append(float(np.corrcoef(pair[:, 0], pair[:, 1])[0, 1]))
    return {pair: nanmean(values) for pair, values in correlations.items()}
