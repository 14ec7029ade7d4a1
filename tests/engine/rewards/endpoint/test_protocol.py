"""What a judge model is shown and what it may answer."""

import base64
import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scripted_judge import take_apart

from balcaprl.config import ProtocolConfig
from balcaprl.data import ImageError
from balcaprl.rewards.endpoint.encoding import EncodedImage, encode_data, encode_image
from balcaprl.rewards.endpoint.protocol import (
    TASKS,
    Call,
    cache_key,
    messages,
    numbered,
    reply_schema,
    request_body,
)
from balcaprl.rewards.endpoint.reply_checks import ReplyError, locate_quote, parse_reply

CONFIG = ProtocolConfig(model="m")
IMAGE = EncodedImage("data:image/png;base64,aGVsbG8=", "digest")
UNITS = numbered(["a cat sits", "the mat is red"])
DATA = {
    "verify": {"caption": "A cat sits on a red mat."},
    "match": {"units": UNITS, "caption": "A cat sits."},
    "style": {"caption": "A cat sits."},
    "combined": {"units": UNITS, "caption": "A cat sits on a red mat."},
    "decompose": {"reference": "A cat sits."},
    "recaption": {"reference": "A cat sits."},
    "questions": {"questions": numbered([{"question": "What?", "options": {"A": "cat", "B": "dog"}}]), "caption": "A cat."},
    "rubric": {"criteria": numbered(["names the cat"]), "caption": "A cat."},
}  # fmt: skip
ASSERTION = {"text": "a cat sits", "quote": "cat sits", "reason": "seen", "verified": True, "pointable": True}
REPLIES = {
    "verify": {"assertions": [ASSERTION]},
    "match": {"units": {"1": True, "2": False}},
    "style": {"clarity": 5, "fluency": 4, "coherence": 1},
    "combined": {
        "assertions": [ASSERTION], "units": {"1": True, "2": False}, "clarity": 5, "fluency": 4, "coherence": 1,
    },
    "decompose": {"units": ["a cat sits"]},
    "recaption": {"caption": "A cat sits on a mat."},
    "questions": {"answers": {"1": "B"}},
    "rubric": {"criteria": {"1": True}},
}  # fmt: skip


def call_of(name, data=None):
    task = TASKS[name]
    return Call(task, data or DATA[name], IMAGE if task.needs_image else None)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_has_a_prompt_a_bounded_schema_and_takes_its_reply(name):
    call = call_of(name)
    assert "data" in call.task.prompt
    assert "instructions" in call.task.prompt
    reply = parse_reply(call, json.dumps(REPLIES[name]), CONFIG)
    assert json.loads(reply.model_dump_json()) == REPLIES[name]
    _assert_bounded(reply_schema(call, CONFIG))


def _assert_bounded(schema):
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema)
    if schema.get("type") == "object":
        assert schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])
        for each in schema["properties"].values():
            _assert_bounded(each)
    elif schema.get("type") == "array":
        assert schema["maxItems"] <= CONFIG.max_items
        _assert_bounded(schema["items"])
    elif schema.get("type") == "string":
        assert "enum" in schema or schema["maxLength"] <= 20_000
    else:
        assert schema.get("type") == "boolean" or "enum" in schema


@pytest.mark.parametrize("name", TASKS)
def test_schema_and_validation_agree(name):
    import jsonschema

    validator = jsonschema.Draft202012Validator(reply_schema(call_of(name), CONFIG))
    assert validator.is_valid(REPLIES[name])
    for key in REPLIES[name]:
        broken = {k: v for k, v in REPLIES[name].items() if k != key}
        assert not validator.is_valid(broken)
        with pytest.raises(ReplyError):
            parse_reply(call_of(name), json.dumps(broken), CONFIG)


def test_the_schema_allows_no_more_assertions_than_a_caption_can_make():
    for caption, most in (("A", 1), ("A cat", 3), ("word " * 200, CONFIG.max_items)):
        assert (
            reply_schema(call_of("verify", {"caption": caption}), CONFIG)["properties"]["assertions"]["maxItems"]
            == most
        )


def test_text_calls_carry_no_image_and_image_calls_need_one():
    with pytest.raises(ValueError, match="image: the task verify needs one"):
        Call(TASKS["verify"], {"caption": "x"})
    with pytest.raises(ValueError, match="image: the task style takes none"):
        Call(TASKS["style"], {"caption": "x"}, IMAGE)
    assert len(messages(call_of("match"))[1]["content"]) == 1
    assert [part["type"] for part in messages(call_of("verify"))[1]["content"]] == ["image_url", "text"]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("style", "", "empty"),
        ("style", "  \n", "empty"),
        ("style", '{"clarity": 5, "fluency": 4, "cohe', "not_json"),
        ("style", '{"clarity": 5, "fluency": NaN, "coherence": 1}', "not_json"),
        ("style", '{"clarity": 5, "fluency": Infinity, "coherence": 1}', "not_json"),
        ("style", '{"clarity": 5, "clarity": 1, "fluency": 4, "coherence": 1}', "not_json"),
        ("style", "[" * 100_000, "not_json"),
        ("style", '{"clarity": 5, "fluency": 1e400, "coherence": 1}', "schema"),
        ("style", '{"clarity": 6, "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": 0, "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": "9", "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": "4.5", "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": "-4", "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": "five", "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": true, "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": null, "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": 4.5, "fluency": 4, "coherence": 1}', "schema"),
        ("style", '{"clarity": 5, "fluency": 4, "coherence": 1, "bonus": 1}', "schema"),
        ("style", "5", "schema"),
        ("match", '{"units": {"1": true}}', "count"),
        ("match", '{"units": {"1": true, "2": true, "3": true}}', "count"),
        ("match", '{"units": {"1": true, "3": true}}', "count"),
        ("match", '{"units": {"1": true, "2": 1}}', "schema"),
        ("match", '{"units": [true, false]}', "schema"),
        ("verify", json.dumps({"assertions": [{**ASSERTION, "text": f"claim {i}"} for i in range(40)]}), "count"),
        ("verify", json.dumps({"assertions": [{**ASSERTION, "text": ""}]}), "schema"),
        ("questions", '{"answers": {"1": "C"}}', "schema"),
        ("decompose", '{"units": []}', "schema"),
        ("decompose", '{"units": [" "]}', "schema"),
        ("recaption", '{"caption": " "}', "schema"),
    ],
)
def test_bad_replies_are_refused_by_kind(name, text, kind):
    with pytest.raises(ReplyError) as caught:
        parse_reply(call_of(name), text, CONFIG)
    assert caught.value.kind == kind
    assert "bonus" not in str(caught.value) or kind == "schema"


def test_a_reply_that_was_cut_is_refused_even_if_it_parses():
    with pytest.raises(ReplyError) as caught:
        parse_reply(call_of("style"), json.dumps(REPLIES["style"]), CONFIG, finish_reason="length")
    assert caught.value.kind == "truncated"


def test_raw_control_characters_in_strings_are_taken():
    """vLLM's schema-constrained replies hold them: xgrammar's grammar for strings with a maxLength does not exclude them."""
    text = '{"assertions": [{"text": "a\x1d\n", "quote": "A cat", "reason": "", "verified": true, "pointable": true}]}'
    assert parse_reply(call_of("verify"), text, CONFIG).assertions[0].text == "a\x1d\n"


def test_fractions_count_only_where_they_are_allowed():
    text = '{"clarity": 4.5, "fluency": 4, "coherence": 1}'
    fractions = ProtocolConfig(model="m", integer_scores=False)
    assert parse_reply(call_of("style"), text, fractions).clarity == 4.5
    assert reply_schema(call_of("style"), fractions)["properties"]["clarity"]["type"] == "number"


# ------------------------------------------------------------------------------------------------------ encoding

STRUCTURE = set("<>|[]{}`&")


@given(st.text())
def test_any_text_survives_and_shows_nothing_structural(text):
    encoded = encode_data({"caption": text})
    assert json.loads(encoded) == {"caption": text}
    inside = encoded[len('{"caption": ') : -1]
    assert not STRUCTURE & set(inside)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in inside)
    encoded.encode("utf-8")


def test_readable_text_stays_readable():
    for text in ("Une élève à la fenêtre.", "一只猫坐在红色的垫子上。", "قطة", '50% off "sale"'):
        assert text.replace('"', '\\"') in encode_data(text)


def test_only_plain_data_is_shown():
    with pytest.raises(TypeError, match="float is not shown"):
        encode_data({"caption": 0.5})


def test_images_are_encoded_from_pixels_alone(tmp_path):
    info = PngInfo()
    info.add_text("Comment", "the secret place")
    image = Image.new("RGB", (300, 200), "red")
    exif = Image.Exif()
    exif[0x010E] = "the secret place"
    image.save(tmp_path / "a.png", pnginfo=info, exif=exif)
    loaded = Image.open(tmp_path / "a.png")
    loaded.info["comment"] = b"the secret place"
    for image_format in ("png", "jpeg"):
        encoded = encode_image(loaded, max_pixels=10_000, image_format=image_format)
        body = request_body(Call(TASKS["verify"], {"caption": "x"}, encoded), CONFIG, "m")
        sent = take_apart(body).image
        assert b"secret" not in sent
        assert b"Exif" not in sent
        (tmp_path / "sent").write_bytes(sent)
        with Image.open(tmp_path / "sent") as again:
            assert again.width * again.height <= 10_000
            assert again.format.lower() == image_format
            assert abs(again.convert("RGB").getpixel((5, 5))[0] - 255) < 8


# ------------------------------------------------------------------------------------------------------ keys


def test_the_cache_key_depends_on_everything_that_the_reply_depends_on(monkeypatch):
    base = cache_key(call_of("verify"), CONFIG)
    assert base == cache_key(call_of("verify"), ProtocolConfig(model="m"))
    others = [
        cache_key(call_of("verify", {"caption": "Another."}), CONFIG),
        cache_key(Call(TASKS["verify"], DATA["verify"], EncodedImage("u", "other")), CONFIG),
        cache_key(call_of("style"), CONFIG),
        cache_key(call_of("verify"), CONFIG, "as its server calls it"),
        cache_key(call_of("verify"), ProtocolConfig(model="other")),
        cache_key(call_of("verify"), ProtocolConfig(model="m", temperature=0.5)),
        cache_key(call_of("verify"), ProtocolConfig(model="m", max_reply_tokens=77)),
    ]
    monkeypatch.setitem(TASKS["verify"].__dict__, "identity", "verify.v2.x")
    others.append(cache_key(call_of("verify"), CONFIG))
    assert len({base, *others}) == len(others) + 1


# ------------------------------------------------------------------------------------------------------ quotations


@pytest.mark.parametrize(
    ("quote", "caption", "spans"),
    [
        ("a red cup", "There is a red cup.", ((9, 18),)),
        ("A RED, cup", "There is a red  cup.", ((9, 19),)),
        ("red", "red Red bred reddish red", ((0, 3), (4, 7), (21, 24))),
        ("", "anything", ()),
        ("...", "anything...", ()),
        ("blue", "There is a red cup.", ()),
        ("(.*)+", "aaaa (.*)+ aaaa", ()),
    ],
)
def test_quotations_are_found_where_they_stand(quote, caption, spans):
    assert locate_quote(quote, caption) == spans


@given(st.text(max_size=60), st.text(max_size=200))
def test_looking_for_any_quotation_in_any_text_ends(quote, caption):
    for start, stop in locate_quote(quote, caption):
        assert 0 <= start < stop <= len(caption)


@pytest.mark.parametrize(("size", "max_pixels", "usable"), [
    ((100, 20_000), 1_003_520, False), ((20_000, 100), 1_003_520, False), ((1, 900), 100_000, False),
    ((100, 20_000), 2_000_000, True), ((30, 4_500), 1_200, False), ((30, 3_000), 1_000, True), ((640, 480), 784, True),
])  # fmt: skip
def test_an_image_too_thin_for_a_judge_is_refused_before_and_after_it_is_shrunk(size, max_pixels, usable):
    image = Image.new("RGB", size)
    if not usable:
        with pytest.raises(ImageError, match="times longer than wide"):
            encode_image(image, max_pixels=max_pixels, image_format="png")
        return
    url = encode_image(image, max_pixels=max_pixels, image_format="png").url
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.width * sent.height <= max_pixels
    assert max(sent.size) <= 200 * min(sent.size)
