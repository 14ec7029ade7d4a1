"""Scores one step: captions are handed over as they are sampled, judged in the background if possible, and never lost.

    scorer = GroupScorer(judge, config.reward)
    for number, rollout in draws:     # as they come from the sampler; this loop is optional
        scorer.add(number, samples[number], rollout)
    for number, group in enumerate(groups):
        scorer.submit(group, number)
    stats = scorer.finish()

A completion that cannot be scored (the judge raises, gives a wrong number of answers, or scores outside [0, 1]) gets a
breakdown that has an ``error`` and no scores. Such completions are counted, and each distinct error is logged once per
process. Captions and anything that looks like a key are removed from errors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from balcaprl.config import RewardConfig
from balcaprl.rewards.background import DaemonThread
from balcaprl.rewards.columns import reward_of
from balcaprl.rewards.custom import CustomRewards
from balcaprl.rewards.judge import (
    BackgroundJudge,
    Judge,
    JudgeBatch,
    JudgeGroup,
    NoJudge,
    ScoreStats,
    score_safely,
    validated,
)
from balcaprl.rewards.length import CountTokens, is_outside_bounds, measure_length
from balcaprl.types import RewardBreakdown, Rollout, RolloutGroup, Sample

logger = logging.getLogger(__name__)


class _Handed:
    """A group of a judge's batch, and its rollouts in the order in which they were handed over."""

    def __init__(self, judged: JudgeGroup) -> None:
        self._judged = judged
        self.rollouts: list[Rollout] = []

    def add(self, rollout: Rollout) -> None:
        """Hand over the next rollout."""
        self._judged.add(rollout.completion.text)
        self.rollouts.append(rollout)

    def complete(self, group: RolloutGroup) -> None:
        """Hand over those rollouts of the group that were not added yet, and close the group."""
        known = set(map(id, self.rollouts))
        for rollout in group.rollouts:
            if id(rollout) not in known:
                self.add(rollout)
        self._judged.close()


class GroupScorer:
    """Scores the groups of one step; ``add`` and ``submit`` return at once, and ``finish`` waits for the scores.

    Args:
        judge: the judge. A background judge gets each rollout as it comes; ``finish`` asks any other judge group by
            group.
        config: reward columns, length unit and length rule.
        count_tokens: returns a text's length in policy tokens; needed if ``reward.length_unit`` is tokens.
        custom: the custom rewards, if they are already loaded.
    """

    def __init__(
        self,
        judge: Judge,
        config: RewardConfig,
        count_tokens: CountTokens | None = None,
        custom: CustomRewards | None = None,
    ) -> None:
        self._judge, self._config, self._count_tokens = judge, config, count_tokens
        self._groups: list[RolloutGroup] = []
        self._batch: JudgeBatch | None = judge.open_batch() if isinstance(judge, BackgroundJudge) else None
        self._handed: list[_Handed] = []
        """The groups of the judge's batch, in the order in which they were opened."""
        self._unsubmitted: dict[int, _Handed] = {}
        self._custom = custom or CustomRewards(config.custom)
        self._pool = DaemonThread("custom-rewards") if self._custom.names else None
        self._extra: list[Future[list[dict[str, float]]]] = []

    @property
    def works_in_background(self) -> bool:
        """Whether scores are computed while the caller does something else."""
        return self._batch is not None or self._pool is not None

    def add(self, number: int, sample: Sample, rollout: Rollout) -> None:
        """Hand over one rollout of a group that is still being sampled; ``submit`` takes the same ``number``."""
        if self._batch is None:
            return
        if number not in self._unsubmitted:
            self._unsubmitted[number] = self._open(self._batch, sample)
        self._unsubmitted[number].add(rollout)

    def submit(self, group: RolloutGroup, number: int | None = None) -> None:
        """Hand over one sampled group, or the rest of one that was added in part; ``finish`` fills in its scores."""
        sample, captions = group.prompt.sample, _captions(group)
        if self._batch is not None:
            added = None if number is None else self._unsubmitted.pop(number, None)
            (added or self._open(self._batch, sample)).complete(group)
        if self._pool is not None:
            self._extra.append(self._pool.submit(partial(self._custom.score, sample, captions)))
        self._groups.append(group)

    def finish(self) -> ScoreStats:
        """Wait for the scores, and fill in ``breakdown``, ``length`` and ``reference_length`` of every rollout.

        Raises:
            JudgeStoppedError: the judge cannot go on.
        """
        stats = ScoreStats(num_outside_bounds=0 if self._config.length_rule == "mask" else None)
        try:
            judged = self._judged()
            extra: list[Any] = [future.result() for future in self._extra] or [None] * len(self._groups)
        finally:
            if self._pool is not None:
                self._pool.close()
        for group, breakdowns, columns in zip(self._groups, judged, extra, strict=True):
            if columns is not None:
                breakdowns = [
                    replace(b, extra={**b.extra, **more}) for b, more in zip(breakdowns, columns, strict=True)
                ]
            self._fill_in(group, breakdowns, stats)
        for error in stats.errors:
            _log_once(self._judge.name, error)
        stats.reasons = dict(self._custom.reasons)
        take_metrics: Any = getattr(self._judge, "take_metrics", None)
        stats.judge_metrics = {**(take_metrics() if callable(take_metrics) else {}), **self._custom.take_metrics()}
        return stats

    def _open(self, batch: JudgeBatch, sample: Sample) -> _Handed:
        self._handed.append(_Handed(batch.open_group(sample)))
        return self._handed[-1]

    def _judged(self) -> list[list[RewardBreakdown]]:
        if isinstance(self._judge, NoJudge):
            return [[RewardBreakdown() for _ in group.rollouts] for group in self._groups]
        if self._batch is None:
            return [score_safely(self._judge, group.prompt.sample, _captions(group)) for group in self._groups]
        answers: dict[int, RewardBreakdown] = {}
        for handed, breakdowns in zip(self._handed, self._batch.results(), strict=True):
            answers |= zip(map(id, handed.rollouts), breakdowns, strict=True)
        checked = []
        for group in self._groups:
            private = [*_captions(group), group.prompt.sample.reference]
            checked.append([validated(answers[id(rollout)], private) for rollout in group.rollouts])
        return checked

    def _fill_in(self, group: RolloutGroup, breakdowns: list[RewardBreakdown], stats: ScoreStats) -> None:
        config = self._config
        # At least 1, because the length ratio divides by it: a tokenizer may map a reference to no tokens.
        reference_length = max(1.0, measure_length(group.prompt.sample.reference, config, self._count_tokens))
        for rollout, breakdown in zip(group.rollouts, breakdowns, strict=True):
            rollout.breakdown = breakdown
            rollout.length = measure_length(rollout.completion.text, config, self._count_tokens)
            rollout.reference_length = reference_length
            stats.num_captions += 1
            if stats.num_outside_bounds is not None:
                stats.num_outside_bounds += is_outside_bounds(rollout.length, reference_length, config)
            stats.num_unscorable += all(math.isnan(reward_of(breakdown, name)) for name in config.names)
            if breakdown.error is not None:
                stats.errors[breakdown.error] += 1


def score_groups(
    judge: Judge, groups: Sequence[RolloutGroup], config: RewardConfig, count_tokens: CountTokens | None = None
) -> ScoreStats:
    """Score ``groups``: fill in ``breakdown``, ``length`` and ``reference_length`` of every rollout."""
    scorer = GroupScorer(judge, config, count_tokens)
    for group in groups:
        scorer.submit(group)
    return scorer.finish()


def _captions(group: RolloutGroup) -> list[str]:
    return [rollout.completion.text for rollout in group.rollouts]


@lru_cache(maxsize=1024)
def _log_once(judge_name: str, error: str) -> None:
    logger.warning("the %s judge left captions unscored: %s (further cases are only counted)", judge_name, error)
