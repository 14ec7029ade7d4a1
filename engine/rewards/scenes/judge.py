"""The exact judge of drawn scenes: every claim is checked against the scene graph, none is guessed.

A caption is parsed into mentions (``parser.py``). Each mention is bound to the object that it describes, if there is
one, and every attribute that the mention states becomes one assertion. Counts, relations, the background, words that
belong to nothing, and commentary become assertions too. An assertion said twice is one assertion. The reference units
are the assertions of the reference caption, so precision and recall are about the same kinds of claims.

An assertion is *verified* if the scene graph confirms it, and *pointable* if it states something about the scene that
can be located. Commentary, stray words and mentions of nothing in particular are not pointable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from balcaprl.data.scenes.world import INVERSE, Scene, SceneObject
from balcaprl.rewards.judge import full_breakdown
from balcaprl.rewards.scenes.parser import Mention, ParsedCaption, Span, attribute_values, parse_caption
from balcaprl.types import Assertion, ReferenceUnit, RewardBreakdown, Sample

_IDENTITY = ("shape", "colour", "place")
_WEIGHT = {"shape": 3, "colour": 3, "place": 2, "size": 1, "fill": 1}
Key = tuple[Hashable, ...]


@dataclass
class _Claim:
    """One assertion, with all places where the caption says it."""

    text: str
    verified: bool
    pointable: bool
    covers: frozenset[Key]
    spans: list[Span] = field(default_factory=list)
    sentences: set[int] = field(default_factory=set)


@dataclass
class Claims:
    """All assertions of one caption by what they claim, and the counts that the clarity and coherence scores need."""

    by_key: dict[Key, _Claim] = field(default_factory=dict)
    num_vague: int = 0
    num_conflicting: int = 0
    contradictions: int = 0

    def add(
        self,
        key: Key,
        text: str,
        *,
        verified: bool,
        span: Span,
        sentence: int,
        pointable: bool = True,
        covers: frozenset[Key] | None = None,
    ) -> None:
        """Record a claim, or one more place where a known claim is said."""
        claim = self.by_key.setdefault(
            key, _Claim(text, verified, pointable, covers if covers is not None else frozenset([key]))
        )
        if span not in claim.spans:
            claim.spans.append(span)
        claim.sentences.add(sentence)

    @property
    def covered(self) -> set[Key]:
        """The keys of all verified and pointable claims, and of the details that they cover."""
        return {key for claim in self.by_key.values() if claim.verified and claim.pointable for key in claim.covers}

    def assertions(self) -> tuple[Assertion, ...]:
        """Return all assertions in the order in which they are first said."""
        return tuple(
            Assertion(c.text, tuple(sorted(c.spans)), c.verified, c.pointable)
            for c in sorted(self.by_key.values(), key=lambda c: min(c.spans))
        )


class SceneJudge:
    """Scores captions of drawn scenes; ``sample.facts`` must be a ``Scene``."""

    name = "scene"

    def score(self, sample: Sample, captions: Sequence[str]) -> list[RewardBreakdown]:
        """Return one breakdown per caption; never fails on any text.

        Raises:
            ValueError: If the sample carries no scene graph.
        """
        scene = sample.facts
        if not isinstance(scene, Scene):
            raise ValueError(f"the scene judge needs drawn scenes, but sample {sample.sample_id} has no scene graph")
        units = collect_claims(scene, parse_caption(sample.reference))
        return [self._score_one(scene, units, caption) for caption in captions]

    def _score_one(self, scene: Scene, units: Claims, caption: str) -> RewardBreakdown:
        parsed = parse_caption(caption)
        claims = collect_claims(scene, parsed)
        assertions = claims.assertions()
        covered = claims.covered
        reference_units = tuple(ReferenceUnit(c.text, key in covered) for key, c in units.by_key.items())
        return full_breakdown(assertions, reference_units, linguistic_scores(parsed, claims))


def collect_claims(scene: Scene, parsed: ParsedCaption) -> Claims:
    """Return every assertion of a parsed caption, checked against the scene."""
    claims = Claims()
    bindings = _bind_all(scene, parsed.mentions)
    for mention, bound in zip(parsed.mentions, bindings, strict=True):
        if mention.number == 1:
            _claim_attributes(claims, scene, mention, bound)
        else:
            _claim_count(claims, scene, mention)
    for relation in parsed.relations:
        first, second = bindings[relation.first], bindings[relation.second]
        sentence = parsed.mentions[relation.first].sentence
        _claim_relation(claims, scene, (first, relation.name, second), relation.span, sentence, parsed)
    for value, span in parsed.backgrounds:
        claims.add(
            ("background", value),
            f"background = {value}",
            verified=value == scene.background,
            span=span,
            sentence=_sentence_of(parsed, span),
        )
    for word, span in parsed.stray:
        claims.add(
            ("stray", word),
            f"unattached: {word}",
            verified=False,
            pointable=False,
            span=span,
            sentence=_sentence_of(parsed, span),
        )
    for number, span in enumerate(parsed.commentary):
        sentence = _sentence_of(parsed, span)
        key = ("commentary", parsed.sentences[sentence].words if sentence >= 0 else number)
        claims.add(key, "commentary", verified=False, pointable=False, span=span, sentence=sentence)
    claims.contradictions = _count_contradictions(claims, len(scene.objects))
    return claims


def _sentence_of(parsed: ParsedCaption, span: Span) -> int:
    return next((i for i, s in enumerate(parsed.sentences) if s.span[0] <= span[0] < s.span[1]), -1)


def _bind_all(scene: Scene, mentions: Sequence[Mention]) -> list[int | None]:
    """Return for each mention the index of the object that it describes; None for a plural or an absent object."""
    bindings: list[int | None] = []
    named: dict[tuple[str | None, tuple[str, ...]], int | None] = {}
    last: int | None = None
    for mention in mentions:
        name = (mention.head, tuple(v for v, _ in mention.values.get("colour", ())))
        if mention.number != 1:
            bound = None
        elif mention.pronoun:
            bound = last
        else:
            bound = _bind(scene.objects, mention)
            if bound is None and mention.definite:
                bound = named.get(name)
            last = bound
        named.setdefault(name, bound)
        bindings.append(bound)
    return bindings


def _bind(objects: Sequence[SceneObject], mention: Mention) -> int | None:
    """Return the index of the best-fitting object, or None if no object fits.

    Of shape, colour and place, an object must agree with two that the mention states, or with the only one it states.
    If the mention states none of these, its size and fill are compared instead.
    """
    told: dict[str, set[str]] = {}
    for attribute, value, _ in attribute_values(mention):
        told.setdefault(attribute, set()).add(value)
    identity = [a for a in _IDENTITY if a in told] or list(told)
    best: tuple[int, int] | None = None
    for index, item in enumerate(objects):
        matches = {a for a, values in told.items() if item.value(a) in values}
        if told and sum(a in matches for a in identity) >= min(2, len(identity)):
            score = sum(_WEIGHT[a] for a in matches)
            if best is None or score > best[0]:
                best = (score, index)
    return best[1] if best else None


def _claim_attributes(claims: Claims, scene: Scene, mention: Mention, bound: int | None) -> None:
    """Add one assertion per attribute that a singular mention states."""
    told = list(attribute_values(mention))
    conflicting = {a for a in _WEIGHT if len({v for b, v, _ in told if b == a}) > 1}
    claims.num_conflicting += bool(conflicting)
    if not told:
        claims.num_vague += 1
        if not (mention.pronoun and bound is not None):
            claims.add(
                ("vague",),
                "something, not told what",
                verified=bool(scene.objects),
                pointable=False,
                span=mention.span,
                sentence=mention.sentence,
            )
        return
    name = _name(scene, mention, bound)
    subject: Hashable = bound if bound is not None else ("absent", name)
    for attribute, value, span in told:
        verified = bound is not None and scene.objects[bound].value(attribute) == value
        claims.add(
            (subject, attribute, value),
            f"{name}: {attribute} = {value}",
            verified=verified,
            span=span,
            sentence=mention.sentence,
        )


def _name(scene: Scene, mention: Mention, bound: int | None) -> str:
    """Return a name for a mention: that of the object that it describes, or the mention's own words."""
    if bound is not None:
        return f"{scene.objects[bound].colour} {scene.objects[bound].shape}"
    colours = [value for value, _ in mention.values.get("colour", ())]
    return " ".join([*colours, mention.head or "object"])


def _claim_count(claims: Claims, scene: Scene, mention: Mention) -> None:
    """Add one assertion of how many objects have all stated attributes: ``three shapes``, ``two red circles``."""
    told = list(attribute_values(mention))
    fitting = [i for i, item in enumerate(scene.objects) if all(item.value(a) == v for a, v, _ in told)]
    verified = len(fitting) == mention.number if mention.number is not None else len(fitting) >= 2
    kind = tuple(sorted((a, v) for a, v, _ in told))
    key: Key = ("count", kind, mention.number)
    details = frozenset((i, a, v) for i in fitting for a, v in kind)
    what = " ".join(v for _, v in kind) or "shapes"
    number = "several" if mention.number is None else str(mention.number)
    claims.add(
        key,
        f"count of {what} = {number}",
        verified=verified,
        pointable=bool(told) or mention.number is not None,
        span=mention.span,
        sentence=mention.sentence,
        covers=details | {key},
    )


def _claim_relation(
    claims: Claims,
    scene: Scene,
    relation: tuple[int | None, str, int | None],
    span: Span,
    sentence: int,
    parsed: ParsedCaption,
) -> None:
    first, name, second = relation
    if first is None or second is None:
        claims.add(
            ("relation", sentence, span), f"something {name} something", verified=False, span=span, sentence=sentence
        )
        return
    names = [f"{scene.objects[i].colour} {scene.objects[i].shape}" for i in (first, second)]
    # "a left of b" and "b right of a" are one claim.
    key = min((first, name, second), (second, INVERSE[name], first), key=str)
    claims.add(
        ("relation", *key),
        f"{names[0]} {name} {names[1]}",
        verified=(first, name, second) in scene.relations,
        span=span,
        sentence=sentence,
    )


def _count_contradictions(claims: Claims, num_objects: int) -> int:
    """Count the contradicting values of each object's attributes, of the background and of the number of shapes.

    Of the values that a caption gives for one of these, all but the first count.
    """
    told: Counter[Hashable] = Counter()
    for key in claims.by_key:
        if isinstance(key[0], int) and 0 <= key[0] < num_objects:
            told[key[:2]] += 1
        elif key[0] == "background" or key[:2] == ("count", ()):
            told[key[0]] += 1
    return sum(n - 1 for n in told.values())


def linguistic_scores(parsed: ParsedCaption, claims: Claims) -> tuple[float, float, float]:
    """Return clarity, fluency and coherence, each from 1 to 5; all are 1 for a text without words.

    - Clarity falls with stray words, vague mentions, conflicting attributes, and overfull sentences.
    - Fluency falls with fragments, missing capitals and full stops, doubled words, and a wrong ``a`` or ``an``.
    - Coherence falls with repeated sentences and claims, contradictions, padding, and monotonous openings.
    """
    if not parsed.sentences:
        return 1.0, 1.0, 1.0
    return _clarity(parsed, claims), _fluency(parsed), _coherence(parsed, claims)


def _clip(score: float) -> float:
    return min(5.0, max(1.0, score))


def _clarity(parsed: ParsedCaption, claims: Claims) -> float:
    things = len(parsed.mentions) + len(parsed.stray) + len(parsed.commentary)
    unclear = (len(parsed.stray) + claims.num_vague + claims.num_conflicting) / max(1, things)
    crammed = sum(s.num_mentions > 2 or len(s.words) > 28 for s in parsed.sentences) / len(parsed.sentences)
    return _clip(5.0 - 6.0 * unclear - 3.0 * crammed)


def _fluency(parsed: ParsedCaption) -> float:
    sentences = parsed.sentences
    fragments = sum(not s.has_verb for s in sentences) / len(sentences)
    malformed = sum(not s.terminated or s.text[0].islower() for s in sentences) / len(sentences)
    doubled = sum(a == b for s in sentences for a, b in zip(s.words, s.words[1:], strict=False))
    articles = sum(
        (a == "an") != (b[0] in "aeiou")
        for s in sentences
        for a, b in zip(s.words, s.words[1:], strict=False)
        if a in ("a", "an")
    )
    return _clip(5.0 - 4.0 * fragments - 2.0 * malformed - 0.5 * doubled - 0.5 * articles)


def _coherence(parsed: ParsedCaption, claims: Claims) -> float:
    sentences = parsed.sentences
    repeated_sentences = 1.0 - len({s.words for s in sentences}) / len(sentences)
    # Shape and colour may name an object again; any other claim that two sentences make is a repetition.
    retold = [c for k, c in claims.by_key.items() if len(k) < 2 or k[1] not in ("shape", "colour")]
    repeated_claims = sum(len(c.sentences) > 1 for c in retold) / max(1, len(retold))
    padding = sum(s.is_commentary for s in sentences) / len(sentences)
    openings = [s.words[:2] for s in sentences]
    monotonous = sum(a == b == c for a, b, c in zip(openings, openings[1:], openings[2:], strict=False)) / len(
        sentences
    )
    return _clip(
        5.0
        - 4.0 * repeated_sentences
        - 3.0 * repeated_claims
        - 0.5 * claims.contradictions
        - 3.0 * max(0.0, padding - 0.25)
        - 3.0 * monotonous
    )
