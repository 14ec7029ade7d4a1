"""Checks after every step that a run can still learn.

A run can learn if the log-probabilities of its samples are finite, every reward gives scores, and the rewards differ
within some group. One step without any gradient can happen by chance; many in a row are a fault: sampling gives the
same completion each time, a reward fails or scores everything the same, or the policy has collapsed. The run then ends,
and the error says which of these it is. If a policy has learnt until every reward is 1, there is no fault, and its run
goes on.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence

from balcaprl.config import RewardConfig, TrainConfig
from balcaprl.rewards import ScoreStats
from balcaprl.rewards.columns import reward_of
from balcaprl.training.prospects import expected_rewards
from balcaprl.types import REWARD_NAMES, DivergedError, RewardBreakdown, Rollout, RolloutGroup, RunStoppedError

logger = logging.getLogger(__name__)

LACKING_STEPS = 3
"""Number of steps in a row with too few scores of one reward, after which the run ends."""


class NothingToLearnError(RunStoppedError):
    """The rewards are missing, or do not tell completions apart."""


class LearningWatch:
    """Checks the scored groups of every step.

    Args:
        config: the run's configuration; the section ``reward`` is used, and ``rollout.sampling`` in messages.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._steps = self._flat = 0
        self._lacking: Counter[str] = Counter()
        self._reason = ""

    def check(self, groups: Sequence[RolloutGroup], stats: ScoreStats) -> None:
        """Take the groups of one step into account.

        Raises:
            NothingToLearnError: too many steps in a row gave too few scores, or nothing to learn from.
        """
        reward = self._config.reward
        self._steps += 1
        shares = _shares(groups, reward)
        for name, share in shares.items():
            self._lacking[name] = self._lacking[name] + 1 if share < reward.required_share else 0
        is_flat = all(not r.advantage for g in groups for r in g.rollouts)
        has_reached_all = self._flat < self._steps - 1 and all(
            _values(groups, n) == {1.0} for n in expected_rewards(reward)
        )
        self._flat = self._flat + 1 if is_flat and not has_reached_all else 0
        if any(self._lacking.values()) or self._flat:
            self._reason = f"{self._lacking_words(shares, stats)}{self._flat_words(groups)}"
        if max(self._lacking.values(), default=0) >= LACKING_STEPS:
            raise NothingToLearnError(f"for {LACKING_STEPS} steps in a row too few scores were given: {self._reason}")
        if reward.max_flat_steps and self._flat >= reward.max_flat_steps:
            raise NothingToLearnError(
                f"for {self._flat} steps in a row (reward.max_flat_steps) there was nothing to learn: {self._reason}"
            )

    def finish(self) -> None:
        """Judge the run as a whole after its last step, in case it was too short for ``check`` to end it.

        If there was nothing to learn in any step, an error is logged.

        Raises:
            NothingToLearnError: a reward gave too few scores in every step.
        """
        if self._steps and self._steps in self._lacking.values():
            raise NothingToLearnError(f"in all {self._steps} steps too few scores were given: {self._reason}")
        if self._steps and self._flat == self._steps:
            logger.error("the run has learnt nothing: in all %d steps %s", self._steps, self._reason)

    def _lacking_words(self, shares: dict[str, float], stats: ScoreStats) -> str:
        lacking = [name for name in shares if self._lacking[name]]
        if not lacking:
            return ""
        named = ", ".join(f"{name} for {shares[name]:.0%}" for name in lacking)
        known = [f"{name}: {stats.reasons[name]}" for name in lacking if name in stats.reasons]
        if set(lacking) & set(REWARD_NAMES):
            known += [error for error, _ in stats.errors.most_common(1)]
        why = f" ({'; '.join(known)})" if known else ""
        return (
            f"of the captions of a step, scores came of {named}; reward.required_share is "
            f"{self._config.reward.required_share:.0%}{why}. "
        )

    def _flat_words(self, groups: Sequence[RolloutGroup]) -> str:
        if not self._flat:
            return ""
        sampling, reward = self._config.rollout.sampling, self._config.reward
        if all(len({tuple(r.completion.token_ids) for r in g.rollouts}) == 1 for g in groups):
            return (
                "all completions of each image are the same; rollout.sampling.temperature is "
                f"{sampling.temperature:g} and max_completion_tokens {sampling.max_completion_tokens}: raise them, or the "
                "policy has collapsed"
            )
        flat = []
        for name in expected_rewards(reward):
            finite = sorted(value for value in _values(groups, name) if math.isfinite(value))
            if finite:
                span = f"{finite[0]:.3g}" if finite[0] == finite[-1] else f"{finite[0]:.3g} to {finite[-1]:.3g}"
                flat.append(f"{name} ({span})")
        return f"no reward tells the completions of an image apart: {', '.join(flat) or 'there are no scores'}"


def refuse_unfinite_samples(groups: Sequence[RolloutGroup]) -> int:
    """Count the rollouts with a log-probability that is not finite.

    Raises:
        DivergedError: every rollout that has tokens has such a log-probability.
    """
    rollouts = [r for group in groups for r in group.rollouts if r.completion.token_ids]
    wrong = sum(not _is_finite(rollout) for rollout in rollouts)
    if rollouts and wrong == len(rollouts):
        raise DivergedError(
            "the log-probabilities of all that the policy samples are not finite: its weights are damaged"
        )
    return wrong


def _is_finite(rollout: Rollout) -> bool:
    return all(map(math.isfinite, rollout.completion.sampling_logprobs))


def _values(groups: Sequence[RolloutGroup], name: str) -> set[float]:
    """The distinct scores that a reward gave."""
    return {reward_of(r.breakdown or RewardBreakdown(), name) for group in groups for r in group.rollouts}


def _shares(groups: Sequence[RolloutGroup], config: RewardConfig) -> dict[str, float]:
    """Share of rollouts that have a score, for each expected reward."""
    breakdowns = [r.breakdown or RewardBreakdown() for group in groups for r in group.rollouts]
    return {
        name: sum(not math.isnan(reward_of(b, name)) for b in breakdowns) / max(1, len(breakdowns))
        for name in expected_rewards(config)
    }
