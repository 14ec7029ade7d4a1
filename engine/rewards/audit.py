"""Measures how good a judge is on drawn scenes, where the truth is known exactly: ``balcaprl judge-audit``.

The audited judge and the exact judge both score flawed captions of drawn scenes. The audit compares

- each assertion of the exact judge with the audited judge's assertion that overlaps it most: do both count it? An
  assertion that the audited judge did not list counts as refused. The report gives precision, recall and Cohen's kappa,
  overall and by type of assertion;
- each reference unit: do both judges find it covered? A judge that can take units is given the exact ones. A judge that
  makes its own units is left out of this comparison; for recall, only its scores of whole captions are compared;
- each grade of clarity, fluency and coherence, by quadratically weighted kappa;
- each caption's rewards, by correlation and mean absolute difference; their mean correlation is the judge's
  ``agreement``;
- each reward with the same reward from a second run without a cache.

Intervals cover 95% and come from a bootstrap over scenes, because captions of one scene are not independent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from balcaprl.config import TrainConfig
from balcaprl.data.scenes import flawed_caption, scene_sample
from balcaprl.data.scenes.world import ATTRIBUTES
from balcaprl.rewards.judge import BackgroundJudge, Judge, score_safely, validated
from balcaprl.rewards.registry import close_judge, make_judge
from balcaprl.rewards.scenes.judge import SceneJudge
from balcaprl.types import REWARD_NAMES, Assertion, RewardBreakdown, Sample

GRADES = ("clarity", "fluency", "coherence")
Interval = tuple[float, float, float]
"""Value, lower end and upper end; NaN where they cannot be computed."""


@dataclass(frozen=True)
class Agreement:
    """How yes-or-no verdicts agree with the truth."""

    num: int
    num_unjudged: int
    """Number of items that the judge did not list; they count as a no."""
    precision: Interval
    """Of the items to which the judge says yes, the share for which yes is true."""
    recall: Interval
    """Of the items for which yes is true, the share to which the judge says yes."""
    kappa: Interval


@dataclass
class AuditReport:
    """What an audit found."""

    judge: str
    num_captions: int
    num_unscored: int
    assertions: dict[str, Agreement] = field(default_factory=dict)
    """Agreement on assertions by assertion type; ``all`` comes first."""
    units: Agreement | None = None
    """Agreement on covered reference units; None if the two judges never have the same units."""
    grades: dict[str, Interval] = field(default_factory=dict)
    """Quadratically weighted kappa of each grade."""
    correlation: dict[str, Interval] = field(default_factory=dict)
    """Correlation of each reward with the exact one, over captions."""
    difference: dict[str, Interval] = field(default_factory=dict)
    """Mean absolute difference of each reward from the exact one."""
    agreement: Interval = (math.nan, math.nan, math.nan)
    """Mean of the rewards' correlations with the exact ones."""
    retest: dict[str, float] = field(default_factory=dict)
    """For each reward, the share of scores that a second run reproduces exactly."""
    seconds_per_caption: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that the judge reports about its work, cost included."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)


@dataclass
class _Evidence:
    """What the captions of one scene contribute to each comparison, as rows."""

    assertions: list[tuple[str, bool, bool, bool]] = field(default_factory=list)
    """Rows of (assertion type, truth, verdict, whether the judge listed the assertion)."""
    units: list[tuple[bool, bool]] = field(default_factory=list)
    grades: list[tuple[tuple[float, float], ...]] = field(default_factory=list)
    rewards: list[tuple[tuple[float, float], ...]] = field(default_factory=list)
    """For each caption and reward: (exact reward, the audited judge's reward)."""


class ExactUnits:
    """The exact reference units of drawn scenes, for a judge that takes units."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._units = {}
        for sample in samples:
            (breakdown,) = SceneJudge().score(sample, [""])
            # Two objects may have the same unit text; a number tells them apart, so that the judge is asked about both.
            texts = [unit.text for unit in breakdown.reference_units]
            self._units[sample.reference] = tuple(
                f"{text} ({texts[:i].count(text) + 1})" if texts.count(text) > 1 else text
                for i, text in enumerate(texts)
            )

    def get(self, reference: str) -> tuple[str, ...] | None:
        """Return the units of a reference caption, or None for an unknown reference."""
        return self._units.get(reference)


def audit_captions(num_scenes: int, captions_per_scene: int, seed: int) -> tuple[list[Sample], list[list[str]]]:
    """Return the first validation scenes, and flawed captions of them that ``seed`` determines.

    The captions are made in the same way as those of the demo's warm start.
    """
    rng = np.random.default_rng([0xA0D17, seed])
    samples = [scene_sample("validation", i, instruction="Describe the image.") for i in range(num_scenes)]
    return samples, [[flawed_caption(sample.facts, rng) for _ in range(captions_per_scene)] for sample in samples]


def audit_config(
    config: TrainConfig, *, num_scenes: int = 50, captions_per_scene: int = 4, seed: int = 0, retest: bool = True
) -> AuditReport:
    """Audit the judge that a configuration names, without its cache, so that cost and retest are real.

    Raises:
        ValueError: the judge is not configured.
        JudgeStoppedError: the judge cannot go on.
    """
    samples, captions = audit_captions(num_scenes, captions_per_scene, seed)
    endpoint = config.endpoint.model_copy(update={"cache": None, "units": None})
    judge: Judge
    if config.reward.judge == "endpoint":
        from balcaprl.rewards.endpoint.judge import EndpointJudge

        judge = EndpointJudge(config.reward, endpoint, units=ExactUnits(samples))
    else:
        judge = make_judge(config.reward, "scenes", endpoint=endpoint)
    try:
        return audit_judge(judge, samples, captions, retest=retest)
    finally:
        close_judge(judge)


def audit_judge(
    judge: Judge,
    samples: Sequence[Sample],
    captions: Sequence[Sequence[str]],
    *,
    retest: bool = True,
    num_bootstraps: int = 1000,
) -> AuditReport:
    """Compare a judge with the exact judge on captions of drawn scenes."""
    exact = [SceneJudge().score(sample, texts) for sample, texts in zip(samples, captions, strict=True)]
    started = time.perf_counter()
    told = _score(judge, samples, captions)
    seconds = time.perf_counter() - started
    take_metrics: Any = getattr(judge, "take_metrics", None)
    evidence = [_compare(a, b) for a, b in zip(exact, told, strict=True)]
    flat = [breakdown for group in told for breakdown in group]
    report = AuditReport(
        judge=judge.name,
        num_captions=len(flat),
        num_unscored=sum(all(map(math.isnan, b.rewards)) for b in flat),
        seconds_per_caption=seconds / max(1, len(flat)),
        metrics=take_metrics() if callable(take_metrics) else {},
    )
    _fill_in(report, evidence, _Bootstrap(len(evidence), num_bootstraps))
    if retest:
        again = [breakdown for group in _score(judge, samples, captions) for breakdown in group]
        for name in REWARD_NAMES:
            pairs = np.array([[getattr(b, name) for b in pair] for pair in zip(flat, again, strict=True)])
            pairs = pairs[np.isfinite(pairs).all(axis=1)]
            report.retest[name] = float((pairs[:, 0] == pairs[:, 1]).mean()) if len(pairs) else math.nan
    return report


def _score(judge: Judge, samples: Sequence[Sample], captions: Sequence[Sequence[str]]) -> list[list[RewardBreakdown]]:
    if not isinstance(judge, BackgroundJudge):
        return [score_safely(judge, sample, list(texts)) for sample, texts in zip(samples, captions, strict=True)]
    batch = judge.open_batch()
    for sample, texts in zip(samples, captions, strict=True):
        batch.submit(sample, texts)
    return [[validated(answer, []) for answer in answers] for answers in batch.results()]


# ------------------------------------------------------------------------------------------------------ comparing


def assertion_type(assertion: Assertion) -> str:
    """Return what an assertion of the exact judge is about, such as ``colour``, ``count`` or ``relation``."""
    text = assertion.text
    for attribute in ATTRIBUTES:
        if f": {attribute} = " in text:
            return attribute
    for beginning, name in (("count of", "count"), ("background", "background"), ("unattached", "stray")):
        if text.startswith(beginning):
            return name
    return text if text == "commentary" else "vague" if text.startswith("something, not") else "relation"


def _compare(exact: Sequence[RewardBreakdown], told: Sequence[RewardBreakdown]) -> _Evidence:
    evidence = _Evidence()
    for truth, verdict in zip(exact, told, strict=True):
        evidence.rewards.append(tuple(zip(truth.rewards, verdict.rewards, strict=True)))
        evidence.grades.append(tuple((getattr(truth, g), getattr(verdict, g)) for g in GRADES))
        if not math.isnan(verdict.precision):
            for assertion in truth.assertions:
                found = _best_match(assertion, verdict.assertions)
                counted = found is not None and found.counted
                evidence.assertions.append((assertion_type(assertion), assertion.counted, counted, found is not None))
        # A judge that makes its own units may by chance have the same number of them, so the texts are compared too.
        # Units that were passed to the judge begin with the exact text; ``ExactUnits`` may append a number.
        exact_units, told_units = truth.reference_units, verdict.reference_units
        same_units = len(exact_units) == len(told_units) and all(
            b.text.startswith(a.text) for a, b in zip(exact_units, told_units, strict=True)
        )
        if same_units and not math.isnan(verdict.recall):
            pairs = zip(exact_units, told_units, strict=True)
            evidence.units += [(a.covered, b.covered) for a, b in pairs]
    return evidence


def _best_match(assertion: Assertion, candidates: Sequence[Assertion]) -> Assertion | None:
    """Return the best match among the candidates that overlap the assertion in the caption, or None.

    A candidate whose text contains the assertion's text is preferred, then the largest overlap, then the shortest text.
    """
    own = _characters(assertion)
    best: tuple[bool, float, int] | None = None
    found = None
    for candidate in candidates:
        other = _characters(candidate)
        overlap = len(own & other) / len(own | other) if own and other else 0.0
        rank = (assertion.text in candidate.text, overlap, -len(candidate.text))
        if overlap > 0 and (best is None or rank > best):
            best, found = rank, candidate
    return found


def _characters(assertion: Assertion) -> set[int]:
    return {i for start, stop in assertion.spans for i in range(start, stop)}


# ------------------------------------------------------------------------------------------------------ statistics


class _Bootstrap:
    """Resamples scenes, with the same draws for every statistic."""

    def __init__(self, num_scenes: int, count: int) -> None:
        rng = np.random.default_rng(0)
        self._draws = rng.integers(0, max(1, num_scenes), (count, num_scenes))

    def __call__(self, rows: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float]) -> Interval:
        """Return a statistic over all rows with its 95% interval; ``rows`` holds one array of rows per scene."""
        whole = np.concatenate([r for r in rows if len(r)]) if any(map(len, rows)) else np.empty((0, 2))
        value = statistic(whole)
        if not math.isfinite(value):
            return (math.nan, math.nan, math.nan)
        values = [statistic(np.concatenate([rows[i] for i in draw])) for draw in self._draws]
        finite = [v for v in values if math.isfinite(v)]
        low, high = np.quantile(finite, [0.025, 0.975]) if finite else (math.nan, math.nan)
        return (value, float(low), float(high))


def _fill_in(report: AuditReport, evidence: Sequence[_Evidence], bootstrap: _Bootstrap) -> None:
    types = sorted({row[0] for scene in evidence for row in scene.assertions})
    for name in ("all", *types):
        rows = [[r for r in scene.assertions if name in ("all", r[0])] for scene in evidence]
        unjudged = sum(not judged for scene in rows for *_, judged in scene)
        report.assertions[name] = _agreement([[(t, v) for _, t, v, _ in scene] for scene in rows], unjudged, bootstrap)
    if any(scene.units for scene in evidence):
        report.units = _agreement([scene.units for scene in evidence], 0, bootstrap)
    for index, name in enumerate(GRADES):
        rows_of = [_finite([caption[index] for caption in scene.grades]) for scene in evidence]
        report.grades[name] = bootstrap(rows_of, weighted_kappa)
    per_reward = [[_finite([c[k] for c in scene.rewards]) for scene in evidence] for k in range(len(REWARD_NAMES))]
    for name, rows_of in zip(REWARD_NAMES, per_reward, strict=True):
        report.correlation[name] = bootstrap(rows_of, correlation)
        report.difference[name] = bootstrap(
            rows_of, lambda r: float(np.abs(r[:, 0] - r[:, 1]).mean()) if len(r) else math.nan
        )
    together = [
        np.array([[value for pair in caption for value in pair] for caption in scene.rewards]).reshape(-1, 6)
        for scene in evidence
    ]
    report.agreement = bootstrap(together, _mean_correlation)


def _finite(pairs: Sequence[tuple[float, float]] | np.ndarray) -> np.ndarray:
    rows = np.array(pairs, float).reshape(-1, 2)
    return rows[np.isfinite(rows).all(axis=1)]


def _agreement(rows: Sequence[Sequence[tuple[bool, bool]]], num_unjudged: int, bootstrap: _Bootstrap) -> Agreement:
    arrays = [np.array(scene, bool).reshape(-1, 2) for scene in rows]

    def share(of: int) -> Callable[[np.ndarray], float]:
        return lambda r: float((r[:, 0] & r[:, 1]).sum() / r[:, of].sum()) if r[:, of].any() else math.nan

    return Agreement(
        num=sum(map(len, arrays)),
        num_unjudged=num_unjudged,
        precision=bootstrap(arrays, lambda r: share(1)(r.astype(bool))),
        recall=bootstrap(arrays, lambda r: share(0)(r.astype(bool))),
        kappa=bootstrap(arrays, lambda r: cohen_kappa(r.astype(bool))),
    )


def cohen_kappa(pairs: np.ndarray) -> float:
    """(N, 2) verdicts -> agreement beyond chance: 1 is perfect, 0 is chance; NaN if all 2 N verdicts are equal."""
    if not len(pairs):
        return math.nan
    observed = float((pairs[:, 0] == pairs[:, 1]).mean())
    p, q = pairs.mean(axis=0)
    expected = float(p * q + (1 - p) * (1 - q))
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def weighted_kappa(pairs: np.ndarray) -> float:
    """(N, 2) grades -> quadratically weighted kappa; NaN if all grades are equal."""
    if not len(pairs):
        return math.nan
    observed = float(((pairs[:, 0] - pairs[:, 1]) ** 2).mean())
    mean, variance = pairs.mean(axis=0), pairs.var(axis=0)
    expected = float(variance.sum() + (mean[0] - mean[1]) ** 2)
    return 1 - observed / expected if expected > 0 else math.nan


def correlation(pairs: np.ndarray) -> float:
    """(N, 2) exact and judged scores -> Pearson's correlation.

    The result is NaN if N < 3 or the exact scores do not vary, and 0 if only the judged scores do not vary.
    """
    if len(pairs) < 3 or pairs[:, 0].std() < 1e-12:
        return math.nan
    if pairs[:, 1].std() < 1e-12:
        return 0.0
    return float(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1])


def _mean_correlation(rows: np.ndarray) -> float:
    """(N, 6), the exact and the judged score of each of three rewards -> mean of the correlations that are defined."""
    values = [correlation(_finite(rows[:, 2 * k : 2 * k + 2])) for k in range(rows.shape[1] // 2)]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
