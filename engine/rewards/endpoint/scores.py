"""Turns a judge model's replies into a reward breakdown. The arithmetic is done here, not by the model.

- An assertion counts if the model calls it verified and pointable *and* its quotation stands in the caption. An
  assertion whose quotation is not found stays in the total but never counts. So a caption gains nothing by words that
  are hard to quote, or by making the model list what the caption does not say.
- An assertion listed twice is one assertion; it counts only if all of its mentions do. So repetition gains nothing.
- A caption without a letter or digit is not sent: it asserts nothing, covers nothing, and its language is graded 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from balcaprl.rewards.endpoint.protocol import (
    JudgedAssertion,
    MatchReply,
    QuestionsReply,
    Reply,
    RubricReply,
    StyleReply,
    VerifyReply,
    numbered,
)
from balcaprl.rewards.endpoint.reply_checks import locate_quote
from balcaprl.rewards.judge import full_breakdown, linguistic_of, precision_of, recall_of
from balcaprl.rewards.unicode_text import comparable
from balcaprl.types import Assertion, ReferenceUnit, RewardBreakdown, Sample


def is_wordless(caption: str) -> bool:
    """Whether a caption has no letter and no digit, so that there is nothing to judge."""
    return not any(map(str.isalnum, caption))


def wordless_breakdown(units: Sequence[str], extra: Sequence[str]) -> RewardBreakdown:
    """The breakdown of a caption without a letter or digit."""
    nothing = full_breakdown((), tuple(ReferenceUnit(unit, False) for unit in units), (1.0, 1.0, 1.0))
    return replace(nothing, extra=dict.fromkeys(extra, 0.0))


def breakdown_of(
    caption: str, replies: Mapping[str, Reply], units: Sequence[str], extra: Mapping[str, float], errors: Sequence[str]
) -> RewardBreakdown:
    """The breakdown of a caption from the model's replies; a component whose reply is missing is NaN.

    Args:
        caption: the caption as the model saw it.
        replies: the replies by task.
        units: the reference units, in the order in which they were asked about.
        extra: scores of the custom rewards that the model gave, by name.
        errors: why replies are missing; reported only if there is no score at all.
    """
    scores: dict[str, Any] = {}
    for reply in replies.values():
        if isinstance(reply, VerifyReply):
            scores["assertions"] = assertions = merged_assertions(caption, reply.assertions)
            scores["precision"] = precision_of(assertions)
        if isinstance(reply, MatchReply):
            covered = [reply.units[number] for number in numbered(units)]
            pairs = zip(units, covered, strict=True)
            scores["reference_units"] = judged_units = tuple(ReferenceUnit(*pair) for pair in pairs)
            scores["recall"] = recall_of(judged_units)
        if isinstance(reply, StyleReply):
            grades = (reply.clarity, reply.fluency, reply.coherence)
            scores |= zip(("clarity", "fluency", "coherence"), grades, strict=True)
            scores["linguistic"] = linguistic_of(*grades)
    breakdown = RewardBreakdown(**scores, extra=extra)
    if all(math.isnan(reward) for reward in (*breakdown.rewards, *extra.values())):
        return RewardBreakdown(error="; ".join(sorted(set(errors))) or "no reply in time")
    return breakdown


def merged_assertions(caption: str, judged: Sequence[JudgedAssertion]) -> tuple[Assertion, ...]:
    """Merge equal assertions into one, with all places where the caption makes it."""
    merged: dict[str, Assertion] = {}
    for each in judged:
        spans = locate_quote(each.quote, caption)
        verified = each.verified and bool(spans)
        key = comparable(each.text)
        known = merged.get(key)
        if known is not None:
            verified = verified and known.verified
            spans = tuple(sorted({*known.spans, *spans}))
        pointable = each.pointable and (known is None or known.pointable)
        merged[key] = Assertion(known.text if known else each.text, spans, verified, pointable, each.reason)
    return tuple(merged.values())


# ---------------------------------------------------------------------------------------- rewards from facts

MAX_QUESTIONS = 64
_LETTERS = "ABCDEFGHIJ"


class FactsError(ValueError):
    """A sample without the facts that a reward needs."""


def questions_data(sample: Sample) -> tuple[dict[str, Any], dict[str, str]]:
    """The questions of a sample as they are asked, and the letters of their right answers, both by question number.

    ``facts["questions"]`` is a list of ``{"question": text, "options": [texts], "answer": number of the right one}``;
    options are numbered from 0.

    Raises:
        FactsError: the sample has no questions, or they have another form.
    """
    questions = _listed(sample, "questions")
    asked, answers = {}, {}
    for number, each in numbered(questions).items():
        try:
            options = [str(option) for option in each["options"]]
            right = each["answer"]
            asked[number] = {"question": str(each["question"]), "options": dict(zip(_LETTERS, options, strict=False))}
            if not 2 <= len(options) <= len(_LETTERS) or isinstance(right, bool) or not 0 <= right < len(options):
                raise ValueError
            answers[number] = _LETTERS[right]
        except (KeyError, TypeError, ValueError):
            raise FactsError(f"{sample.sample_id}: facts.questions: question {number} is malformed") from None
    return asked, answers


def criteria_data(sample: Sample) -> tuple[dict[str, str], dict[str, float]]:
    """The rubric of a sample as it is asked, and the weight of each criterion, both by criterion number.

    ``facts["rubric"]`` is a list of texts, or of ``{"criterion": text, "weight": number > 0}``.

    Raises:
        FactsError: the sample has no rubric, or it has another form.
    """
    asked, weights = {}, {}
    for number, each in numbered(_listed(sample, "rubric")).items():
        plain = each if isinstance(each, dict) else {"criterion": each}
        weight = plain.get("weight", 1.0)
        if not isinstance(plain.get("criterion"), str) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise FactsError(f"{sample.sample_id}: facts.rubric: criterion {number} is malformed")
        asked[number], weights[number] = plain["criterion"], float(weight)
    return asked, weights


def _listed(sample: Sample, key: str) -> list[Any]:
    items = sample.facts.get(key) if isinstance(sample.facts, dict) else None
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_QUESTIONS:
        raise FactsError(f"{sample.sample_id}: facts.{key} should list 1 to {MAX_QUESTIONS} items")
    return items


def questions_score(reply: QuestionsReply, answers: Mapping[str, str]) -> float:
    """Share of the questions that are answered correctly from the caption."""
    return sum(reply.answers[number] == letter for number, letter in answers.items()) / len(answers)


def rubric_score(reply: RubricReply, weights: Mapping[str, float]) -> float:
    """Weighted share of the criteria that the caption satisfies."""
    return sum(weights[number] for number, satisfied in reply.criteria.items() if satisfied) / sum(weights.values())
