"""Parses a judge model's reply and checks that it judges what was asked about.

A reply that fails raises a ``ReplyError`` of one of a few kinds, and no part of it is used.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from balcaprl.config import ProtocolConfig
from balcaprl.rewards.endpoint.protocol import (
    NO_ANSWER,
    NUMBERED,
    Call,
    DecomposeReply,
    JudgedAssertion,
    QuestionsReply,
    RecaptionReply,
    Reply,
    StyleReply,
    VerifyReply,
    most_assertions,
)
from balcaprl.rewards.endpoint.reply_text import find_objects, read_json, tidied
from balcaprl.rewards.unicode_text import find_phrase

FailureKind = Literal["empty", "not_json", "truncated", "schema", "count"]


class ReplyError(ValueError):
    """A reply that cannot be used; failures are counted by ``kind``. The message never quotes the reply."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


def parse_reply(call: Call, text: str, config: ProtocolConfig, *, finish_reason: str | None = None) -> Reply:
    """Parse and validate the reply to a call.

    Raises:
        ReplyError: the reply is empty, cut off, no JSON, of another schema, or does not judge what was asked about.
    """
    if finish_reason is not None and finish_reason.lower() in ("length", "max_tokens"):
        raise ReplyError("truncated", "the reply was cut at protocol.max_reply_tokens")
    if not text.strip():
        raise ReplyError("empty", "the reply is empty")
    try:
        return _validated(call, read_json(text), config)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ReplyError):
            raise
    return _found_in_prose(call, text, config)


def _found_in_prose(call: Call, text: str, config: ProtocolConfig) -> Reply:
    """Find the only verdict in a reply that holds more than a JSON object.

    A reply with two different verdicts is rejected. So is a verdict that also stands in the judged text, because the
    model may only have quoted it.
    """
    try:
        objects = find_objects(text)
    except (ValueError, RecursionError):
        objects = []
    valid: list[Reply] = []
    errors: list[ReplyError] = []
    for plain in objects:
        try:
            reply = _validated(call, plain, config)
        except ReplyError as error:
            errors.append(error)
            continue
        if reply not in valid:
            valid.append(reply)
    if len(valid) > 1:
        raise ReplyError("schema", "the reply holds verdicts that differ")
    if valid and valid[0] not in _verdicts_in_data(call, config):
        return valid[0]
    if valid:
        raise ReplyError("schema", "the reply's only verdict stands in the text that is judged")
    raise errors[-1] if errors else ReplyError("not_json", "the reply holds no whole JSON object")


def _verdicts_in_data(call: Call, config: ProtocolConfig) -> list[Reply]:
    """Verdicts that stand in a caption or reference and could pass for a reply."""
    found = []
    for key in ("caption", "reference"):
        try:
            objects = find_objects(str(call.data.get(key, "")))
        except (ValueError, RecursionError):
            objects = []
        for plain in objects:
            try:
                found.append(_validated(call, plain, config))
            except ReplyError:
                continue
    return found


def _validated(call: Call, plain: Any, config: ProtocolConfig) -> Reply:
    try:
        reply = call.task.reply.model_validate(tidied(plain, _fields_of(call.task.reply)))
    except ValidationError as error:
        where = ", ".join(".".join(map(str, e["loc"])) or "reply" for e in error.errors()[:3])
        raise ReplyError("schema", f"the reply does not fit its schema at {where[:120]}") from None
    _check_scores(reply, config)
    _check_counts(call, reply)
    return reply


def _fields_of(reply: type[Reply]) -> dict[str, Any]:
    """The keys of a reply and the kinds of their values, in the form that ``tidied`` takes."""
    kinds: dict[str, Any] = {}
    for name, field in reply.model_fields.items():
        if field.annotation == dict[str, bool]:
            kinds[name] = dict
        elif field.annotation == list[JudgedAssertion]:
            kinds[name] = _fields_of(JudgedAssertion)
        else:
            kinds[name] = field.annotation
    return kinds


def _check_scores(reply: Reply, config: ProtocolConfig) -> None:
    if not (isinstance(reply, StyleReply) and config.integer_scores):
        return
    if any(score != int(score) for score in (reply.clarity, reply.fluency, reply.coherence)):
        raise ReplyError("schema", "a grade is no whole number, and protocol.integer_scores is on")


def _check_counts(call: Call, reply: Reply) -> None:
    """Check that verdicts match the numbered things, that assertions are not too many, and that no text is blank."""
    for key, data_key in NUMBERED.items():
        verdicts, asked = getattr(reply, key, None), call.data.get(data_key)
        if isinstance(verdicts, dict) and isinstance(asked, dict) and verdicts.keys() != asked.keys():
            raise ReplyError("count", f"{len(verdicts)} verdicts on {len(asked)} things, or on others")
    if isinstance(reply, QuestionsReply):
        for number, answer in reply.answers.items():
            if answer != NO_ANSWER and answer not in call.data["questions"][number]["options"]:
                raise ReplyError("schema", f"answers.{number} is no letter of its question")
    if isinstance(reply, VerifyReply):
        most = most_assertions(call.data["caption"])
        if len(reply.assertions) > most:
            raise ReplyError("count", f"{len(reply.assertions)} assertions of a text that can make {most}")
    if isinstance(reply, DecomposeReply) and not all(unit.strip() for unit in reply.units):
        raise ReplyError("schema", "a unit is blank")
    if isinstance(reply, RecaptionReply) and not reply.caption.strip():
        raise ReplyError("schema", "the caption is blank")


def locate_quote(quote: str, caption: str) -> tuple[tuple[int, int], ...]:
    """All places of a quotation in a caption, as half-open character ranges; case, spaces and punctuation may differ.

    Differences that no reader sees are ignored too: how accents are stored, character width, invisible characters
    (``unicode_text``).
    """
    return find_phrase(quote, caption)
