"""The warm start's corpus: captions with flaws at known rates, so that the policy has something left to learn.

``flawed_caption`` starts from what a clean caption would say and damages it at the rates of ``FlawRates``; each flaw is
drawn independently. No other flaws are put into the warm start.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from balcaprl.data.scenes.caption import (
    NUMBER_WORDS,
    ObjectWords,
    clean_caption,
    object_sentences,
    opening_sentence,
    relation_sentence,
    told_relation,
    with_article,
)
from balcaprl.data.scenes.world import BACKGROUNDS, COLOURS, FILLS, INVERSE, PLACES, SHAPES, SIZES, Scene

COMMENTARY = (
    "The mood of the picture is calm and pleasant.",
    "This adds depth to the whole composition.",
    "It evokes a sense of wonder and curiosity.",
    "The arrangement feels playful and modern.",
    "Overall it makes a strong impression on the viewer.",
    "Such harmony reminds one of a quiet summer day.",
    "The artist surely wanted to tell a story.",
    "Every detail contributes to the lively atmosphere.",
)
"""Sentences about nothing that one could point at in the image."""

CaptionStyle = Literal["labels", "clean", "flawed"]

_CHOICES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "fill": FILLS,
    "place": PLACES,
}


@dataclass(frozen=True)
class FlawRates:
    """Probability of each flaw, per caption unless stated otherwise."""

    wrong_attribute: float = 0.10
    """For each attribute of an object: the value is replaced by another one."""
    unsaid_attribute: float = 0.15
    """For each of an object's size, fill and place: the attribute is left out."""
    omission: float = 0.25
    """For each object after the first: the caption does not describe this object and all that follow."""
    wrong_count_or_background: float = 0.15
    """The opening sentence states another number or background."""
    no_opening: float = 0.30
    """The opening sentence is left out."""
    no_relation: float = 0.30
    """The relation sentence is left out."""
    wrong_relation: float = 0.05
    """The relation sentence, if there is one, states the inverse relation."""
    hallucination: float = 0.60
    """One or two invented objects are described after the real ones."""
    commentary: float = 0.60
    """One to three sentences of commentary are added."""
    repetition: float = 0.25
    """One to three sentences are repeated."""
    listing: float = 0.20
    """All objects are given in one list without verbs."""
    too_short: float = 0.06
    """The caption is one sentence that only names one or two objects by colour and shape."""
    too_long: float = 0.06
    """The caption is padded with commentary and repetition far beyond the reference's length."""


def flawed_caption(scene: Scene, rng: np.random.Generator, rates: FlawRates | None = None) -> str:
    """Return one caption of the scene with flaws drawn at ``rates``."""
    rates = rates or FlawRates()
    told = [ObjectWords.of(item) for item in scene.objects]
    kept = [told[0], *itertools.takewhile(lambda _: rng.uniform() >= rates.omission, told[1:])]
    objects = [_damage(words, rates, rng) for words in kept]
    if rng.uniform() < rates.hallucination:
        objects += [_invent(rng) for _ in range(int(rng.integers(1, 3)))]
    if rng.uniform() < rates.too_short:
        return _too_short(objects, rng)
    sentences = _opening(scene, rates, rng)
    sentences += [_listing(objects)] if rng.uniform() < rates.listing else object_sentences(objects, rng)
    sentences += _relation(scene, told, rates, rng)
    return " ".join(_pad(sentences, rates, rng))


def label_list(scene: Scene) -> str:
    """Return only the attribute words, in reading order; no other text teaches as much about the image per token."""
    items = [f" {o.place} {o.size} {o.fill} {o.colour} {o.shape}" for o in scene.objects]
    return f" {scene.background} background," + ",".join(items) + "."


def training_caption(scene: Scene, rng: np.random.Generator, style: CaptionStyle, rates: FlawRates) -> str:
    """Return one caption of the scene in the given style."""
    if style == "labels":
        return label_list(scene)
    return clean_caption(scene, rng) if style == "clean" else flawed_caption(scene, rng, rates)


def _damage(words: ObjectWords, rates: FlawRates, rng: np.random.Generator) -> ObjectWords:
    changes: dict[str, str | None] = {}
    for attribute, values in _CHOICES.items():
        if rng.uniform() < rates.wrong_attribute:
            others = [v for v in values if v != getattr(words, attribute)]
            changes[attribute] = others[int(rng.integers(len(others)))]
        if attribute in ("size", "fill", "place") and rng.uniform() < rates.unsaid_attribute:
            changes[attribute] = None
    return replace(words, **changes)  # type: ignore[arg-type]


def _invent(rng: np.random.Generator) -> ObjectWords:
    return ObjectWords(**{a: values[int(rng.integers(len(values)))] for a, values in _CHOICES.items()})


def _too_short(objects: list[ObjectWords], rng: np.random.Generator) -> str:
    phrases = [" ".join(w for w in (o.colour, o.shape) if w) for o in objects[: int(rng.integers(1, 3))]]
    return "There is " + " and ".join(with_article(p) for p in phrases) + "."


def _opening(scene: Scene, rates: FlawRates, rng: np.random.Generator) -> list[str]:
    if rng.uniform() < rates.no_opening:
        return []
    count, background = len(scene.objects), scene.background
    if rng.uniform() < rates.wrong_count_or_background:
        if rng.uniform() < 0.5:
            count = int(rng.choice([n for n in NUMBER_WORDS if n != count]))
        else:
            background = str(rng.choice([b for b in BACKGROUNDS if b != background]))
    return [opening_sentence(count, background, rng)]


def _listing(objects: list[ObjectWords]) -> str:
    text = ", ".join(o.noun_phrase + (f" {o.place}" if o.place else "") for o in objects)
    return text[0].upper() + text[1:] + "."


def _relation(scene: Scene, told: list[ObjectWords], rates: FlawRates, rng: np.random.Generator) -> list[str]:
    relation = told_relation(scene)
    if relation is None or rng.uniform() < rates.no_relation:
        return []
    first, name, second = relation
    if rng.uniform() < rates.wrong_relation:
        name = INVERSE[name]
    return [relation_sentence(told[first], name, told[second])]


def _pad(sentences: list[str], rates: FlawRates, rng: np.random.Generator) -> list[str]:
    """Add repetition and commentary: a little at their own rates, or a lot if the caption is drawn to be too long."""
    sentences = list(sentences)
    far = rng.uniform() < rates.too_long
    if far or rng.uniform() < rates.repetition:
        again = [sentences[int(rng.integers(len(sentences)))] for _ in range(int(rng.integers(1, 4)))]
        sentences += again * (2 if far else 1)
    if far or rng.uniform() < rates.commentary:
        count = int(rng.integers(1, 4)) + (4 if far else 0)
        for index in rng.choice(len(COMMENTARY), size=count, replace=False):
            sentences.insert(int(rng.integers(1, len(sentences) + 1)), COMMENTARY[int(index)])
    return sentences
