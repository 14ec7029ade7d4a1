"""What a judge is, which one a run uses, and how a step is scored without ever failing on one completion."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from balcaprl.config import RewardConfig
from balcaprl.rewards.length import CountTokens, is_outside_bounds, measure_length
from balcaprl.types import REWARD_NAMES, RewardBreakdown, RolloutGroup, Sample

logger = logging.getLogger(__name__)

_ROUNDING = 1e-6  # a mean of exact ones may exceed 1 by this
_MAX_ERROR_CHARS = 300
_MIN_PRIVATE_CHARS = 4  # replacing "A." everywhere would only garble the error


class Judge(Protocol):
    """Scores captions of one image."""

    name: str

    def score(self, sample: Sample, captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown per caption, in their order; rewards in [0, 1], NaN where there is no score.

        A judge that may fail on one caption answers ``RewardBreakdown(error=...)`` for it. One that raises, or returns
        another number of answers, is asked again caption by caption, to save the scores of the others.
        """
        ...


@dataclass
class ScoreStats:
    """What one call of ``score_groups`` did."""

    num_captions: int = 0
    num_unscorable: int = 0
    """Captions without any score; they take no part in the update."""
    num_outside_bounds: int | None = None
    """Captions whose linguistic reward the length mask takes; None under another length rule."""
    errors: Counter[str] = field(default_factory=Counter)
    """Why there were no scores, counted."""

    def metrics(self) -> dict[str, float]:
        """For the log: ``num_unscorable``, and under the length mask ``masked_fraction``."""
        metrics = {"num_unscorable": float(self.num_unscorable)}
        if self.num_outside_bounds is not None and self.num_captions:
            metrics["masked_fraction"] = self.num_outside_bounds / self.num_captions
        return metrics


def make_judge(config: RewardConfig, data_kind: str) -> Judge:
    """The judge that ``reward.judge`` names; ``auto``: exact for drawn scenes, else word overlap with the reference.

    Raises:
        ValueError: the scene judge is asked for, and the data are no drawn scenes.
    """
    scenes = data_kind == "scenes"
    if config.judge == "scene" and not scenes:
        raise ValueError(
            f"reward.judge: scene knows drawn scenes only, data.kind is {data_kind}; set it to auto or lexical"
        )
    if config.judge == "scene" or (config.judge == "auto" and scenes):
        from balcaprl.rewards.scene_judge import SceneJudge

        return SceneJudge()
    from balcaprl.rewards.lexical_judge import LexicalJudge

    return LexicalJudge()


def score_groups(
    judge: Judge, groups: Sequence[RolloutGroup], config: RewardConfig, count_tokens: CountTokens | None = None
) -> ScoreStats:
    """Fill in ``breakdown``, ``length`` and ``reference_length`` of every rollout.

    A completion that cannot be scored (the judge raises, gives a wrong number of answers, or scores outside [0, 1])
    gets a breakdown without scores and with an ``error``; it is counted, and each distinct error is logged once per
    process. Errors are kept without captions and without what looks like a key.

    Args:
        judge: asked once per group.
        groups: changed in place.
        config: length unit and length rule.
        count_tokens: length of a text in policy tokens, needed where ``reward.length_unit`` is tokens.
    """
    stats = ScoreStats(num_outside_bounds=0 if config.length_rule == "mask" else None)
    for group in groups:
        sample = group.prompt.sample
        captions = [rollout.completion.text for rollout in group.rollouts]
        breakdowns = _score_safely(judge, sample, captions)
        # at least 1, as a ratio needs it: a tokenizer may map a reference to nothing
        reference_length = max(1.0, measure_length(sample.reference, config, count_tokens))
        for rollout, breakdown in zip(group.rollouts, breakdowns, strict=True):
            rollout.breakdown = breakdown
            rollout.length = measure_length(rollout.completion.text, config, count_tokens)
            rollout.reference_length = reference_length
            _count(stats, breakdown, is_outside_bounds(rollout.length, reference_length, config))
    for error in stats.errors:
        _log_once(judge.name, error)
    return stats


def _count(stats: ScoreStats, breakdown: RewardBreakdown, outside_bounds: bool) -> None:
    stats.num_captions += 1
    if stats.num_outside_bounds is not None:
        stats.num_outside_bounds += outside_bounds
    if breakdown.error is not None:
        stats.num_unscorable += 1
        stats.errors[breakdown.error] += 1


def _score_safely(judge: Judge, sample: Sample, captions: list[str]) -> list[RewardBreakdown]:
    """One valid breakdown per caption, whatever the judge does."""
    if not captions:
        return []
    try:
        answers = list(judge.score(sample, captions))
        if len(answers) != len(captions):
            raise ValueError(f"the judge gave {len(answers)} answers for {len(captions)} captions")
    except Exception as error:  # a judge is foreign code; no error of one may end a run
        if len(captions) > 1:
            return [_score_safely(judge, sample, [caption])[0] for caption in captions]
        text = f"{type(error).__name__}: {error}"
        return [RewardBreakdown(error=redact(text, [*captions, sample.reference]))]
    return [_validated(answer, [caption, sample.reference]) for answer, caption in zip(answers, captions, strict=True)]


def _validated(answer: object, private: Sequence[str]) -> RewardBreakdown:
    """The answer, or a breakdown without scores that says what is wrong with it."""
    if not isinstance(answer, RewardBreakdown):
        return RewardBreakdown(error=f"the judge answered {type(answer).__name__}, expected RewardBreakdown")
    if answer.error is not None:
        return RewardBreakdown(error=redact(str(answer.error), private))
    rewards = {name: _as_number(reward) for name, reward in zip(REWARD_NAMES, answer.rewards, strict=True)}
    for name, reward in rewards.items():
        if reward is None:
            return RewardBreakdown(error=f"{name} is {type(getattr(answer, name)).__name__}, expected a number")
        if not math.isnan(reward) and not -_ROUNDING <= reward <= 1.0 + _ROUNDING:
            return RewardBreakdown(error=f"{name} is outside [0, 1]")
    if all(math.isnan(reward) for reward in rewards.values() if reward is not None):
        return RewardBreakdown(error="the judge gave no score and no reason")
    clamped: dict[str, Any] = {name: _clamped(reward) for name, reward in rewards.items() if reward is not None}
    return replace(answer, **clamped)


def _as_number(reward: object) -> float | None:
    try:
        return float(reward)  # type: ignore[arg-type]  # what a foreign judge gave
    except (TypeError, ValueError, OverflowError):
        return None


def _clamped(reward: float) -> float:
    return reward if math.isnan(reward) else min(1.0, max(0.0, reward))


_SECRETS = (
    re.compile(r"(?i)\b(bearer|basic)\s+\S+"),
    re.compile(r"(?i)\b(api[-_ ]?key|key|token|password|secret|authorization)\b(\s*[=:]\s*|['\"]\s*:\s*)\S+"),
    re.compile(r"//[^/\s@]+@"),  # user and password of a URL
    re.compile(r"\b(?=[\w-]*\d)[\w-]{20,}\b"),  # long and with digits: a key, if not a harmless id
)
_LONG_QUOTE = re.compile(r"'[^']{20,}'|\"[^\"]{20,}\"")


def redact(text: str, private: Sequence[str]) -> str:
    """The error text on one short line, without the ``private`` texts, long quotations, and what looks like a key."""
    for secret in private:
        for form in (secret, repr(secret)[1:-1]):
            if len(form) >= _MIN_PRIVATE_CHARS:
                text = text.replace(form, "<caption>")
    text = text[: 4 * _MAX_ERROR_CHARS]
    text = _LONG_QUOTE.sub("<quotation>", text)
    for pattern in _SECRETS:
        text = pattern.sub("<redacted>", text)
    return " ".join(text.split())[:_MAX_ERROR_CHARS]


@lru_cache(maxsize=1024)
def _log_once(judge_name: str, error: str) -> None:
    logger.warning("the %s judge left captions unscored: %s (further cases are only counted)", judge_name, error)
