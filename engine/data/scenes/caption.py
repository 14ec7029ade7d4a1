"""Words for scenes: the reference caption, and the sentences that captions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from balcaprl.data.scenes.world import PLACES, Scene, SceneObject

NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@dataclass(frozen=True)
class ObjectWords:
    """What a caption says about one object; an attribute that is None is not mentioned."""

    shape: str
    colour: str | None
    size: str | None
    fill: str | None
    place: str | None

    @classmethod
    def of(cls, item: SceneObject) -> ObjectWords:
        """Return words that state all attributes of an object, as they are."""
        return cls(item.shape, item.colour, item.size, item.fill, item.place)

    @property
    def noun_phrase(self) -> str:
        """The noun phrase without an article, such as ``large striped red circle``."""
        return " ".join(w for w in (self.size, self.fill, self.colour, self.shape) if w)


def with_article(noun_phrase: str) -> str:
    """Return the noun phrase with ``a`` or ``an`` before it."""
    return ("an " if noun_phrase[0] in "aeio" else "a ") + noun_phrase


def place_phrase(place: str) -> str:
    """Return a place with its preposition, such as ``at the top left`` or ``in the center``."""
    preposition = {"center": "in", "left": "on", "right": "on"}.get(place, "at")
    return f"{preposition} the {place}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def opening_sentence(count: int, background: str, rng: np.random.Generator) -> str:
    """Return a sentence that says how many shapes there are, and on what background."""
    number = NUMBER_WORDS.get(count, str(count))
    forms = (
        f"there are {number} shapes on a {background} background",
        f"the picture shows {number} shapes on a {background} background",
        f"{number} shapes lie on a {background} background",
    )
    return _sentence(forms[int(rng.integers(len(forms)))])


def object_clause(words: ObjectWords, form: int) -> str:
    """Return one clause about one object; ``form``, from 0 to 3, chooses the construction."""
    phrase = with_article(words.noun_phrase)
    if words.place is None:
        return (f"there is {phrase}", f"{phrase} can be seen", f"the picture shows {phrase}", f"it has {phrase}")[form]
    where = place_phrase(words.place)
    return (f"{phrase} is {where}", f"{where} there is {phrase}", f"{phrase} sits {where}", f"{where} is {phrase}")[
        form
    ]


def object_sentences(objects: Sequence[ObjectWords], rng: np.random.Generator) -> list[str]:
    """Describe the objects in order, one or two per sentence; no construction is used more than twice in a row."""
    sentences: list[str] = []
    forms: list[int] = []
    rest = list(objects)
    while rest:
        form = int(rng.integers(4))
        if forms[-2:] == [form, form]:
            form = (form + 1) % 4
        forms.append(form)
        pair = len(rest) >= 2 and rng.uniform() < 0.35
        clauses = [object_clause(words, form) for words in rest[: 2 if pair else 1]]
        sentences.append(_sentence(", and ".join(clauses)))
        rest = rest[len(clauses) :]
    return sentences


def relation_sentence(first: ObjectWords, relation: str, second: ObjectWords) -> str:
    """Return a sentence such as ``The red circle is to the left of the blue square.``"""
    words = {"left of": "to the left of", "right of": "to the right of"}.get(relation, relation)
    names = [" ".join(w for w in (o.colour, o.shape) if w) for o in (first, second)]
    return _sentence(f"the {names[0]} is {words} the {names[1]}")


def told_relation(scene: Scene) -> tuple[int, str, int] | None:
    """Return the relation of the first to the second object in reading order that references state, or None."""
    same_row = PLACES.index(scene.objects[0].place) // 3 == PLACES.index(scene.objects[1].place) // 3
    for relation in ("left of", "above") if same_row else ("above", "left of"):
        if (0, relation, 1) in scene.relations:
            return (0, relation, 1)
    return None


def clean_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a complete, true and well-formed caption; ``rng`` chooses only the wording."""
    objects = [ObjectWords.of(item) for item in scene.objects]
    sentences = [opening_sentence(len(objects), scene.background, rng), *object_sentences(objects, rng)]
    relation = told_relation(scene)
    if relation is not None:
        sentences.append(relation_sentence(objects[relation[0]], relation[1], objects[relation[2]]))
    return " ".join(sentences)


def reference_caption(scene: Scene) -> str:
    """Return the scene's reference caption; the same scene always gives the same caption."""
    return clean_caption(scene, np.random.default_rng([0xCA97, scene.seed]))
