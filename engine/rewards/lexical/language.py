"""Detects texts that are not English, which the lexical judge cannot score, by their letters and most common words.

One text is enough only if it is plainly not English. A language that shares short words with English ("a", "in", "do")
is recognised only from many texts.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from balcaprl.rewards.lexical.words import FUNCTION_WORDS, split_words
from balcaprl.rewards.unicode_text import fold

_MIN_LATIN_SHARE = 0.5
_MIN_FUNCTION_WORDS = 0.1
"""Smallest share of function words among the distinct words of an English text; English prose has a quarter or more."""
_MIN_WORDS = 12
"""Fewest distinct words from which the share is judged: a shorter reference may be a name or a few keywords."""
_MIN_POOLED_FUNCTION_WORDS, _MIN_POOLED_WORDS = 0.15, 100
"""Smallest share of function words among all words of many English texts, and the fewest words from which it is judged.

The share is a tenth in Portuguese, Italian or Danish, which have the most short words in common with English.
"""


def why_not_english(text: str) -> str | None:
    """Return in a few words why a text is plainly not English, or None if the text may be English."""
    letters = Counter(
        unicodedata.name(char, "unknown").split()[0].lower() for char in fold(text).text if char.isalpha()
    )
    if letters and letters["latin"] < _MIN_LATIN_SHARE * letters.total():
        return f"it is written in {letters.most_common(1)[0][0]} letters"
    words = {word.text for word in split_words(text)}
    if len(words) >= _MIN_WORDS and len(words & FUNCTION_WORDS) < _MIN_FUNCTION_WORDS * len(words):
        return "it has hardly any of the commonest English words"
    return None


def check_references(references: Sequence[str]) -> None:
    """Refuse a data set whose references are mostly not English sentences, judging by the given ones.

    Raises:
        ValueError: the references are not English; the message says what was found and what to use instead.
    """
    reasons = Counter(reason for reference in references if (reason := why_not_english(reference)))
    words = [word.text for reference in references for word in split_words(reference)]
    share = sum(word in FUNCTION_WORDS for word in words) / max(1, len(words))
    if 2 * reasons.total() > len(references):
        found = f"of {len(references)} references {reasons.total()} are not: {reasons.most_common(1)[0][0]}"
    elif len(words) >= _MIN_POOLED_WORDS and share < _MIN_POOLED_FUNCTION_WORDS:
        found = f"{share:.0%} of their words are among the commonest English ones"
    else:
        return
    raise ValueError(
        "reward.judge: lexical (what auto means for data other than drawn scenes) judges English sentences alone, and the "
        f"data set's references are none, or in another language ({found}). Use reward.judge: endpoint with a model that "
        "knows the language, or rewards of your own (reward.custom) with reward.judge: none"
    )
