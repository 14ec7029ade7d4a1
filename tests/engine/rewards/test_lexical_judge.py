"""The lexical judge: a proxy, but one that neither fails nor pays for repetition and keyword lists."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balcaprl.rewards import LexicalJudge
from balcaprl.rewards.lexical_judge import content_units
from balcaprl.rewards.lexical_words import split_words, stem
from balcaprl.types import Sample

CAPTIONS = json.loads((Path(__file__).parents[2] / "data" / "photographs.json").read_text())
REFERENCE = "A red cup of espresso stands on a red saucer. A metal spoon lies on the saucer beside the cup."


def judge(caption, reference=REFERENCE):
    (breakdown,) = LexicalJudge().score(Sample("s", lambda: None, reference, "Describe."), [caption])
    return breakdown


def units(text):
    return set(content_units(split_words(text)))


def test_units_are_content_words_and_neighbours():
    assert units("A red cup stands on two saucers.") == {
        ("red",),
        ("cup",),
        ("stand",),
        ("two",),
        ("saucer",),
        ("cup", "red"),
        ("cup", "stand"),
        ("saucer", "two"),
    }
    assert units("The cup is red.") == units("Red cup") == {("red",), ("cup",), ("cup", "red")}
    assert ("cup", "red") not in units("Red, cup") | units("red\ncup") | units("red on cup")
    assert units("This image shows a cup") == {("cup",)}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *[
            ("cats", "cat"),
            ("cat's", "cat"),
            ("glass", "glass"),
            ("glasses", "glass"),
            ("boxes", "box"),
            ("bus", "bus"),
        ],
        *[("berries", "berry"), ("horses", "horse"), ("women", "woman"), ("tomatoes", "tomato"), ("shoes", "shoe")],
    ],
)
def test_stems(word, expected):
    assert stem(word) == expected


@pytest.mark.parametrize("name", sorted(CAPTIONS))
def test_a_good_reference_scores_full_against_itself_and_low_against_the_others(name):
    assert judge(CAPTIONS[name], CAPTIONS[name]).rewards == (1.0, 1.0, 1.0)
    for other, caption in CAPTIONS.items():
        if other != name:
            precision, recall, linguistic = judge(caption, CAPTIONS[name]).rewards
            assert max(precision, recall) < 0.35  # colours and the like are shared
            assert linguistic == 1.0


def test_scores_by_hand():
    # three words and one pair are said, all but "table" stand in the reference
    breakdown = judge("A red cup is on a table.")
    assert {a.text: a.verified for a in breakdown.assertions} == {
        "red": True,
        "cup": True,
        "cup red": True,
        "table": False,
    }
    assert breakdown.precision == pytest.approx(3 / 4)
    assert breakdown.recall == pytest.approx(3 / len(units(REFERENCE)))
    assert sum(u.covered for u in breakdown.reference_units) == 3
    assert breakdown.linguistic == 1.0


def test_spans_show_every_place():
    caption = "A red cup. The red thing is a big red cup."
    for assertion in judge(caption).assertions:
        assert assertion.spans
        for start, end in assertion.spans:
            said = {word.stem for word in split_words(caption[start:end])}
            assert set(assertion.text.split()) <= said
    (red,) = [a for a in judge(caption).assertions if a.text == "red"]
    assert [caption[a:b] for a, b in red.spans] == ["red"] * 3


def test_commentary_is_not_pointable_even_if_the_reference_says_it():
    reference = "A red cup creates a cozy atmosphere."
    breakdown = judge(reference, reference)
    pointable = {a.text: a.pointable for a in breakdown.assertions}
    assert all(a.verified for a in breakdown.assertions)
    assert pointable["red"]
    assert not pointable["atmosphere"]
    assert breakdown.precision < 0.6
    assert breakdown.recall == 1.0


@pytest.mark.parametrize("caption", ["", "   ", "\n", "...", "@@@ !!!", "\u200b", "🙂"])
def test_nothing_said_scores_nothing(caption):
    breakdown = judge(caption)
    assert breakdown.rewards == (0.0, 0.0, 0.0)
    assert (breakdown.clarity, breakdown.fluency, breakdown.coherence) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "caption",
    [
        "red cup, espresso, red saucer, metal spoon",
        "Red cup. Espresso. Red saucer. Metal spoon.",
        "cup cup cup cup cup",
        "the of a in the to and of the",
        "xqzt bbbb kjhgf wrtzp",
    ],
)
def test_what_is_no_prose_scores_low(caption):
    assert judge(caption).linguistic < 0.1


@pytest.mark.parametrize(
    ("better", "worse", "score"),
    [
        ("A cup is on the table.", "a cup is on the table.", "fluency"),
        ("A cup is on the table.", "A cup is on the table", "fluency"),
        ("A cup is on the table.", "A cup on the table.", "fluency"),
        ("A cup is on the table.", "A cup is on the xqztrrr.", "clarity"),
        ("A cup is on the table.", "A cup is on the table @@@@.", "clarity"),
        ("A cup is on the table.", "A cup is on the table and a cup is on the table.", "coherence"),
        ("A cup is on the table.", "A cup and a cup and the cup or a cup is on some cup.", "coherence"),
    ],
)
def test_each_flaw_lowers_its_score(better, worse, score):
    assert getattr(judge(worse), score) < getattr(judge(better), score) == 5.0


def test_ordinary_writing_is_no_flaw():
    caption = "The sign says \"USA 2026\". It's 3.5 m tall (about 11 feet) \u2013 and a café is near; isn't that nice?"
    breakdown = judge(caption)
    assert breakdown.clarity == 5.0
    assert breakdown.fluency == 5.0


def test_a_reference_of_function_words_and_one_without_words():
    assert judge("It is what it is.", "It is what it is.").recall == 1.0
    breakdown = judge("A cup.", "???")
    assert breakdown.error
    assert all(math.isnan(r) for r in breakdown.rewards)


TEXTS = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from([*REFERENCE.split(), "blue", "is", ".", "\n", "xqzt", "mood"]), max_size=40).map(" ".join),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([REFERENCE, "It is.", "🙂 x", "x" * 50]))
@example("İ" * 5 + " 's \u2019\u2019 ﬁ", REFERENCE)
def test_any_text_is_scored(caption, reference):
    breakdown = judge(caption, reference)
    assert breakdown.error is None
    assert all(0.0 <= r <= 1.0 for r in breakdown.rewards)
    assert all(1.0 <= s <= 5.0 for s in (breakdown.clarity, breakdown.fluency, breakdown.coherence))
    for assertion in breakdown.assertions:
        assert all(0 <= a < b <= len(caption) for a, b in assertion.spans)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(2, 4))
def test_repetition_never_pays(caption, times):
    once, repeated = judge(caption), judge("\n".join([caption] * times))
    assert repeated.precision == once.precision
    assert repeated.recall == once.recall
    assert repeated.linguistic <= once.linguistic + 1e-9


@pytest.mark.parametrize(
    "text", [" " * 200_000, "a " * 50_000, "." * 200_000, '."' * 100_000, "a" * 200_000, "'" * 200_000]
)
def test_long_texts_take_linear_time(text):
    assert all(0.0 <= r <= 1.0 for r in judge(text).rewards)


def test_captions_are_scored_in_their_order_and_alike():
    captions = ["A red cup.", "", "A blue dog."]
    sample = Sample("s", lambda: None, REFERENCE, "Describe.")
    assert LexicalJudge().score(sample, captions) == [judge(c) for c in captions]
