"""Scores word overlap with the reference caption: a proxy for images of which only a reference caption is known.

This is **not** the reward of the paper, which asks a strong model whether each assertion is true of the image. Here
an assertion is verified if the reference says it too: a true remark that the reference leaves out counts as wrong, a
paraphrase in other words is not recognised, and a negated statement counts as its opposite. The judge needs no model
and no network, is deterministic and cheap, and knows only English (stop words, endings and word forms). A data set that
is mostly in another language is refused at the start, and a reference that is plainly in another language gives no
scores (``balcaprl.rewards.lexical.language``).

The units of a text are its content words, reduced to simple stems, and the pairs of neighbouring content words ("red
cup" and "the cup is red" give the same pair). A unit said twice is one unit, so that repetition gains nothing.

- precision: the share of assertions that are verified (the reference has the unit) and pointable (the unit has no word
  of commentary such as "atmosphere"); 0 without assertions.
- recall: the share of the reference's units that the caption has.
- linguistic: the mean of clarity, fluency and coherence (``balcaprl.rewards.lexical.style``), mapped by (s - 1) / 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from balcaprl.rewards.judge import full_breakdown
from balcaprl.rewards.lexical.language import why_not_english
from balcaprl.rewards.lexical.style import linguistic_scores
from balcaprl.rewards.lexical.words import COMMENTARY, FRAME_WORDS, FUNCTION_WORDS, LINKING_VERBS, Word, split_words
from balcaprl.types import Assertion, ReferenceUnit, RewardBreakdown, Sample

Span = tuple[int, int]
Unit = tuple[str, ...]
"""One stem, or two stems in alphabetical order."""


class LexicalJudge:
    """Scores captions by their words; the module's docstring states the limits of this method."""

    name = "lexical"

    def score(self, sample: Sample, captions: Sequence[str]) -> list[RewardBreakdown]:
        """Return one breakdown per caption; never fails on any text.

        A reference without any word, or in a language other than English, gives breakdowns with an ``error``.
        """
        reason = _why_not_english(sample.reference)
        if reason is not None:
            error = f"the lexical judge knows English alone, and the reference caption is in another language: {reason}"
            return [RewardBreakdown(error=error) for _ in captions]
        reference = _reference_units(sample.reference)
        if not reference.units:
            return [RewardBreakdown(error="the reference caption has no words") for _ in captions]
        return [_score(caption, reference) for caption in captions]


@dataclass(frozen=True)
class _Reference:
    units: tuple[Unit, ...]
    """The units that the recall looks for."""
    known: frozenset[Unit]
    """All units of the reference, with its function words and its words about the picture itself."""


def _score(caption: str, reference: _Reference) -> RewardBreakdown:
    words = split_words(caption)
    said = content_units(words)
    assertions = tuple(
        Assertion(
            text=" ".join(unit),
            spans=tuple(spans),
            verified=unit in reference.known,
            pointable=not any(stem in COMMENTARY for stem in unit),
        )
        for unit, spans in said.items()
    )
    covered = said.keys() | {(word.stem,) for word in words}
    units = tuple(ReferenceUnit(" ".join(unit), unit in covered) for unit in reference.units)
    return full_breakdown(assertions, units, linguistic_scores(caption, words))


_why_not_english = lru_cache(maxsize=4096)(why_not_english)


@lru_cache(maxsize=4096)
def _reference_units(reference: str) -> _Reference:
    words = split_words(reference)
    all_words = {(word.stem,) for word in words}
    # If a reference has only function words and words about the picture itself, they become its units.
    units = list(content_units(words)) or sorted(all_words)
    return _Reference(tuple(units), frozenset(all_words.union(units)))


def content_units(words: Sequence[Word]) -> dict[Unit, list[Span]]:
    """Return the content words and the pairs of neighbours, in order of appearance, each with all its spans."""
    units: dict[Unit, list[Span]] = {}
    previous: Word | None = None
    for word in words:
        if word.starts_clause:
            previous = None
        if word.text in FUNCTION_WORDS or word.stem in FRAME_WORDS:
            if word.text not in LINKING_VERBS:
                previous = None
            continue
        units.setdefault((word.stem,), []).append((word.start, word.end))
        if previous is not None and previous.stem != word.stem:
            first, second = sorted((previous.stem, word.stem))
            units.setdefault((first, second), []).append((previous.start, word.end))
        previous = word
    return units
