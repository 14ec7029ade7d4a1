"""Scores clarity, fluency and coherence of an English text from 1 to 5 by countable rules.

Each score is ``1 + 4 * quality * connectedness``, with a quality in [0, 1]:

- clarity: the quality falls with words that do not look like words (no vowel, or a letter three times in a row) and
  with stray symbols.
- fluency: the quality is the share of four marks of a good sentence (capital letter, final mark, 3 to 60 words, a verb)
  that a sentence has; the mean over sentences is weighted by their numbers of words.
- coherence: the quality falls with word triples said twice, and with mentions of a content word after its third.

*Connectedness* is 1 where function words make up 20 to 80% of the words, as in any English prose, and falls to 0
towards 0% and 100%: neither a bare list of keywords nor a chain of function words is a sentence, whatever its
punctuation. A text without words gets 1 for each of the three.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from balcaprl.rewards.lexical.words import COMMON_VERBS, FUNCTION_WORDS, Word, split_words

MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 3, 60
MAX_MENTIONS = 3
"""Number of times that a content word may occur before further mentions count as repetition."""

_FUNCTION_WORD_MARGIN = 0.2
_SENTENCE_END = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)\]]*\s+|[\n\r]+")
_CLOSING = "\"'\u201d\u2019)] \t"
_OPENING = "\"'\u201c\u2018([-* \t"
_ODD_SYMBOL = re.compile(r"[^\w\s.,;:!?'\"()\-/%&+#*$\[\]\u2010-\u2026\u00b0\u00a3\u20ac]|_")
_ENDLESS = re.compile(r"(.)\1\1")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{6}")


def linguistic_scores(text: str, words: Sequence[Word]) -> tuple[float, float, float]:
    """Return (clarity, fluency, coherence), each in [1, 5]; ``words`` are the words of ``text``."""
    if not words:
        return 1.0, 1.0, 1.0
    connected = _connectedness(words)
    qualities = (_legibility(text, words), _sentence_form(text), _freshness(words))
    clarity, fluency, coherence = (1.0 + 4.0 * quality * connected for quality in qualities)
    return clarity, fluency, coherence


def _connectedness(words: Sequence[Word]) -> float:
    share = sum(word.text in FUNCTION_WORDS for word in words) / len(words)
    return min(1.0, share / _FUNCTION_WORD_MARGIN, (1.0 - share) / _FUNCTION_WORD_MARGIN)


def _legibility(text: str, words: Sequence[Word]) -> float:
    """Return 1 - 3 * (odd words + odd symbols / 2) / (number of words), but at least 0."""
    odd = sum(not _is_wordlike(word, text) for word in words) + 0.5 * len(_ODD_SYMBOL.findall(text))
    return max(0.0, 1.0 - 3.0 * odd / len(words))


def _is_wordlike(word: Word, text: str) -> bool:
    if word.text.isdigit():
        return len(word.text) <= 6
    if not word.text.isascii() or not word.text.isalpha():  # vowels tell little about contractions or foreign names
        return len(word.text) <= 30 and not _ENDLESS.search(word.text)
    if _ENDLESS.search(word.text) or _CONSONANTS.search(word.text) or len(word.text) > 24:
        return False
    is_abbreviation = text[word.start : word.end].isupper() and len(word.text) <= 5
    return len(word.text) <= 2 or is_abbreviation or any(vowel in word.text for vowel in "aeiouy")


def _sentence_form(text: str) -> float:
    """Return the mean share of the four marks of a good sentence, each sentence weighted by its number of words."""
    total = weight = 0.0
    for sentence in _SENTENCE_END.split(text):
        words = split_words(sentence)
        if not words:
            continue
        first = sentence.lstrip(_OPENING)[:1]
        marks = (
            not first.islower(),
            sentence.rstrip(_CLOSING).endswith((".", "!", "?", "\u2026")),
            MIN_SENTENCE_WORDS <= len(words) <= MAX_SENTENCE_WORDS,
            any(word.text in COMMON_VERBS or word.text.endswith(("ing", "ed")) for word in words),
        )
        total += len(words) * sum(marks) / len(marks)
        weight += len(words)
    return total / weight if weight else 0.0


def _freshness(words: Sequence[Word]) -> float:
    """Return a share that falls with repeated word triples and with content words beyond ``MAX_MENTIONS`` mentions."""
    texts = [word.text for word in words]
    triples = list(zip(texts, texts[1:], texts[2:], strict=False))
    repeated = 1.0 - len(set(triples)) / len(triples) if triples else 0.0
    mentions = Counter(word.stem for word in words if word.text not in FUNCTION_WORDS)
    num_content = sum(mentions.values())
    excess = sum(max(0, count - MAX_MENTIONS) for count in mentions.values()) / num_content if num_content else 0.0
    return max(0.0, 1.0 - 2.0 * repeated) * (1.0 - excess)
