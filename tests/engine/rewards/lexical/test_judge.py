"""The lexical judge: a proxy, but one that neither fails nor pays for repetition and keyword lists."""

# ruff: noqa: RUF001

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balcaprl.config import RewardConfig
from balcaprl.rewards import LexicalJudge, make_judge
from balcaprl.rewards.lexical.judge import content_units
from balcaprl.rewards.lexical.words import split_words, stem
from balcaprl.types import Sample

CAPTIONS = json.loads((Path(__file__).parents[3] / "data" / "photographs.json").read_text())
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


# ------------------------------------------------------------------------------------------------------ languages

FOREIGN = {
    "Chinese": "草地上有一个红色的球，旁边有一只棕色的小狗。",
    "Japanese": "緑の芝生の上に赤いボールがあります。",
    "Korean": "초록색 잔디 위에 빨간 공이 있습니다.",
    "Thai": "ลูกบอลสีแดงอยู่บนหญ้า",
    "Arabic": "كرة حمراء على العشب الأخضر.",
    "Hindi": "हरी घास पर एक लाल गेंद है।",
    "Russian": "Красный мяч лежит на зелёной траве.",
    "French": "Une balle rouge se trouve sur l'herbe verte à côté d'un chien brun qui regarde le ciel bleu.",
    "German": "Ein roter Ball liegt auf dem grünen Gras neben einem braunen Hund, der in den blauen Himmel schaut.",
    "Spanish": "Una pelota roja está en la hierba verde junto a un perro marrón que mira al cielo azul.",
    "Vietnamese": "Một quả bóng đỏ nằm trên bãi cỏ xanh bên cạnh một con chó nâu đang nhìn lên trời.",
    "Turkish": "Yeşil çimlerin üzerinde mavi gökyüzüne bakan kahverengi bir köpeğin yanında kırmızı bir top duruyor.",
}
NEAR = {  # they share so many short words with English that only many texts tell
    "Portuguese": "Uma bola vermelha está no gramado ao lado do cachorro marrom que olha para o céu azul.",
    "Italian": "Una palla rossa è sul prato verde accanto a un cane marrone che guarda il cielo in un giardino.",
    "short French": "Une balle rouge sur l'herbe.",
}
KEYWORDS = "Red cup, wooden table."
ENGLISH = [
    "A dog is running in a field of tall grass near a small red barn.",
    KEYWORDS,
    "A caf\u00e9 called \u201c\u7ea2\u7403\u201d with na\u00efve paintings on its walls.",
    "\uff21 \uff52\uff45\uff44 \uff42\uff41\uff4c\uff4c",
    "42",
]


@pytest.mark.parametrize("language", FOREIGN)
def test_a_reference_in_another_language_is_excluded_and_counted(language):
    good = LexicalJudge().score(Sample("s", lambda: None, REFERENCE, "?"), ["A red cup."])
    told = LexicalJudge().score(Sample("s", lambda: None, FOREIGN[language], "?"), ["A red cup.", FOREIGN[language]])
    assert good[0].error is None
    assert [b.error is not None and "knows English alone" in b.error for b in told] == [True, True]
    assert all(math.isnan(reward) for b in told for reward in b.rewards)


@pytest.mark.parametrize("text", [*ENGLISH, REFERENCE, *CAPTIONS.values()])
def test_english_of_any_kind_is_judged(text):
    assert judge(text, text).error is None
    if text != KEYWORDS:
        make_judge(RewardConfig(), "jsonl", references=[text] * 60)


@pytest.mark.parametrize("text", [*FOREIGN.values(), *NEAR.values(), KEYWORDS])
def test_a_data_set_without_english_sentences_is_refused_at_start(text):
    mixed = [text] * 40 + [REFERENCE] * 10 if text in FOREIGN.values() else [text] * 40
    for name in ("lexical", "auto"):
        with pytest.raises(ValueError, match=r"reward\.judge: lexical .* English .* endpoint"):
            make_judge(RewardConfig(judge=name), "jsonl", references=mixed)
    make_judge(RewardConfig(), "jsonl", references=[REFERENCE] * 40 + [text] * 10)
    make_judge(RewardConfig(judge="none"), "jsonl", references=mixed)


def test_a_caption_in_another_language_earns_nothing_and_forms_do_not_matter():
    assert judge(FOREIGN["Chinese"]).rewards == (0.0, 0.0, 0.0)
    plain, other = judge("A red cup of caf\u00e9."), judge("A r\u200bed cu\u00adp of cafe\u0301.")
    assert other.rewards[:2] == plain.rewards[:2]
    assert [a.text for a in other.assertions] == [a.text for a in plain.assertions]
    (red,) = [a for a in other.assertions if a.text == "red"]
    assert red.spans == ((2, 6),)
