"""Parses a caption of a drawn scene into mentions: what the caption says about which thing, and where it says so.

The grammar is small and accepts any text. Words that the grammar cannot place are kept as *commentary* (words of no
known meaning) or as *stray* attributes (a colour that belongs to nothing), so that everything in a caption is judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from balcaprl.data.scenes.world import BACKGROUNDS, COLOURS, PLACES

Span = tuple[int, int]

_SHAPE_WORDS = {
    "circle": "circle",
    "disc": "circle",
    "disk": "circle",
    "dot": "circle",
    "square": "square",
    "box": "square",
    "triangle": "triangle",
    "diamond": "diamond",
    "rhombus": "diamond",
    "star": "star",
    "cross": "cross",
    "plus": "cross",
}
_GENERIC_WORDS = {"shape", "object", "figure", "thing", "item", "form"}
_SIZE_WORDS = {
    "small": "small",
    "tiny": "small",
    "little": "small",
    "medium": "medium",
    "medium-sized": "medium",
    "mid-sized": "medium",
    "large": "large",
    "big": "large",
    "huge": "large",
}
_FILL_WORDS = {
    "solid": "solid",
    "filled": "solid",
    "striped": "striped",
    "stripy": "striped",
    "hollow": "hollow",
    "outlined": "hollow",
    "empty": "hollow",
}
_COLOUR_WORDS = {c: c for c in (*COLOURS, *BACKGROUNDS)} | {"grey": "gray"}
_NUMBER_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BACKGROUND_WORDS = {"background", "backdrop", "canvas"}
_ROWS = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
_COLUMNS = {"left": "left", "right": "right"}
_CENTRES = {"center", "centre", "middle"}
_PLACE_TAIL = {"corner", "side", "edge", "part", "area", "hand"}
_ABOVE_BELOW = {"above": "above", "over": "above", "below": "below", "under": "below", "beneath": "below"}
_ARTICLES = {"a", "an", "the", "one", "single", "another", "this", "that"}
VERBS = {
    "is", "are", "sits", "sit", "lies", "lie", "shows", "show", "has", "have", "stands", "stand", "appears", "appear",
    "rests", "rest", "seen", "contains", "contain", "there's", "floats", "float", "hangs", "hang",
}  # fmt: skip
_FUNCTION_WORDS = VERBS | _ARTICLES | {
    "there", "it", "its", "they", "of", "to", "in", "on", "at", "with", "and", "or", "but", "while", "where", "which",
    "picture", "image", "scene", "can", "be", "by", "also", "against", "near", "from", "some", "colored", "coloured",
    "color", "colour", "we", "see", "whose", "as", "here", "plain", "located", "placed", "very", "just",
}  # fmt: skip
_CLAUSE_BREAKS = {",", ";", ":", "and", "while", "but", "where", "which", "-"}
_TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|\d+|[^\w\s]")
"""Matches words of any alphabet, so that unknown words become commentary instead of being dropped."""
_SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]*")
MAX_CHARACTERS = 20_000
"""Only this many characters of a text are judged; no policy with a sensible length limit writes more."""


@dataclass(frozen=True)
class Token:
    """A word, a number or a punctuation mark, in lower case."""

    text: str
    span: Span


@dataclass
class Mention:
    """A noun phrase with everything that the text attaches to it; each value carries the span that states it."""

    span: Span
    sentence: int
    clause: int
    head: str | None
    """The shape that the noun names, or None for a generic noun (``object``) or a pronoun."""
    number: int | None = 1
    """1 for a singular; for a plural, the stated number, or None if no number is stated."""
    pronoun: bool = False
    definite: bool = False
    values: dict[str, list[tuple[str, Span]]] = field(default_factory=dict)
    """Every stated value of ``colour``, ``size``, ``fill`` and ``place``, with its span."""

    def add(self, attribute: str, value: str, span: Span) -> None:
        """Attach one more value of an attribute."""
        self.values.setdefault(attribute, []).append((value, span))


@dataclass(frozen=True)
class Relation:
    """A stated relation ``name``, such as ``left of``, between two mentions, which ``first`` and ``second`` index."""

    first: int
    name: str
    second: int
    span: Span


@dataclass(frozen=True)
class Sentence:
    """One sentence, with what the linguistic scores need to know about it."""

    text: str
    span: Span
    words: tuple[str, ...]
    has_verb: bool
    terminated: bool
    num_mentions: int
    num_stray: int
    is_commentary: bool
    """Whether the sentence says nothing that the grammar knows."""


@dataclass
class ParsedCaption:
    """Everything that a caption says."""

    sentences: list[Sentence] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)
    backgrounds: list[tuple[str, Span]] = field(default_factory=list)
    commentary: list[Span] = field(default_factory=list)
    """Spans without a known meaning, at most one per sentence."""
    stray: list[tuple[str, Span]] = field(default_factory=list)
    """Attributes and relations that belong to no mention."""


def parse_caption(text: str) -> ParsedCaption:
    """Parse any text; never fails."""
    parsed = ParsedCaption()
    text = text[:MAX_CHARACTERS]
    for match in _SENTENCE.finditer(text):
        tokens = [Token(m.group().lower(), m.span()) for m in _TOKEN.finditer(text, *match.span())]
        if any(t.text[0].isalnum() for t in tokens):
            _SentenceParser(parsed, tokens, text).run()
    return parsed


def _singular(word: str) -> tuple[str, bool]:
    """Return a noun's singular, and whether the noun was a plural."""
    if word in ("crosses", "boxes"):
        return word[:-2], True
    if word.endswith("s") and word[:-1] in (_SHAPE_WORDS.keys() | _GENERIC_WORDS):
        return word[:-1], True
    return word, False


class _SentenceParser:
    """Parses one sentence: one pass over its tokens from left to right, then one that attaches places and relations."""

    def __init__(self, parsed: ParsedCaption, tokens: list[Token], text: str) -> None:
        self.parsed, self.tokens, self.text = parsed, tokens, text
        self.index = len(parsed.sentences)
        self.clause = 0
        self.position = 0
        self.pending: list[tuple[str, str, Span]] = []
        """Attribute words seen since the last noun: (attribute, value, span)."""
        self.number: int | None = 1
        self.definite = False
        self.after_noun: int | None = None
        """The mention that adjectives after a verb describe."""
        self.copula = False
        self.mentions: list[int] = []
        self.places: list[tuple[str, Span, int]] = []
        self.relations: list[tuple[str, Span]] = []
        self.unknown: list[Span] = []
        self.num_stray = 0
        self.num_backgrounds = 0

    def run(self) -> None:
        while self.position < len(self.tokens):
            if not (self._background() or self._relation_or_place() or self._noun() or self._attribute()):
                self._other()
        self._flush()
        self._attach_places()
        self._attach_relations()
        self._finish()

    def _word(self, offset: int = 0) -> str:
        i = self.position + offset
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def _span(self, start: int, stop: int) -> Span:
        return self.tokens[start].span[0], self.tokens[stop - 1].span[1]

    def _background(self) -> bool:
        """Parse ``a white background`` or ``the background is white``; return whether there is one."""
        if self._word() not in _BACKGROUND_WORDS:
            return False
        colours = [(value, span) for attribute, value, span in self.pending if attribute == "colour"]
        others = [p for p in self.pending if p[0] != "colour"]
        start, stop = self.position, self.position + 1
        if not colours and self._word(1) in VERBS and self._word(2) in _COLOUR_WORDS:
            stop = self.position + 3
            colours = [(_COLOUR_WORDS[self._word(2)], self._span(start, stop))]
        elif colours:
            colours = [(colours[0][0], (colours[0][1][0], self.tokens[start].span[1])), *colours[1:]]
        self.parsed.backgrounds += colours
        self.num_backgrounds += 1
        self.pending = others
        self._flush()
        self.position = stop
        return True

    def _relation_or_place(self) -> bool:
        start = self.position
        word = self._word()
        if word in _ABOVE_BELOW:
            self._flush()
            self.relations.append((_ABOVE_BELOW[word], self._span(start, start + 1)))
            self.position += 1
            return True
        row, column, stop = self._place_words(start)
        if stop == start:
            return False
        self._flush()
        if row is None and column in ("left", "right") and self._is_relation(stop):
            self.relations.append((f"{column} of", self._span(start, stop)))
        else:
            place = " ".join(w for w in (row, column if column != "center" or row is None else None) if w)
            assert place in PLACES, place
            self.places.append((place, self._span(start, stop), self.clause))
        self.position = stop
        return True

    def _place_words(self, start: int) -> tuple[str | None, str | None, int]:
        """Return row, column and the end of the place phrase, which includes ``corner`` and the like."""
        row = column = None
        i = start
        while i < len(self.tokens):
            word = self.tokens[i].text
            parts = word.split("-")
            if len(parts) == 2 and parts[0] in _ROWS and parts[1] in _COLUMNS and row is None and column is None:
                row, column = _ROWS[parts[0]], _COLUMNS[parts[1]]
            elif word in _ROWS and row is None and column is None:
                row = _ROWS[word]
            elif word in _COLUMNS and column is None:
                column = _COLUMNS[word]
            elif word in _CENTRES and column is None:
                column = "center"
            else:
                break
            i += 1
        while i > start and i < len(self.tokens) and self.tokens[i].text in _PLACE_TAIL:
            i += 1
        return row, column, i

    def _is_relation(self, stop: int) -> bool:
        """Tell a relation (``left of the square``) from a place (``left of the picture``)."""
        words = [t.text for t in self.tokens[stop : stop + 3]]
        return words[:1] == ["of"] and not any(w in ("picture", "image", "scene") for w in words)

    def _noun(self) -> bool:
        word, plural = _singular(self._word())
        pronoun = word == "it"
        if word not in _SHAPE_WORDS and word not in _GENERIC_WORDS and not pronoun:
            return False
        if pronoun and self._word(1) in ("has", "shows", "contains"):
            return False  # in "it has a red circle", the pronoun stands for the picture
        token = self.tokens[self.position]
        start = self.pending[0][2][0] if self.pending else token.span[0]
        mention = Mention(
            span=(start, token.span[1]),
            sentence=self.index,
            clause=self.clause,
            head=_SHAPE_WORDS.get(word),
            number=(self.number if self.number != 1 else None) if plural else 1,
            pronoun=pronoun,
            definite=self.definite,
        )
        for attribute, value, span in self.pending:
            mention.add(attribute, value, span)
        self.pending = []
        self.mentions.append(len(self.parsed.mentions))
        self.parsed.mentions.append(mention)
        self.after_noun, self.copula = self.mentions[-1], False
        self.number, self.definite = 1, False
        self.position += 1
        return True

    def _attribute(self) -> bool:
        word, span = self._word(), self.tokens[self.position].span
        for attribute, words in (("size", _SIZE_WORDS), ("fill", _FILL_WORDS), ("colour", _COLOUR_WORDS)):
            if word in words:
                self.pending.append((attribute, words[word], span))
                self.position += 1
                return True
        if word in _NUMBER_WORDS or word.isdecimal():
            self._flush()
            self.number = _NUMBER_WORDS[word] if word in _NUMBER_WORDS else min(int(word[:6]), 10**6)
            self.position += 1
            return True
        return False

    def _other(self) -> None:
        """Handle a punctuation mark, or a word that is not part of a noun phrase."""
        token = self.tokens[self.position]
        word = token.text
        joins_adjectives = word in (",", "and") and self.pending and self._next_is_adjective()
        if not joins_adjectives:
            self._flush()
        if word in _CLAUSE_BREAKS and not joins_adjectives:
            self.clause += 1
        if word in ("is", "are") and self.after_noun is not None:
            self.copula = True
        if word in ("the", "this", "that"):
            self.definite = True
        elif word in ("a", "an", "another", "one"):
            self.definite = False
        known = word in _FUNCTION_WORDS or not word[0].isalnum()
        if not known:
            if self.unknown and not self.text[self.unknown[-1][1] : token.span[0]].strip():
                self.unknown[-1] = (self.unknown[-1][0], token.span[1])
            else:
                self.unknown.append(token.span)
        self.position += 1

    def _next_is_adjective(self) -> bool:
        return any(self._word(1) in words for words in (_SIZE_WORDS, _FILL_WORDS, _COLOUR_WORDS))

    def _flush(self) -> None:
        """Attach attributes that precede no noun to the subject if they follow ``is``; otherwise they are stray."""
        for attribute, value, span in self.pending:
            if self.copula and self.after_noun is not None:
                self.parsed.mentions[self.after_noun].add(attribute, value, span)
            else:
                self.parsed.stray.append((value, span))
                self.num_stray += 1
        self.pending = []

    def _attach_places(self) -> None:
        """Attach each place to the nearest mention; a place without one is stray.

        A mention before the place in its clause is preferred, then one after it in its clause, then one before it in
        the sentence.
        """
        for place, span, clause in self.places:
            before = [i for i in self.mentions if self.parsed.mentions[i].span[0] < span[0]]
            after = [i for i in self.mentions if self.parsed.mentions[i].span[0] > span[0]]
            same_before = [i for i in before if self.parsed.mentions[i].clause == clause]
            same_after = [i for i in after if self.parsed.mentions[i].clause == clause]
            if same_before or same_after or before:
                chosen = (same_before[-1:] or same_after[:1] or before[-1:])[0]
                self.parsed.mentions[chosen].add("place", place, span)
            else:
                self.parsed.stray.append((place, span))
                self.num_stray += 1

    def _attach_relations(self) -> None:
        for name, span in self.relations:
            before = [i for i in self.mentions if self.parsed.mentions[i].span[0] < span[0]]
            after = [i for i in self.mentions if self.parsed.mentions[i].span[0] > span[0]]
            if before and after:
                first, second = before[-1], after[0]
                whole = (self.parsed.mentions[first].span[0], self.parsed.mentions[second].span[1])
                self.parsed.relations.append(Relation(first, name, second, whole))
            else:
                self.parsed.stray.append((name, span))
                self.num_stray += 1

    def _finish(self) -> None:
        words = tuple(t.text for t in self.tokens if t.text[0].isalnum())
        start, stop = self.tokens[0].span[0], self.tokens[-1].span[1]
        says_something = bool(self.mentions or self.num_backgrounds)
        if self.unknown:
            self.parsed.commentary.append((self.unknown[0][0], self.unknown[-1][1]))
        elif not says_something and not self.num_stray:
            self.parsed.commentary.append((start, stop))
        self.parsed.sentences.append(
            Sentence(
                text=self.text[start:stop],
                span=(start, stop),
                words=words,
                has_verb=any(w in VERBS for w in words) or bool(self.unknown and not says_something),
                terminated=self.text[start:stop][-1] in ".!?",
                num_mentions=len(self.mentions),
                num_stray=self.num_stray,
                is_commentary=not says_something and not self.num_stray,
            )
        )


def attribute_values(mention: Mention) -> Iterator[tuple[str, str, Span]]:
    """Yield every (attribute, value, span) that a mention states, its shape included."""
    if mention.head is not None:
        yield "shape", mention.head, mention.span
    for attribute, values in mention.values.items():
        for value, span in values:
            yield attribute, value, span
