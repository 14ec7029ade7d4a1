"""How an attempt at a judge server can fail, and whose fault that is: the one place that knows servers' ways of saying no.

A failure has a *kind*, which is counted and logged, and each kind a *blame*, which decides what follows:

========  ==========================================================================================================
overload  the server has no room now; others are tried, this one later
server    the server is not well; the request is made again, the breaker counts
reply     the server answered in time, and the reply is no good; it is asked for again
item      this very request can never succeed here, for its picture or text is refused: left out, never asked again
form      no request in this form can succeed, whatever it is about: an option that the server does not know
access    the server does not want us: wrong key, address or model, or no money left
========  ==========================================================================================================

Servers tell it by status, by a code, by words alone, or by the form of a reply with status 200. A refusal whose reason is not
told (a bare 400) is taken for the item's; whether it is not rather all requests that are refused is seen by
``refusals.RefusalWatch``, which looks at what happens to the others.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

HOPELESS = -1
"""Weight of a failure after which no further attempt is made."""


class Blame(StrEnum):
    """Whose fault a failure is."""

    OVERLOAD = "overload"
    SERVER = "server"
    REPLY = "reply"
    ITEM = "item"
    FORM = "form"
    ACCESS = "access"


BLAME = {
    "overloaded": Blame.OVERLOAD,
    "timeout": Blame.SERVER,
    "connection": Blame.SERVER,
    "server_error": Blame.SERVER,
    "content_filter": Blame.ITEM,  # a filter of the provider's
    "declined": Blame.ITEM,  # the model itself
    "image": Blame.ITEM,  # broken, too large, too narrow, of a type that is not taken
    "too_long": Blame.ITEM,
    "bad_request": Blame.ITEM,  # no reason told
    "unsupported": Blame.FORM,
    "refused": Blame.ACCESS,
    "quota": Blame.ACCESS,
}
"""Kind -> blame; all other kinds are replies that are no good."""


class AttemptError(Exception):
    """One attempt that brought no valid reply."""

    def __init__(
        self, kind: str, message: str, *, words: str = "", weight: int | None = None, wait_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.blame = BLAME.get(kind, Blame.REPLY)
        self.words = words
        """What the server says, bounded, but with all captions and keys that it may repeat: redact before showing."""
        default = {Blame.OVERLOAD: 0, Blame.ITEM: HOPELESS}.get(self.blame, 1)
        self.weight = default if weight is None else weight
        """How many of ``max_attempts`` it uses up; ``HOPELESS``: all."""
        self.wait_s = wait_s
        """How long the server asks to wait."""
        self.server_is_sound = False
        """Whether the server answers others well."""


# ------------------------------------------------------------------------------------------------------ errors

_MAX_WORDS = 500
_CODES = (
    ("quota", r"insufficientquota|quotaexceeded|billing|arrearage|insufficientbalance|creditbalance|paymentrequired"),
    ("refused", r"modelnot|invalidmodel|unknownmodel|invalidapikey|authentication|permissiondenied|unauthorized"),
    (
        "content_filter",
        r"contentfilter|contentpolicy|policyviolation|contentmanagement|datainspection|moderation|safety|prohibitedcontent"
        r"|blocklist|guardrail|sensitive|unsafe|inappropriate|riskcontrol|contentrisk|recitation|invalidprompt",
    ),
    ("image", r"image(?!input)|invalidbase64|unsupportedmedia"),
    ("too_long", r"contextlength|contextwindow|toolong|toomanytokens|toolarge|abovemaxlength|maxtokensexceeded"),
    ("unsupported", r"unsupported|unknownparam|unrecognized|extraforbidden"),
)
"""Kind, and the codes that mean it, written small and without signs. The first that fits counts."""
_WORDS = (
    ("quota", r"insufficient.{0,20}(quota|balance|funds|credit)|exceeded your current quota|credit balance is too low"),
    (
        "content_filter",
        r"content.{0,20}(filter|management|policy|policies|exists risk|guidelines)|usage (policy|policies|guidelines)"
        r"|safety|moderation|inappropriate|violat\w+ .{0,40}(polic|guideline|terms)|prohibited|sensitive|unsafe"
        r"|responsible ai|was flagged|been flagged",
    ),
    (
        "too_long",
        r"context (length|window|size)|maximum (context|model|input)|too many tokens|(prompt|input|request|text) is too l"
        r"|longer than the (max|model)|exceeds? .{0,40}(token|context|max_model_len)|reduce the length|too large for"
        r"|must be at least 1, got -",
    ),
    (
        "unsupported",
        r"(unsupported|unknown|unrecognized|unexpected|unpermitted|invalid) (request )?(parameter|field|argument|value|option|"
        r"keyword)|extra inputs? (are|is) not permitted|extra_forbidden|response_format|json_schema|guided|xgrammar"
        r"|chat_template|is not supported with this model",
    ),
    ("image", r"\bimages?\b|image_url|base64|multimodal|multi-modal|pixels?\b|aspect ratio"),
)
"""Kind, and the words that mean it, where no code says it."""
_OUR_FIELDS = frozenset(
    (
        "temperature",
        "max_tokens",
        "max_completion_tokens",
        "response_format",
        "chat_template_kwargs",
        "model",
        "extra_body",
    )
)


@dataclass(frozen=True)
class _ToldError:
    """What an error object says."""

    message: str
    codes: tuple[str, ...]
    """Codes, types and reasons, written small and without signs."""
    field: str
    """Field of the request that it complains of, if told."""


def error_of_status(status: int, headers: Any, payload: bytes, longest_wait_s: float) -> AttemptError:
    """What a reply with a status other than 200 means.

    Args:
        status: of HTTP; or the one that an error object inside a reply with status 200 tells.
        headers: a mapping that ignores case.
        payload: the reply's first bytes.
        longest_wait_s: bound of the wait that the server may ask for.
    """
    told = _told_error(payload)
    message = f"the server answered HTTP {status}"
    kind = _kind_of(status, told)
    retry_after = headers.get("Retry-After")
    if kind is None and (status == 429 or (status == 503 and retry_after is not None)):
        return AttemptError("overloaded", message, words=told.message, wait_s=_seconds(retry_after, longest_wait_s))
    if kind is None:
        kind = _kind_of_status(status)
    if BLAME.get(kind) is Blame.ACCESS:
        message += ": check url, model and key" if kind == "refused" else ": the account has no quota or money left"
    return AttemptError(kind, message, words=told.message)


def error_inside(envelope: dict[str, Any], longest_wait_s: float) -> AttemptError | None:
    """The error or the refusal that a reply with status 200 is, if it is one.

    Providers send error objects with status 200, blocked prompts without choices, blocked replies with a finish reason of
    their own, and the model's own refusal in a field of the message.
    """
    choice = _first(envelope.get("choices"))
    for told in (envelope.get("error"), choice.get("error")):
        if told:
            code = told.get("code") if isinstance(told, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            return error_of_status(status, {}, json.dumps({"error": told}).encode(), longest_wait_s)
    feedback = envelope.get("promptFeedback") or envelope.get("prompt_feedback")
    if isinstance(feedback, dict) and (feedback.get("blockReason") or feedback.get("block_reason")):
        return AttemptError("content_filter", "the server blocked the prompt")
    message = _mapping(choice.get("message"))
    refusal = message.get("refusal") or _refusal_part(message.get("content"))
    if isinstance(refusal, str) and refusal.strip():
        return AttemptError("declined", "the model declined to answer", words=refusal[:_MAX_WORDS])
    reason = f"{choice.get('finish_reason')} {choice.get('native_finish_reason')}"
    if re.search(dict(_CODES)["content_filter"] + r"|refusal|spii", _plain(reason)):
        return AttemptError("content_filter", "the server blocked the reply")
    if message.get("content") is None and _is_filtered(choice.get("content_filter_results")):
        return AttemptError("content_filter", "the server blocked the reply")
    return None


def _kind_of(status: int, told: _ToldError) -> str | None:
    """By what the server says; None where it says nothing that is known, or may not mean it."""
    for kind, pattern in _CODES:
        if any(re.search(pattern, code) for code in told.codes):
            return kind if status != 429 or kind == "quota" else None
    if told.field in _OUR_FIELDS and status in (400, 404, 422):
        return "too_long" if re.search(dict(_WORDS)["too_long"], told.message.lower()) else "unsupported"
    if status not in (400, 403, 404, 413, 415, 422, 451):
        return None
    for kind, pattern in _WORDS:
        if re.search(pattern, told.message.lower()):
            return None if status == 403 and kind != "content_filter" else kind
    return None


def _kind_of_status(status: int) -> str:
    if status == 408:
        return "timeout"
    if status >= 500 or status in (409, 425):
        return "server_error"
    if status == 402:
        return "quota"
    if status in (401, 403, 404, 405, 407, 410) or 300 <= status < 400:
        return "refused"
    return {413: "too_long", 415: "unsupported", 451: "content_filter"}.get(status, "bad_request")


def _told_error(payload: bytes) -> _ToldError:
    """From the error objects of OpenAI, Azure, vLLM, FastAPI, Gemini, OpenRouter, DashScope and their like, or plain text."""
    text = payload.decode("utf-8", "replace").strip()
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError):
        markup = re.sub(r"<[^>]*>", " ", text)
        return _ToldError(" ".join(markup.split())[:_MAX_WORDS], (), "")
    messages, codes, fields = [], [], []
    for key, value in _leaves(plain):
        if key in ("message", "msg", "detail", "error", "raw"):
            messages.append(value)
        elif key in ("code", "type", "status", "reason", "reasons") and not value.isdigit():
            codes.append(_plain(value))
        elif key in ("param", "parameter", "loc"):
            fields.append(value)
    field = next((name for name in fields if name in _OUR_FIELDS), "")
    return _ToldError("; ".join(dict.fromkeys(messages))[:_MAX_WORDS], tuple(codes), field)


def _leaves(node: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Texts of an error object with the keys that they stand under; what it repeats of the request is not among them."""
    if isinstance(node, str | int) and not isinstance(node, bool):
        yield key, str(node)[:_MAX_WORDS]
    elif isinstance(node, list) and depth < 6:
        for item in node[:8]:
            yield from _leaves(item, key, depth + 1)
    elif isinstance(node, dict) and depth < 6:
        for name, item in list(node.items())[:24]:
            if name not in ("input", "ctx", "body", "headers", "messages"):
                yield from _leaves(item, str(name).lower(), depth + 1)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(choices: Any) -> dict[str, Any]:
    return _mapping(choices[0]) if isinstance(choices, list) and choices else {}


def _refusal_part(content: Any) -> Any:
    parts = content if isinstance(content, list) else []
    return next((part.get("refusal") for part in parts if isinstance(part, dict) and part.get("refusal")), None)


def _is_filtered(results: Any) -> bool:
    return isinstance(results, dict) and any(
        isinstance(r, dict) and r.get("filtered") is True for r in results.values()
    )


def _seconds(retry_after: str | None, longest_s: float) -> float | None:
    """A Retry-After header in seconds, bounded; None where there is none or it makes no sense."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), longest_s) if seconds == seconds else None
