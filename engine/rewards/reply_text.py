"""The JSON objects in what a judge model writes, where it writes more than one JSON object.

Models put thoughts before their answer, fences around it and words beside it. What is looked for are whole objects at the top
level of the text, after the thoughts. One that begins as JSON and does not end as such spoils the whole text: no part of a
damaged reply is ever taken for a reply.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

_THOUGHTS = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)
_END_OF_THOUGHTS = r"</(?:think|thinking|thought|reasoning)>"
_OBJECT = re.compile(r"\{\s*[\"}]")
"""How a JSON object begins; other braces are prose."""
_NUMBER = re.compile(r"\s*\d(?:\.\d+)?\s*")
_TRUTH = {"true": True, "false": False}


def read_json(text: str) -> Any:
    """One JSON value, each key once, no infinities.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return _decoder().decode(text)


def find_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, in order, thoughts left out.

    Raises:
        ValueError, RecursionError: one is damaged, or the thoughts never end.
    """
    text = _without_thoughts(text)
    found, place = [], 0
    while (start := _OBJECT.search(text, place)) is not None:
        value, place = _decoder().raw_decode(text, start.start())
        found.append(value)
    return found


def _without_thoughts(text: str) -> str:
    """Marked thoughts stand at the beginning; some servers swallow the mark that begins them."""
    begin = _THOUGHTS.match(text)
    end = re.compile(_END_OF_THOUGHTS, re.IGNORECASE).search(text)
    if begin is not None:
        if end is None:
            raise ValueError("the thoughts never end")
        return text[end.end() :]
    if end is None:
        return text
    first = _OBJECT.search(text)
    if first is not None and first.start() < end.start():
        try:
            if _decoder().raw_decode(text, first.start())[1] > end.start():
                return text  # the mark stands inside an object's text
        except ValueError:
            pass
    return text[end.end() :]


def tidied(plain: Any, fields: dict[str, Any]) -> Any:
    """An object without comments, its grades and truth values as such.

    Models add texts of their own under further keys ("explanation"), and write "4" for 4 and "true" for true. Texts and nothing
    under a further key are left out; a number or a verdict there stays, and is refused later: another question was answered.

    Args:
        plain: what was read.
        fields: the keys that are asked for, each with ``float``, ``bool``, ``str``, ``dict`` of truth values, or the fields of
            the objects in a list.
    """
    if not isinstance(plain, dict):
        return plain
    kept = {key: value for key, value in plain.items() if key in fields or not _is_comment(value)}
    return {key: _tidied_value(value, fields.get(key)) for key, value in kept.items()}


def _tidied_value(value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if kind is bool and isinstance(value, str):
        return _TRUTH.get(value.strip().lower(), value)
    if kind is dict and isinstance(value, dict):
        return {key: _tidied_value(item, bool) for key, item in value.items()}
    if isinstance(kind, dict) and isinstance(value, list):
        return [tidied(item, kind) for item in value]
    return value


def _is_comment(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_comment, value)))


def _decoder() -> json.JSONDecoder:
    # strict=False: servers' grammars for bounded strings let raw control characters through (xgrammar's does).
    return json.JSONDecoder(strict=False, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        raise ValueError("a key stands twice")
    return plain
