"""The forms in which records come: which key holds what. Errors name the keys that were looked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from balcaprl.logtext import printable

IMAGE_KEYS = ("image", "images", "image_path", "file_name", "image_url")
"""The first of these keys that holds something gives the image."""
REFERENCE_KEYS = ("reference", "references", "caption", "captions", "text")
"""The first of these keys that holds something gives the reference caption, or a list of reference captions."""
TURN_KEYS = ("conversations", "messages")
"""Keys of a list of turns with ``from`` / ``value`` or ``role`` / ``content``. If neither holds a list, the lists in
``prompt`` and ``completion`` are joined and read in the same way."""
IMAGE_PLACEHOLDER = "<image>"
MAX_FACTS_DEPTH = 32

_QUESTION_ROLES = frozenset(("human", "user"))
_ANSWER_ROLES = frozenset(("gpt", "assistant", "model"))


class RecordError(ValueError):
    """An entry cannot become a record; ``reason`` is a short phrase for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Fields:
    """The contents of an entry."""

    image: Any
    """The image, in any form that ``image_source`` takes."""
    references: Sequence[Any]
    """At least one reference caption; not all need to be text."""
    instruction: str | None
    """The instruction, which may contain the image placeholder; None if the entry has no instruction."""
    own_id: Any
    facts: Any


@dataclass
class _Exchange:
    """The first question, the first answer after it, and the images that come with the question."""

    question: str | None = None
    answer: str | None = None
    images: Sequence[Any] = ()


def read_fields(entry: Mapping[str, Any], *, turns_first: bool, image: Any = None) -> Fields:
    """Find the image, the reference and the rest in one entry.

    Args:
        entry: a JSON object, or a row of a table.
        turns_first: if an entry has both an answer in its turns and a reference of its own, use the answer.
        image: the entry's image, if it is already known.

    Raises:
        RecordError: image or caption is missing, the instruction has several image placeholders, or the facts are
            nested too deep.
    """
    exchange = _first_exchange(_turns(entry))
    found = image if image is not None else _image(entry, exchange)
    own = next((entry[key] for key in REFERENCE_KEYS if _holds(entry.get(key))), None)
    answers = (exchange.answer, own) if turns_first else (own, exchange.answer)
    reference = next((answer for answer in answers if answer is not None), None)
    if reference is None:
        blank = any(isinstance(entry.get(key), str) for key in REFERENCE_KEYS)
        raise (
            RecordError("empty caption", "the caption is empty")
            if blank
            else RecordError(
                "no caption", f"no {', '.join(REFERENCE_KEYS)}, nor an answer in {', '.join(TURN_KEYS)}; {_keys(entry)}"
            )
        )
    own_instruction = entry.get("instruction")
    instruction = own_instruction if isinstance(own_instruction, str) else exchange.question
    if (instruction or "").count(IMAGE_PLACEHOLDER) > 1:
        raise RecordError("several images", f"the instruction has several {IMAGE_PLACEHOLDER}, expected one at most")
    facts = entry.get("facts")
    if _is_deeper(facts, MAX_FACTS_DEPTH):
        raise RecordError("facts nested too deep", f"facts are nested deeper than {MAX_FACTS_DEPTH} levels")
    references = reference if isinstance(reference, list | tuple) else (reference,)
    return Fields(found, references, instruction, entry.get("id"), facts)


def _image(entry: Mapping[str, Any], exchange: _Exchange) -> Any:
    found = next((entry[key] for key in IMAGE_KEYS if _holds(entry.get(key))), None)
    if found is not None:
        return found
    if exchange.images:
        return exchange.images
    raise RecordError("no image", f"no {', '.join(IMAGE_KEYS)}; {_keys(entry)}")


def _holds(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, list | tuple | Mapping) and not value)


def _keys(entry: Mapping[str, Any]) -> str:
    names = [printable(key, 40) for key in list(entry)[:12]]
    return f"its keys are {', '.join(names)}{', ...' if len(entry) > 12 else ''}" if names else "it is empty"


def _turns(entry: Mapping[str, Any]) -> list[Any]:
    for key in TURN_KEYS:
        if isinstance(entry.get(key), list):
            return entry[key]
    prompt, completion = entry.get("prompt"), entry.get("completion")
    return prompt + completion if isinstance(prompt, list) and isinstance(completion, list) else []


def _first_exchange(turns: list[Any]) -> _Exchange:
    exchange = _Exchange()
    for turn in turns:
        if not isinstance(turn, Mapping):
            continue
        role = turn.get("from") or turn.get("role")
        content = next((turn[key] for key in ("value", "content", "text") if turn.get(key) is not None), None)
        text, images = _parts(content)
        if text is None or not isinstance(role, str):
            continue
        if role.lower() in _QUESTION_ROLES and exchange.question is None:
            exchange.question, exchange.images = text, images
        elif role.lower() in _ANSWER_ROLES and exchange.question is not None:
            exchange.answer = text
            break
    return exchange


def _parts(content: Any) -> tuple[str | None, list[Any]]:
    """Return text and images of a turn's content.

    The content may be plain text, or a list of ``{"type": "text" | "image" | "image_url", ...}``.
    """
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        return None, []
    texts, images = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            if isinstance(part.get("text"), str):
                texts.append(part["text"])
            image = next((part[key] for key in IMAGE_KEYS if _holds(part.get(key))), None)
            if image is not None:
                images.append(image)
    return "\n".join(texts), images


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            item
            for each in layer
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not layer:
            return False
    return True
