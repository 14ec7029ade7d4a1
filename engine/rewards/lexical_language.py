"""Which texts the lexical judge can judge: English ones. A text's letters and its commonest words tell.

One text alone shows only what is plainly no English; a language that shares short words with English ("a", "in", "do") shows
over many texts.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from balcaprl.rewards.lexical_words import FUNCTION_WORDS, split_words
from balcaprl.rewards.unicode_text import fold

_MIN_LATIN_SHARE = 0.5
_MIN_FUNCTION_WORDS = 0.1
"""Of a text's different words; English prose has a quarter and more."""
_MIN_WORDS = 12
"""Of fewer different words nothing is concluded: a reference may be a name or a few keywords."""
_MIN_POOLED_FUNCTION_WORDS, _MIN_POOLED_WORDS = 0.15, 100
"""Of all words of many texts; in Portuguese, Italian or Danish, which share the most with English, it is a tenth."""


def why_not_english(text: str) -> str | None:
    """Why a text is plainly no English, in a few words; None where it may be."""
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
    """Refuse a data set whose references are mostly no English sentences, judged by some of them.

    Raises:
        ValueError: saying what was found, and what to use instead.
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
