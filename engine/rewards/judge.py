"""The interface of judges, the three rewards as computed from verdicts, and the checks that reject invalid answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from balcaprl.rewards.endpoint.server.redaction import redact
from balcaprl.types import REWARD_NAMES, Assertion, JudgeStoppedError, ReferenceUnit, RewardBreakdown, Sample

_ROUNDING = 1e-6  # rounding errors may put a mean this far outside [0, 1]


class Judge(Protocol):
    """Scores captions of one image."""

    name: str

    def score(self, sample: Sample, captions: Sequence[str]) -> list[RewardBreakdown]:
        """Return one breakdown per caption, in the captions' order; rewards are in [0, 1], or NaN if there is no score.

        A judge that may fail on one caption answers ``RewardBreakdown(error=...)`` for that caption. A judge that
        raises, or returns the wrong number of answers, is asked again caption by caption, to save the scores of the
        others.
        """
        ...


class NoJudge:
    """Gives no scores for the three rewards, for a run that learns only from ``reward.custom``."""

    name = "none"

    def score(self, sample: Sample, captions: Sequence[str]) -> list[RewardBreakdown]:
        """Return breakdowns without scores."""
        return [RewardBreakdown() for _ in captions]


@runtime_checkable
class BackgroundJudge(Judge, Protocol):
    """A judge that scores in the background: it takes groups as they are sampled, and sampling goes on meanwhile."""

    def open_batch(self) -> JudgeBatch:
        """Open a batch for the groups of one step."""
        ...


class JudgeGroup(Protocol):
    """The captions of one image, handed over as they are sampled."""

    def add(self, caption: str) -> None:
        """Hand over the next caption and return at once."""
        ...

    def close(self) -> None:
        """Declare that no more captions will come; must be called before the batch is asked for its results."""
        ...


class JudgeBatch(Protocol):
    """The groups of one step, in the order in which they are opened."""

    def open_group(self, sample: Sample) -> JudgeGroup:
        """Open a group whose captions come one by one."""
        ...

    def submit(self, sample: Sample, captions: Sequence[str]) -> Future[list[RewardBreakdown]]:
        """Hand over a whole group and return at once; the future gives its breakdowns once all of them are ready."""
        ...

    def results(self) -> list[list[RewardBreakdown]]:
        """Wait until the judge has finished or gives up on late answers, and return the breakdowns of all groups."""
        ...


@dataclass
class ScoreStats:
    """Counts and metrics of one step's scoring."""

    num_captions: int = 0
    num_unscorable: int = 0
    """Number of captions without any score; they take no part in the update."""
    num_outside_bounds: int | None = None
    """Number of captions whose linguistic reward the length mask sets to 0; None under another length rule."""
    errors: Counter[str] = field(default_factory=Counter)
    """How many captions each error left without scores."""
    reasons: dict[str, str] = field(default_factory=dict)
    """The last failure reason of each custom reward that left out scores."""
    judge_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that the judge and the custom rewards report about their work."""

    def metrics(self) -> dict[str, float]:
        """Return the log's metrics: ``num_unscorable``, the judge's own, and with a length mask ``masked_fraction``."""
        metrics = {"num_unscorable": float(self.num_unscorable), **self.judge_metrics}
        if self.num_outside_bounds is not None and self.num_captions:
            metrics["masked_fraction"] = self.num_outside_bounds / self.num_captions
        return metrics


def precision_of(assertions: Sequence[Assertion]) -> float:
    """Return the share of the assertions that are verified and pointable; 0 without assertions."""
    return sum(a.counted for a in assertions) / len(assertions) if assertions else 0.0


def recall_of(units: Sequence[ReferenceUnit]) -> float:
    """Return the share of the reference units that are covered; 0 without units."""
    return sum(u.covered for u in units) / len(units) if units else 0.0


def linguistic_of(clarity: float, fluency: float, coherence: float) -> float:
    """Return the mean of the three grades, mapped from [1, 5] to [0, 1]."""
    return ((clarity + fluency + coherence) / 3 - 1) / 4


def full_breakdown(
    assertions: tuple[Assertion, ...], units: tuple[ReferenceUnit, ...], grades: tuple[float, float, float]
) -> RewardBreakdown:
    """Return the breakdown of a caption whose assertions, units and grades (clarity, fluency, coherence) are known."""
    return RewardBreakdown(
        precision_of(assertions),
        recall_of(units),
        linguistic_of(*grades),
        *grades,
        assertions=assertions,
        reference_units=units,
    )


def score_safely(judge: Judge, sample: Sample, captions: list[str]) -> list[RewardBreakdown]:
    """Return one valid breakdown per caption, whatever the judge does.

    Raises:
        JudgeStoppedError: the judge raised it.
    """
    if not captions:
        return []
    try:
        answers = list(judge.score(sample, captions))
        if len(answers) != len(captions):
            raise ValueError(f"the judge gave {len(answers)} answers for {len(captions)} captions")
    except JudgeStoppedError:
        raise
    except Exception as error:  # a judge is foreign code: none of its other errors may end a run
        if len(captions) > 1:
            return [score_safely(judge, sample, [caption])[0] for caption in captions]
        text = f"{type(error).__name__}: {error}"
        return [RewardBreakdown(error=redact(text, [*captions, sample.reference]))]
    return [validated(answer, [caption, sample.reference]) for answer, caption in zip(answers, captions, strict=True)]


def validated(answer: object, private: Sequence[str]) -> RewardBreakdown:
    """Return the answer, or a breakdown without scores whose ``error`` says what is wrong with the answer."""
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
    extra = {name: _as_number(reward) for name, reward in answer.extra.items()}
    for name, reward in extra.items():
        if reward is None or math.isinf(reward):
            return RewardBreakdown(error=f"{name} is no finite number")
    if all(math.isnan(reward) for reward in (*rewards.values(), *extra.values()) if reward is not None):
        return RewardBreakdown(error="the judge gave no score and no reason")
    clamped: dict[str, Any] = {name: _clamped(reward) for name, reward in rewards.items() if reward is not None}
    return replace(answer, **clamped)


def _as_number(reward: object) -> float | None:
    try:
        return float(reward)  # type: ignore[arg-type]  # a foreign judge may give anything
    except (TypeError, ValueError, OverflowError):
        return None


def _clamped(reward: float) -> float:
    return reward if math.isnan(reward) else min(1.0, max(0.0, reward))
