"""Words of any language: found across forms and invisible characters, whole, and counted alike in caption and reference."""

# ruff: noqa: RUF001

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_judge import ScriptedServer, plain_answer

from balcaprl.config import EndpointConfig, RewardConfig
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.rewards.endpoint.protocol import TASKS, Call, JudgedAssertion, most_assertions
from balcaprl.rewards.endpoint.reply_checks import locate_quote, parse_reply
from balcaprl.rewards.endpoint.scores import merged_assertions
from balcaprl.rewards.length import is_outside_bounds, measure_length
from balcaprl.rewards.unicode_text import comparable, count_words, find_words
from balcaprl.types import Sample

# Caption, what a judge that copies verbatim quotes of it.
VERBATIM = {
    "Chinese": ("草地上有一个红色的球，旁边有一只棕色的小狗。", ["红色的球", "草地上", "棕色的小狗", "球"]),
    "traditional Chinese": ("桌上放著一隻藍色的杯子。", ["藍色的杯子", "桌上"]),
    "Japanese": ("緑の芝生の上に赤いテニスボールがあります。", ["赤いテニスボール", "緑の芝生", "ボール", "あります"]),
    "Korean": ("초록색 잔디 위에 빨간 공이 있습니다.", ["빨간 공", "초록색 잔디", "공이"]),
    "Thai": ("มีลูกบอลสีแดงอยู่บนสนามหญ้าสีเขียว", ["ลูกบอลสีแดง", "สนามหญ้า"]),
    "Lao": ("ໝາສີນ້ຳຕານນັ່ງຢູ່ເທິງຫຍ້າ", ["ໝາສີນ້ຳຕານ", "ຫຍ້າ"]),
    "Khmer": ("បាល់ក្រហមនៅលើស្មៅ", ["បាល់ក្រហម", "ស្មៅ"]),
    "Burmese": ("မြက်ပေါ်မှာ ဘောလုံးအနီ ရှိတယ်", ["ဘောလုံးအနီ", "ဘောလုံး"]),
    "Arabic": ("كرة حمراء على العشب الأخضر.", ["كرة حمراء", "العشب الأخضر"]),
    "Hebrew": ("כדור אדום מונח על הדשא.", ["כדור אדום", "הדשא"]),
    "Hindi": ("हरी घास पर एक लाल गेंद है।", ["लाल गेंद", "हरी घास"]),
    "Tamil": ("பச்சை புல்லில் சிவப்பு பந்து உள்ளது.", ["சிவப்பு பந்து"]),
    "Russian": ("Красный мяч лежит на зелёной траве.", ["красный мяч", "зелёной траве"]),
    "Greek": ("Μια κόκκινη μπάλα στους δρόμους.", ["κόκκινη μπάλα", "ΔΡΌΜΟΥΣ"]),
    "Turkish": ("KIRMIZI bir top İstanbul'da.", ["kırmızı bir top", "istanbul"]),
    "Vietnamese": ("Một quả bóng đỏ nằm trên cỏ.", ["quả bóng đỏ"]),
    "French": ("L\u2019herbe est verte\u00a0; une balle rouge y repose.", ["herbe", "L'herbe est verte", "balle rouge"]),
    "German": ("Ein großer roter Ball.", ["ein grosser roter Ball", "großer"]),
    "mixed": ("一台iPhone手机放在red球旁边。", ["iPhone 手机", "iPhone手机", "red 球", "手机"]),
    "emoji": ("A red ball 🙂 on the grass 👨\u200d👩\u200d👧 here", ["red ball 🙂", "the grass"]),
    "English": ("A dog's red ball lies on the well-kept grass.", ["dog", "dog's red ball", "well kept grass"]),
}  # fmt: skip
FORMS = {
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "NFKD": lambda text: unicodedata.normalize("NFKD", text),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "zero-width spaces": lambda text: "\u200b".join(text),
    "joiners": lambda text: "\u2060".join(text),
    "soft hyphens": lambda text: text.replace("e", "e\u00ad"),
    "byte order marks": lambda text: f"\ufeff{text}\ufeff",
    "right to left": lambda text: f"\u202b{text}\u202c\u200f",
    "isolates": lambda text: f"\u2067{text}\u2069",
    "variation selectors": lambda text: "".join(c + "\ufe0f" if c.isalpha() else c for c in text),
    "tags": lambda text: text + "".join(chr(0xE0000 + ord(c)) for c in "hidden"),
    "double spaces": lambda text: text.replace(" ", " \u3000\u00a0"),
}


def shown(text):
    """What a reader sees of it: for comparing a span with a quotation."""
    return comparable(text).replace(" ", "")


@pytest.mark.parametrize("language", VERBATIM)
def test_what_is_quoted_verbatim_is_found_where_it_stands(language):
    caption, quotes = VERBATIM[language]
    for quote in quotes:
        spans = locate_quote(quote, caption)
        assert spans, quote
        start = caption.casefold().find(quote.casefold())
        if start >= 0 and len(caption.casefold()) == len(caption):
            visible = len(quote.rstrip(" 🙂"))
            assert (start, start + visible) in spans


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("language", VERBATIM)
def test_the_form_of_the_characters_does_not_matter_on_either_side(language, form):
    caption, quotes = VERBATIM[language]
    other = FORMS[form](caption)
    for quote in quotes:
        plain = locate_quote(quote, caption)
        assert len(locate_quote(FORMS[form](quote), caption)) == len(plain)
        spans = locate_quote(quote, other)
        assert [shown(other[a:b]) for a, b in spans] == [shown(caption[a:b]) for a, b in plain]


@pytest.mark.parametrize(
    ("quote", "caption"),
    [
        ("red", "A shredded bred reddish hatred"),
        ("蓝色的球", "草地上有一个红色的球。"),
        ("球红", "红色的球"),
        ("мяч", "мячик"),
        ("كرة", "فكرة"),
        ("गद", "लाल गेंद"),
        ("ก", "กี่"),  # a letter without the vowel that is written on it
        ("か", "がある"),
        ("。", "球。"),
        ("🙂", "A ball 🙂"),
        ("\u200b", "a\u200bb"),
        ("", "球"),
    ],
)
def test_no_part_of_a_word_and_no_other_words_are_found(quote, caption):
    assert locate_quote(quote, caption) == ()


@pytest.mark.parametrize(
    ("quote", "caption"),
    [
        ("كرة حمراء", "كُرَةٌ حَمْراءُ عَلَى العُشْبِ"),
        ("حمراء", "حمـــراء"),
        ("כדור", "כַּדּוּר אָדֹם"),
        ("fine", "a ﬁne ball"),
        ("ガラス", "ｶﾞﾗｽ"),
    ],
)
def test_marks_that_writers_leave_out_and_compatible_forms_are_the_same(quote, caption):
    ((start, end),) = locate_quote(quote, caption)
    assert caption[start:end].strip() == caption[start:end]
    assert locate_quote(caption[start:end], quote) == ((0, len(quote)),)


@given(st.text(max_size=80), st.data())
def test_any_words_of_any_text_are_found_again_within_it(text, data):
    words = find_words(text)
    assert [span for _, span in words] == sorted(span for _, span in words)
    if words:
        first = data.draw(st.integers(0, len(words) - 1))
        last = data.draw(st.integers(first, len(words) - 1))
        span = (words[first][1][0], words[last][1][1])
        for start, end in locate_quote(text[slice(*span)], text):
            assert 0 <= start < end <= len(text)
    assert count_words(text) >= 0
    comparable(text)


# ------------------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("A red ball lies on the grass.", 7),
        ("It's a dog's ball; don\u2019t touch.", 6),
        ("A well-lit red-and-white house", 4),
        ("It costs $3.50, or 1,000 yen.", 6),
        ("A ball - red \u2014 and * round !", 5),
        ("dog,cat,bird", 3),
        ("红色的球", 4),
        ("草地上有一个红色的球。", 10),
        ("緑の芝生", 4),
        ("テニスボール", 1),
        ("초록색 잔디 위에 빨간 공이 있습니다.", 6),
        ("हरी घास पर एक लाल गेंद है।", 7),
        ("كرة حمراء على العشب", 4),
        ("Một quả bóng đỏ", 4),
        ("一台iPhone手机", 5),
        ("r\u200be\u200bd \u00adball\u00ad", 2),
        ("🙂 👨\u200d👩\u200d👧 !!! ---", 0),
        ("", 0),
    ],
)
def test_lengths_in_words(text, length):
    assert measure_length(text, RewardConfig()) == length
    assert measure_length(unicodedata.normalize("NFD", text), RewardConfig()) == length


@pytest.mark.parametrize("language", VERBATIM)
def test_the_mask_acts_in_every_language(language):
    caption, _ = VERBATIM[language]
    config = RewardConfig()
    reference = measure_length(" ".join([caption] * 4), config)
    assert reference == 4 * measure_length(caption, config)
    assert is_outside_bounds(measure_length(caption, config), reference, config)
    assert is_outside_bounds(measure_length(" ".join([caption] * 12), config), reference, config)
    assert not is_outside_bounds(reference, reference, config)


def test_nothing_is_gained_by_what_no_reader_sees():
    text = "A red ball lies on the grass."
    for form in ("zero-width spaces", "joiners", "variation selectors", "tags", "soft hyphens", "isolates", "NFD"):
        assert count_words(FORMS[form](text)) == count_words(text), form


# ------------------------------------------------------------------------------------------------------ judged


def test_as_many_assertions_as_words_that_one_letter_can_be():
    assert most_assertions("狗，猫，鸟") >= 3
    assert most_assertions("개, 새") >= 2
    assert most_assertions("หมา แมว") >= 2
    assert most_assertions("A dog and a cat") == 1 + 11 // 2
    call = Call(TASKS["decompose"], {"reference": "狗，猫，鸟"})
    assert parse_reply(call, '{"units": ["有狗", "有猫", "有鸟"]}', RewardConfig().protocol)


def judged(text, verified=True):
    return JudgedAssertion(text=text, quote="红色的球", reason="", verified=verified, pointable=True)


@pytest.mark.parametrize("again", ["有一个红球。", "有一个红球！", "有一个红球｡", " 有一个红球 ", "有一个\u200b红球"])
def test_an_assertion_listed_twice_is_one_in_any_form(again):
    (one,) = merged_assertions("一个红色的球", [judged("有一个红球"), judged(again, verified=False)])
    assert not one.verified


def test_claims_that_differ_in_a_sign_stay_two():
    assert len(merged_assertions("红色的球", [judged("it is -5 degrees"), judged("it is 5 degrees")])) == 2


@pytest.mark.parametrize("language", VERBATIM)
def test_a_perfect_judge_gives_full_marks_in_every_language(language):
    caption, quotes = VERBATIM[language]

    def answer(asked):
        reply = plain_answer(asked)
        if asked.task == "verify":
            reply["assertions"] = [
                {"text": f"{i} {q}", "quote": q, "reason": "seen", "verified": True, "pointable": True}
                for i, q in enumerate(quotes)
            ]
        if asked.task == "match":
            reply["units"] = dict.fromkeys(asked.data["units"], True)
        return reply

    with ScriptedServer(answer) as server:
        reward = RewardConfig.model_validate({"judge": "endpoint", "protocol": {"model": "m"}})
        endpoint = EndpointConfig.model_validate({"servers": [{"url": server.url}], "cache": None})
        judge = EndpointJudge(reward, endpoint)
        (told,) = judge.score(Sample("s", small_image, caption, "?"), [caption])
        judge.close()
    assert not server.problems
    assert (told.precision, told.recall) == (1.0, 1.0)
    assert all(a.spans for a in told.assertions)


def small_image():
    from PIL import Image

    return Image.new("RGB", (32, 32), "red")
