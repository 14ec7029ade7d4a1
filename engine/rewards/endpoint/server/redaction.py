"""Makes messages of servers and foreign code fit for a log: one short line without keys or the texts that are judged.

Only what is likely a key is hidden, because an error can be understood only with its names, numbers and quotations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from balcaprl.logtext import printable

_MAX_CHARS = 300
_MIN_PRIVATE_CHARS = 4  # replacing "A." everywhere would only garble the error
_MIN_QUOTE_CHARS = 20
_END_CHARS = 8
_HIDDEN = "<redacted>"

_QUOTED = re.compile(r"(?<!\w)(['\"])((?:\\.|(?!\1).)*)\1(?!\w)")
"""Short quotations are matched too, so that the text between two of them is not taken for a quotation."""
_VALUE = r"[^\s'\"\\&;,(){}\[\]<>]+"
_ALWAYS = (
    re.compile(
        rf"(?i)\b(?:proxy-)?authorization\\?['\"]?\s*[:=]\s*\\?['\"]?(?:(?:bearer|basic|token|digest)\s+)?({_VALUE})"
    ),
    # A field or an assignment. In a sentence such as "invalid API key: check it", the value must look like a key.
    re.compile(
        r"(?i)(?:api[-_ ]?key|access[-_]?key|private[-_]?key|(?:access|auth|refresh|id|session)[-_]?token|passw(?:or)?d|pwd"
        r"|secret|client[-_]?secret|credentials?)"
        rf"(?:\\?['\"]\s*[:=]\s*\\?['\"]?|\s*=\s*\\?['\"]?|(?<=-key)\s*:\s*)({_VALUE})"
    ),
    re.compile(r"//([^/\s@]+)@"),  # user and password of a URL
    re.compile(r"\b(sk[-_][\w*.-]{7,})"),  # some services repeat a key with asterisks in its middle
    re.compile(r"\b(eyJ[\w-]{8,}(?:\.[\w-]*)*)"),  # a JSON web token
    re.compile(r"(?i)\b([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\b"),
)
"""Patterns whose first group is a key, whatever it looks like."""
_IF_ALIKE = (
    re.compile(r"(?i)\b(?:bearer|basic)\s+([\w.~+/=*-]+)"),
    re.compile(
        rf"(?i)(?:key|token|passw(?:or)?d|secret|sig|signature|credentials?)\\?['\"]?\s*[:=]\s*\\?['\"]?({_VALUE})"
    ),
    re.compile(r"\b((?:pk|rk|hf|gh[a-z]|github_pat|gsk|xai|nvapi|r8|glpat|xox[a-z]|pplx|csk|fw|tgp|dop)[-_][\w-]{8,})"),
    re.compile(r"\b((?:AKIA|ASIA|AIza)[\w-]{12,})"),
)
"""Patterns whose first group is a key if it looks like one (``_is_mixed``)."""
_TOKEN = re.compile(r"[\w-]{16,}")


def redact(text: str, private: Sequence[str]) -> str:
    """Return the text on one short line, without the ``private`` texts, quotations from them, or likely keys."""
    forms = [form for secret in private for form in (secret, repr(secret)[1:-1]) if len(form) >= _MIN_PRIVATE_CHARS]
    for form in forms:
        text = text.replace(form, "<caption>")
    text = text[: 4 * _MAX_CHARS]
    text = _QUOTED.sub(lambda match: "<quotation>" if _is_part(match[2], forms) else match[0], text)
    for pattern in _ALWAYS:
        text = pattern.sub(_without_group, text)
    for pattern in _IF_ALIKE:
        text = pattern.sub(lambda match: _without_group(match) if _is_mixed(match[1]) else match[0], text)
    text = _TOKEN.sub(lambda match: _HIDDEN if _is_random(match[0]) else match[0], text)
    return printable(" ".join(text.split())[:_MAX_CHARS], _MAX_CHARS)


def _without_group(match: re.Match[str]) -> str:
    before, after = match.start(1) - match.start(), match.end(1) - match.start()
    return match[0][:before] + _HIDDEN + match[0][after:]


def _is_part(quotation: str, private: Sequence[str]) -> bool:
    """Whether a long quotation comes from a private text; only its ends are compared: the middle may be left out."""
    ends = quotation[:_END_CHARS], quotation[-_END_CHARS:]
    return len(quotation) >= _MIN_QUOTE_CHARS and any(end in form for form in private for end in ends)


def _is_mixed(text: str) -> bool:
    """Whether a value looks like a key: 16 or more characters, or 6 or more that mix letters and digits, or cases."""
    text = text.rstrip(".:!?")
    letters, digits = any(map(str.isalpha, text)), any(map(str.isdigit, text))
    both_cases = any(map(str.isupper, text[1:])) and any(map(str.islower, text))
    return len(text) >= 6 and ((letters and digits) or both_cases or len(text) >= 16)


def _is_random(token: str) -> bool:
    """Whether a token mixes letters and digits as no name does: in one long part, or in three or more parts."""
    mixed = [
        len(part)
        for part in re.split(r"[_-]", token)
        if any(map(str.isalpha, part)) and any(map(str.isdigit, part)) and len(part) >= 4
    ]
    return max(mixed, default=0) >= 16 or (len(mixed) >= 3 and len(token) >= 20)
