"""Finds the JSON objects in the text of a judge model that writes more than a single JSON object.

Models put thoughts before their answer, code fences around it and words beside it. Only whole objects at the top level
of the text, after the thoughts, are found. An object that begins as JSON but does not end as JSON makes the whole text
invalid, so that no part of a damaged reply is ever taken for a reply.
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
    """Decode one JSON value, in which no object repeats a key and neither Infinity nor NaN is written.

    Raises:
        ValueError, RecursionError: the text is no such value.
    """
    return _decoder().decode(text)


def find_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, in order, without those in the model's thoughts.

    Raises:
        ValueError, RecursionError: an object is damaged, or the thoughts never end.
    """
    text = _without_thoughts(text)
    found, place = [], 0
    while (start := _OBJECT.search(text, place)) is not None:
        value, place = _decoder().raw_decode(text, start.start())
        found.append(value)
    return found


def _without_thoughts(text: str) -> str:
    """Remove the tagged thoughts at a text's beginning; their opening tag may be missing: some servers swallow it."""
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
                return text  # the closing tag stands inside an object
        except ValueError:
            pass
    return text[end.end() :]


def tidied(plain: Any, fields: dict[str, Any]) -> Any:
    """An object without the model's comments, and with grades and truth values converted from strings.

    Models add texts of their own under unknown keys ("explanation"), and write "4" for 4 and "true" for true. Texts and
    nulls under an unknown key are left out. A number or a verdict there stays, and validation rejects it later, because
    the model answered another question.

    Args:
        plain: the decoded JSON value.
        fields: the keys that are asked for, each with ``float``, ``bool``, ``str``, ``dict`` (of truth values), or the
            fields of the objects in a list.
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
    # strict=False, because servers' grammars for bounded strings let raw control characters through (xgrammar's does).
    return json.JSONDecoder(strict=False, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        raise ValueError("a key stands twice")
    return plain
