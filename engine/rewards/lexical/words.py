"""English words for the lexical judge: splitting a text into words, stemming, and the word lists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from balcaprl.rewards.unicode_text import fold

_IRREGULAR_PLURALS = {
    "children": "child",
    "feet": "foot",
    "leaves": "leaf",
    "men": "man",
    "people": "person",
    "shelves": "shelf",
    "teeth": "tooth",
    "women": "woman",
}


@lru_cache(maxsize=16384)
def stem(word: str) -> str:
    """Return a lower-case word without possessive and plural endings; the stem is not always a real word."""
    word = word.removesuffix("'s").removesuffix("'")
    if word in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[word]
    if len(word) <= 3 or not word.endswith("s") or word.endswith("ss"):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")) or (word.endswith("oes") and len(word) > 5):
        return word[:-2]
    return word[:-1]


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _listed_stems(words: str) -> frozenset[str]:
    return frozenset(stem(word) for word in words.split())


FUNCTION_WORDS = _listed(
    """
    a about above across after again against all along also although am among an and another any are around as
    at be because been before behind being below beneath beside besides between both but by can close could did
    do does down during each either every few for from further had has have having he her here hers him his how
    i if in inside into is it its itself just like many may might more most much near nearby neither next no nor
    not of off on one onto or other others our out outside over own same several she should so some such than
    that the their them then there these they this those through to together toward towards under until up upon
    us very was we were what when where which while who whom whose will with within without would you your
    """
)
LINKING_VERBS = frozenset(["am", "are", "be", "been", "being", "is", "was", "were"])
"""Words across which two content words still form a pair: "the cup is red"."""

FRAME_WORDS = _listed_stems(
    """
    contain depict feature image photo photograph picture portray see seen show shown view visible
    """
)
"""Stems of words about the picture itself ("the image shows"): they are neither right nor wrong, and do not count."""

COMMENTARY = _listed_stems(
    """
    add aesthetic ambiance ambience artistic atmosphere atmospheric beautiful beautifully beauty bustling calm
    captivating capture charm charming cheerful composition contrast convey cosy cozy create creating depth
    dramatic dynamic elegant emotion energy enhance enhancing evoke evoking evident feel feeling focal focus
    gorgeous harmonious harmony highlight highlighting hint idyllic imply inspiring intriguing inviting likely
    lively lovely magical majestic maybe mood mysterious mystery narrative nostalgia nostalgic overall peaceful
    perhaps picturesque possibly presumably probably relaxing romantic seem seemingly sense serene serenity
    simplicity sophisticated story striking stunning suggest suggesting symbolize symbolizing tension theme tone
    tranquil tranquility unforgettable unique vibe vibrant vivid warmth whimsical wonder wonderful
    """
)
"""Stems of commentary words, which refer to nothing in the picture that can be pointed at."""

COMMON_VERBS = _listed(
    """
    am appear appears are be been begin begins being belong belongs bend bends can carries carry catch catches
    come comes connect connects consist consists contain contains could cover covers cross depict depicts did
    display displays do does dominate dominates drive drives eat eats end ends enjoy enjoys extend extends face
    faces fall falls feature features feed feeds fill fills flies float floats fly frame frames gather gathers
    get gets give gives glow glows go goes grin grins grow grows had hang hangs has have hit hits hold holds
    hover hovers include includes is jump jumps keep keeps kneel kneels lead leads lean leans lie lies line
    lines look looks make makes may might move moves occupies occupy open opens overlook overlooks park parks
    pass passes play plays point points pose poses pull pulls push pushes reach reaches read reads reflect
    reflects remain remains rest rests ride rides rise rises run runs say says see seem seems sees serve serves
    shine shines should show shows sit sits sleep sleeps smile smiles stand stands stay stays stretch stretches
    surround surrounds swim swims take takes talk talks throw throws touch touches travel travels turn turns use
    uses wait waits walk walks was watch watches wear wears were will work works would
    """
)
"""Verb forms that captions use; together with forms in -ing and -ed they tell a sentence from a list of nouns."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W\d_]+)*")
_CLAUSE_END = re.compile(r"[.,;:!?()\n\r\u2026\u2013\u2014]")


@dataclass(frozen=True, slots=True)
class Word:
    """A word in lower case, with its stem and its half-open range of characters."""

    text: str
    stem: str
    start: int
    end: int
    starts_clause: bool
    """Whether the word is the first one or follows punctuation or a line break."""


def split_words(text: str) -> list[Word]:
    """Return all words of a text's folded form in order: runs of letters and digits, with apostrophes inside."""
    folded = fold(text)
    words: list[Word] = []
    end = 0
    for match in _WORD.finditer(folded.text):
        breaks = not words or _CLAUSE_END.search(folded.text, end, match.start()) is not None
        words.append(Word(match.group(), stem(match.group()), *folded.place(*match.span()), breaks))
        end = match.end()
    return words
