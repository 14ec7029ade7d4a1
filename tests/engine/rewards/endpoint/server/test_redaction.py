"""What is shown of foreign messages: keys in every form are hidden, all else comes through as it was."""

import json

import pytest

from balcaprl.rewards.endpoint.server.redaction import redact

KEYS = [
    "sk-abcdefghijklmnopqrstuvwx",
    "sk-proj-Ab3dEf6hIj9kLmN0pQrStUvWxYz12345",
    "sk-ant-api03-AbCd_EfGh-1234567890abcdefXYZ",
    "sk-abc1****************wxyz",
    "hf_AbCdEfGhIjKlMnOpQr1234",
    "gsk_1a2b3c4d5e6f7g8h9i0j",
    "AIzaSyA1b2C3d4E5f6G7h8I9j0KlMnOpQrStUv",
    "AKIAIOSFODNN7EXAMPLE",
    "0123456789abcdef0123456789abcdef",
    "5f2b1c9e-8d3a-4b7f-9e6d-2a1c0b3d4e5f",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dBjftJeZ4CVP-mB92K27uhbUJU1p1r",
    "abcd1234-efgh5678-ijkl9012",
]
FORMS = [
    "Incorrect API key provided: {}. You can find it on your account page.",
    "no access with {}",
    "Authorization: Bearer {}",
    "authorization=bearer {} was refused",
    "the header Bearer {}, is not valid",
    "GET https://host/v1/chat?api_key={}&model=judge failed",
    "GET https://host/v1/chat?model=judge&key={}: 400",
    "https://user:{}@host/v1 is not reached",
    "{{'x-api-key': '{}', 'accept': 'json'}}",
    '{{"api_key": "{}", "model": "judge"}}',
    '{{"error": "{{\\"token\\":\\"{}\\"}}"}}',
    "OPENAI_API_KEY={} balcaprl train",
    "x-api-key: {}\nhost: a",
    "RuntimeError('{}')",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", FORMS)
def test_keys_are_hidden_wherever_they_stand(form, key):
    told = redact(form.format(key), [])
    assert key not in told
    assert not any(part in told for part in key.split("-") if len(part) >= 8)
    assert "<redacted>" in told


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer open", "open"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("Proxy-Authorization: letmein", "letmein"),
        ("password=letmein&user=me", "letmein"),
        ('{"password": "letmein"}', "letmein"),
        ("{'client_secret': 'letmein'}", "letmein"),
        ("x-api-key: letmein", "letmein"),
        ("http://me:letmein@host/v1", "letmein"),
        ("ACCESS_TOKEN=letmein", "letmein"),
        ("wrong password: hunter2", "hunter2"),
    ],
)
def test_short_keys_are_hidden_where_their_name_stands_before_them(text, secret):
    assert secret not in redact(text, [])


@pytest.mark.parametrize(
    "text",
    [
        "the field 'temperature' is not supported together with 'response_format' here",
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        'the option "chat_template_kwargs" cannot be used where "guided_json" is set, nor "top_k" at all',
        "The model `Qwen/Qwen2.5-VL-72B-Instruct-AWQ` does not exist.",
        "The model 'meta-llama/Llama-3.2-11B-Vision-Instruct' is not loaded; loaded is 'gpt-4o-mini-2024-07-18'",
        "This model's maximum context length is 4096 tokens, and it can't take the user's 12,345 tokens",
        "Authorization header is missing: use bearer authentication, not basic authentication",
        "Invalid API key: check your account",
        "missing key: 'choices'; unexpected token: expected a number",
        "KeyError: 'assertions'",
        "max_tokens=1024 exceeds the limit, prompt_token: 128000",
        "JSONDecodeError: Expecting ',' delimiter: line 3 column 17 (char 61)",
        "no file /home/user/models/Qwen3-VL-30B-A3B-Instruct-FP8/model-00001-of-00013.safetensors",
        "cannot identify image file <_io.BytesIO object at 0x7f3a2c1d>",
        "ClientConnectorCertificateError at https://judge.example.org:8000/v1/chat/completions",
        "it said 'a quotation of many words that is nobody's secret and no caption' and 'another'",
        "the data set was read on 2026-11-28T15:54:43.123456Z by balcaprl-0.9.1",
        "红色的球 'é ñ' and \"שלום\"",
        "line 3: expected a number",
        "",
    ],
)
def test_all_else_comes_through_unchanged(text):
    assert redact(text, ["A."]) == text


def test_private_texts_and_quotations_from_them_are_hidden():
    caption = "A secret cup\nstands on the 'table' beside a window, and nobody drinks from it."
    for text in (caption, repr(caption), json.dumps(caption), f"input_value={caption[:40]!r}, input_type=str"):
        told = redact(f"no JSON in {text} for 'units'", [caption])
        assert "secret cup" not in told
        assert told.startswith("no JSON in ")
        assert told.endswith("for 'units'")
    assert "secret" not in redact(f"input_value='{caption[:10]}...{caption[-15:]}'", [caption])


@pytest.mark.parametrize("piece", ["a-", "'", '"', "'a", "\\", "key=", "bearer ", "sk-", "//", "a1b2-"])
def test_it_is_short_and_fast_whatever_comes(piece):
    assert len(redact(piece * 500_000, [])) <= 300
