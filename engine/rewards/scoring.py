"""Scores one step: captions are handed over as they are sampled, judged in the background if possible, and never lost.

    scorer = GroupScorer(judge, config.reward)
    handles = [scorer.open_group(sample) for sample in samples]
    for number, position, rollout in draws:     # as they come from the sampler
        handles[number].add(position, rollout)
    for group, handle in zip(groups, handles):
        scorer.submit(group, handle)            # or only scorer.submit(group), without any of the lines above
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


class GroupHandle:
    """One group that is still being sampled, as ``GroupScorer.open_group`` opens it.

    Only a background judge gets the rollouts before the group is submitted.
    """

    def __init__(self, judged: JudgeGroup | None) -> None:
        self._judged = judged
        self._positions: list[int] = []
        """The rollouts' positions in their group, in the order in which they were handed over."""

    def add(self, position: int, rollout: Rollout) -> None:
        """Hand over the rollout that will stand at ``position`` in the group; return at once."""
        if self._judged is not None:
            self._judged.add(rollout.completion.text)
            self._positions.append(position)

    def complete(self, group: RolloutGroup) -> None:
        """Hand over those rollouts of the group that were not added yet, and close the judge's group."""
        if self._judged is not None:
            for position in sorted(set(range(len(group.rollouts))) - set(self._positions)):
                self.add(position, group.rollouts[position])
            self._judged.close()

    def in_order(self, breakdowns: list[RewardBreakdown]) -> list[RewardBreakdown]:
        """Bring the judge's answers from the order in which the rollouts were handed over into that of the group."""
        by_position = dict(zip(self._positions, breakdowns, strict=True))
        return [by_position[position] for position in sorted(by_position)]


class GroupScorer:
    """Scores the groups of one step; all methods but ``finish``, which waits for the scores, return at once.

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
        self._handles: list[GroupHandle] = []
        """One handle for each of ``_groups``."""
        self._batch: JudgeBatch | None = judge.open_batch() if isinstance(judge, BackgroundJudge) else None
        self._opened: list[GroupHandle] = []
        """All handles, in the order in which the judge's batch answers."""
        self._custom = custom or CustomRewards(config.custom)
        self._pool = DaemonThread("custom-rewards") if self._custom.names else None
        self._extra: list[Future[list[dict[str, float]]]] = []

    @property
    def works_in_background(self) -> bool:
        """Whether scores are computed while the caller does something else."""
        return self._batch is not None or self._pool is not None

    def open_group(self, sample: Sample) -> GroupHandle:
        """Open a group whose rollouts can be handed over one by one, in any order."""
        handle = GroupHandle(None if self._batch is None else self._batch.open_group(sample))
        self._opened.append(handle)
        return handle

    def submit(self, group: RolloutGroup, handle: GroupHandle | None = None) -> None:
        """Hand over a sampled group, or those of its rollouts that ``handle`` lacks; ``finish`` fills in the scores."""
        sample, captions = group.prompt.sample, _captions(group)
        handle = handle or self.open_group(sample)
        handle.complete(group)
        if self._pool is not None:
            self._extra.append(self._pool.submit(partial(self._custom.score, sample, captions)))
        self._groups.append(group)
        self._handles.append(handle)

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

    def _judged(self) -> list[list[RewardBreakdown]]:
        if isinstance(self._judge, NoJudge):
            return [[RewardBreakdown() for _ in group.rollouts] for group in self._groups]
        if self._batch is None:
            return [score_safely(self._judge, group.prompt.sample, _captions(group)) for group in self._groups]
        answers = dict(zip(self._opened, self._batch.results(), strict=True))
        checked = []
        for group, handle in zip(self._groups, self._handles, strict=True):
            private = [*_captions(group), group.prompt.sample.reference]
            checked.append([validated(answer, private) for answer in handle.in_order(answers[handle])])
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
