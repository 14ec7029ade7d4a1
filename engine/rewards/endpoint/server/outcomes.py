"""How an attempt at a judge server can fail, and whose fault it is. Only this module knows how servers report errors.

A failure has a *kind*, which is counted and logged. Each kind has a *blame*, which decides what follows:

========  ==========================================================================================================
overload  the server has no room now; other servers are tried, and this one again later
server    the server is not well; the request is made again, and the circuit breaker counts the failure
reply     the server answered in time, but the reply cannot be used; it is asked for again
item      the request can never succeed, because its picture or text is refused; it is left out and not made again
form      no request in this form can succeed, whatever it is about: the server does not know an option
access    the server does not accept us: wrong key, address or model, or no money left
========  ==========================================================================================================

Servers report a failure by an HTTP status, by an error code, only in words, or inside a reply with status 200. A
refusal without a reason (a bare 400) is blamed on the item. ``refusals.RefusalWatch`` looks at the other requests to
find out whether all of them are refused.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

HOPELESS = -1
"""Weight of a failure after which no further attempt is made."""


class Blame(Enum):
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
    "content_filter": Blame.ITEM,  # a filter of the provider blocked it
    "declined": Blame.ITEM,  # the model itself refused
    "image": Blame.ITEM,  # broken, too large, too narrow, or of a type that is not accepted
    "too_long": Blame.ITEM,
    "bad_request": Blame.ITEM,  # no reason given
    "unsupported": Blame.FORM,
    "refused": Blame.ACCESS,
    "quota": Blame.ACCESS,
}
"""Kind -> blame; every other kind has the blame ``REPLY``."""


class Unreached(Enum):
    """Why no connection to a server could be made."""

    REFUSED = "refused"
    SILENT = "silent"
    DNS = "dns"
    TLS = "tls"


class AttemptError(Exception):
    """One attempt that brought no valid reply."""

    def __init__(
        self, kind: str, message: str, *, words: str = "", weight: int | None = None, wait_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.blame = BLAME.get(kind, Blame.REPLY)
        self.words = words
        """What the server says, cut to a bounded length. It may repeat captions and keys: redact before showing."""
        default = {Blame.OVERLOAD: 0, Blame.ITEM: HOPELESS}.get(self.blame, 1)
        self.weight = default if weight is None else weight
        """How many of ``max_attempts`` this failure uses up; ``HOPELESS``: all."""
        self.unreached: Unreached | None = None
        """Why no connection to the server was made, if that is the failure and the reason is known; otherwise None."""
        self.wait_s = wait_s
        """Seconds that the server asks to wait; None if it does not ask."""
        self.server = ""
        """Url of the server that was asked; empty if none was."""
        self.server_is_sound = False
        """Whether the server answers most requests with a valid reply."""


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
"""Kind -> pattern of the error codes that mean it, in lower case without punctuation; the first match counts."""
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
"""Kind -> pattern of the words that mean it, in lower case; used when no code tells the kind."""
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
    """What an error object from a server says."""

    message: str
    codes: tuple[str, ...]
    """Codes, types and reasons, in lower case without punctuation."""
    field: str
    """Field of our request that the error complains about; empty if it names none."""


def error_of_status(status: int, headers: Any, payload: bytes, longest_wait_s: float) -> AttemptError:
    """Translate a reply with a status other than 200 into an error.

    Args:
        status: the HTTP status, or the status in an error object inside a reply with status 200.
        headers: the reply's headers, a mapping; the case of the names does not matter.
        payload: the reply's first bytes.
        longest_wait_s: upper bound in seconds of the wait that the server may ask for.
    """
    told = _told_error(payload)
    message = f"the server answered HTTP {status}"
    kind = _kind_of(status, told)
    if kind is None and status in (429, 503):
        wait_s = asked_wait_s(headers, longest_wait_s)
        if status == 429 or wait_s is not None:
            return AttemptError("overloaded", message, words=told.message, wait_s=wait_s)
    if kind is None:
        kind = _kind_of_status(status)
    if BLAME.get(kind) is Blame.ACCESS:
        message += ": check url, model and key" if kind == "refused" else ": the account has no quota or money left"
    return AttemptError(kind, message, words=told.message)


def error_inside(envelope: dict[str, Any], longest_wait_s: float) -> AttemptError | None:
    """The error or refusal inside a reply with status 200, or None if the reply holds neither.

    Providers send error objects with status 200, report blocked prompts without any choices, mark blocked replies by a
    finish reason of their own, and put the model's own refusal into a field of the message.
    """
    choice = _first(envelope.get("choices"))
    for told in (envelope.get("error"), choice.get("error"), envelope if _is_error(envelope) else None):
        if told:
            code = told.get("code") if isinstance(told, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            headers = _mapping(_mapping(_mapping(told).get("metadata")).get("headers"))
            return error_of_status(status, headers, json.dumps({"error": told}).encode(), longest_wait_s)
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
    """The kind of failure that the server's words mean; None if they are unknown, or unreliable with this status."""
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
    """Read a server's error object or plain text.

    Knows the error objects of OpenAI, Azure, vLLM, FastAPI, Gemini, OpenRouter, DashScope and similar services.
    """
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
    """Yield each text in an error object with the key that it stands under; skips fields that repeat the request."""
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


def _is_error(envelope: dict[str, Any]) -> bool:
    """Whether a reply without choices is itself the error object, as some services send it."""
    is_marked = envelope.get("object") == "error" or {"code", "message"} <= envelope.keys()
    return is_marked and not envelope.get("choices")


def _is_filtered(results: Any) -> bool:
    return isinstance(results, dict) and any(
        isinstance(r, dict) and r.get("filtered") is True for r in results.values()
    )


# ------------------------------------------------------------------------------------------------------ waiting

_EPOCH = 1e9
"""A larger number of seconds is a date, not a duration."""
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
_RESETS = ("requests", "tokens", "input-tokens", "output-tokens")


def asked_wait_s(headers: Mapping[str, Any], longest_s: float) -> float | None:
    """Seconds that a server asks to wait, at most ``longest_s``; None if it gives no sensible time.

    The time comes from ``Retry-After-Ms``, ``Retry-After`` (seconds or a date), or the moment at which a rate limit is
    reset. Of several limits, the latest reset of those that are used up counts; if none is marked as used up, the
    soonest reset counts.
    """
    plain = {str(name).lower(): str(value).strip() for name, value in headers.items()}
    for name, unit in (("retry-after-ms", 1e-3), ("x-ms-retry-after-ms", 1e-3), ("retry-after", 1.0)):
        seconds = _seconds(plain.get(name, ""), unit)
        if seconds is not None:
            return min(seconds, longest_s)
    resets, used_up = [], []
    for prefix in ("x-ratelimit", "ratelimit", "anthropic-ratelimit"):
        for limit in ("", *_RESETS):
            for name in (f"{prefix}-reset-{limit}".rstrip("-"), f"{prefix}-{limit}-reset"):
                seconds = _seconds(plain.get(name, ""), 1.0)
                if seconds is not None:
                    resets.append(seconds)
                    remaining = name.replace("reset", "remaining")
                    used_up += [seconds] if plain.get(remaining) in ("0", "0.0") else []
    if not resets:
        return None
    return min(max(used_up) if used_up else min(resets), longest_s)


def _seconds(text: str, unit: float) -> float | None:
    """Read seconds to wait from a number, a duration such as ``1m30s`` or ``20ms``, or a date (seconds, ms or text)."""
    try:
        number = float(text)
    except ValueError:
        return _seconds_of_text(text)
    if not math.isfinite(number):
        return None
    if number * unit > _EPOCH:
        return _until(number * unit / (1000.0 if number * unit > 1000 * _EPOCH else 1.0))
    return max(0.0, number * unit)


def _until(date_s: float) -> float | None:
    """Seconds until a date; None if the date has passed."""
    seconds = date_s - time.time()
    return seconds if seconds > 0 else None


def _seconds_of_text(text: str) -> float | None:
    duration = _DURATION.fullmatch(text) if text and len(text) < 40 else None
    if duration is not None:
        days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in duration.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds + milliseconds / 1000
    for read in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            return _until(read(text.replace("Z", "+00:00")).timestamp())
        except (ValueError, OverflowError, TypeError):
            continue
    return None


# ------------------------------------------------------------------------------------------------------ contents


def text_of(content: Any) -> Any:
    """The text of a message: the content itself, its text parts joined if it comes in parts, or "" if there is none."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict | str) for part in content):
        texts = [part if isinstance(part, str) else part.get("text") for part in content if not _is_thought(part)]
        return "".join(text for text in texts if isinstance(text, str))
    return content


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") not in (None, "text", "output_text")
