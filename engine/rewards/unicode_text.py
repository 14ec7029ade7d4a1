"""Text of any language: a folded form for comparing texts, finding words, and counting words.

*Folded* text drops every difference that does not make another word for a reader: Unicode's compatibility forms (NFKC:
full-width letters, ligatures, accents stored as separate characters), case, characters without a shape of their own
(zero-width spaces and joiners, soft hyphens, direction marks, variation selectors), and the marks that Arabic and
Hebrew writers may leave out. The place of each folded character in the original text is kept.

Many scripts are *unspaced*: nothing, or nothing reliable, stands between their words (Han, kana, Thai, Lao, Khmer,
Burmese; in Korean, a particle is attached to its noun). Only a dictionary could find such words, and this module uses
none. To *find* words, each letter of an unspaced script is a word. To *count* words, Unicode's default rules (UAX 29)
apply: each ideograph, each hiragana letter and each Thai letter with its marks is one word, and so is each run of
katakana and each run of hangul.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import regex

Span = tuple[int, int]

_PLAIN = regex.compile(r"[\x20-\x7e\n\r\t]*")
"""Text in which only the case has to be folded."""
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}[\p{Cc}--\s]]", regex.V1)
_OPTIONAL_MARK = regex.compile(
    r"[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0670]"
)
"""Hebrew points, Arabic vowel signs, and the stroke that only stretches an Arabic word."""
_CLUSTER = regex.compile(r"\X")
_SAME = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\u0060\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011", "-"),  # hyphens; a dash is another mark
        "\u0131": "i",  # the dotless i: other languages have one letter where Turkish has two
    }
)
_UNSPACED = (
    r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\u30fc\p{Script=Bopomofo}\p{Script=Hangul}\p{Script=Thai}"
    r"\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}\p{Script=Tibetan}\p{Script=Javanese}\p{Script=Balinese}"
    r"\p{Script=Tai_Le}\p{Script=New_Tai_Lue}\p{Script=Tai_Tham}\p{Script=Tai_Viet}\p{Script=Yi}"
)
_UNSPACED_LETTER = regex.compile(rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]", regex.V1)
_WORD = regex.compile(rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+", regex.V1)
_BOUNDARY = regex.compile(r"(?w)\b", regex.V1)
_SPOKEN = regex.compile(r"[\p{L}\p{N}]")
_HYPHEN = regex.compile(r"(?<=\w)-(?=\w)")
_ENDING = regex.compile(r"[\s\p{Sentence_Terminal}]+\Z")


@dataclass(frozen=True)
class Folded:
    """A text in its folded form."""

    text: str
    places: tuple[Span, ...] | None
    """The half-open range of the original text that each folded character came from; None: all places are unchanged."""

    def place(self, start: int, end: int) -> Span:
        """Return the range of the original text that a non-empty range of the folded text came from."""
        return (start, end) if self.places is None else (self.places[start][0], self.places[end - 1][1])


@lru_cache(maxsize=256)
def fold(text: str) -> Folded:
    """Return the folded form of a text; never fails on any string."""
    if _PLAIN.fullmatch(text):
        return Folded(text.lower(), None)
    kept = [i for i, char in enumerate(text) if not (_INVISIBLE.match(char) or _OPTIONAL_MARK.match(char))]
    visible = "".join(text[i] for i in kept)
    chars: list[str] = []
    places: list[Span] = []
    for cluster in _CLUSTER.finditer(visible):  # a letter with all its marks; normalisation never joins two clusters
        folded = _fold_cluster(cluster.group())
        chars.append(folded)
        places += [(kept[cluster.start()], kept[cluster.end() - 1] + 1)] * len(folded)
    return Folded("".join(chars), tuple(places))


def _fold_cluster(cluster: str) -> str:
    same = unicodedata.normalize("NFKC", cluster.translate(_SAME)).translate(_SAME)
    folded = unicodedata.normalize("NFKC", same.casefold())
    return folded.replace("i\u0307", "i")  # case folding turns a capital dotted I into an i and a dot


def find_words(text: str) -> list[tuple[str, Span]]:
    """Return the folded words of a text in order, with their ranges; each letter of an unspaced script is a word."""
    folded = fold(text)
    return [(match.group(), folded.place(*match.span())) for match in _WORD.finditer(folded.text)]


def find_phrase(phrase: str, text: str) -> tuple[Span, ...]:
    """Return the places where a phrase stands in a text, without overlaps, as half-open ranges of characters.

    The phrase's words must occur whole and side by side; case, Unicode form, spaces and punctuation may differ. A
    phrase without words has no place.
    """
    wanted = [word for word, _ in find_words(phrase)]
    if not wanted:
        return ()
    words = _words_of(text)
    told = [word for word, _ in words]
    found, start = [], 0
    while start <= len(told) - len(wanted):
        try:
            start = told.index(wanted[0], start)
        except ValueError:
            break
        end = start + len(wanted)
        if told[start:end] == wanted:
            found.append((words[start][1][0], words[end - 1][1][1]))
            start = end
        else:
            start += 1
    return tuple(found)


@lru_cache(maxsize=64)
def _words_of(text: str) -> list[tuple[str, Span]]:
    """Cached ``find_words``: one caption is searched for each of its many quotations."""
    return find_words(text)


def count_words(text: str) -> int:
    """Return the number of words by UAX 29 that have a letter or a digit; parts that hyphens join are one word."""
    joined = _HYPHEN.sub("", fold(text).text)
    return sum(bool(_SPOKEN.search(piece)) for piece in _BOUNDARY.split(joined))


def count_letters(text: str) -> tuple[int, int]:
    """Return (number of letters and digits of spaced scripts, number of those of unspaced scripts)."""
    unspaced = len(_UNSPACED_LETTER.findall(text))
    return sum(map(str.isalnum, text)) - unspaced, unspaced


def comparable(text: str) -> str:
    """Return a text in the form for comparison: folded, with single spaces and no sentence marks at its end."""
    return _ENDING.sub("", " ".join(fold(text).text.split()))
