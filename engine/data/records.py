"""From the files of a data set to plain records, and the account of what had to be left out.

A *record* names an image and holds its reference caption. A reader turns one format into records; what it cannot use it
hands to the ``LoadReport`` under a short reason. Only what spoils the data set as a whole raises (``DatasetError``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_EXAMPLES = 3
"""Examples kept of each reason for an exclusion."""
IMAGE_PLACEHOLDER = "<image>"


class DatasetError(ValueError):
    """A data set that cannot be used as a whole; the message says where and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One usable line of a data set."""

    sample_id: str
    image: str | int
    """A path relative to the image folder, or the row of a Hugging Face data set."""
    reference: str
    instruction: str
    facts: Any = None
    """What the data set knows of the image beyond the reference: questions, a rubric; plain JSON."""


@dataclass
class Exclusions:
    """What was left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class LoadReport:
    """What became of the records of a data set."""

    source: str
    """Kind and path of the data set."""
    num_records: int = 0
    """Records read, the excluded ones included."""
    num_train: int = 0
    num_eval: int = 0
    exclusions: dict[str, Exclusions] = field(default_factory=dict)
    """By reason."""

    @property
    def num_excluded(self) -> int:
        """Records that were left out."""
        return sum(e.count for e in self.exclusions.values())

    def exclude(self, reason: str, where: str) -> None:
        """Count one record as left out; ``where`` names it, and may say more."""
        entry = self.exclusions.setdefault(reason, Exclusions())
        entry.count += 1
        if len(entry.examples) < MAX_EXAMPLES:
            entry.examples.append(where)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.num_train:,} training and {self.num_eval:,} held-out samples"]
        if self.num_excluded:
            lines[0] += f"; {self.num_excluded:,} of {self.num_records:,} records left out"
        for reason, entry in sorted(self.exclusions.items(), key=lambda item: -item[1].count):
            lines.append(f"  {reason}: {entry.count:,}")
            lines += [f"    {example}" for example in entry.examples]
            if entry.count > len(entry.examples):
                lines.append("    ...")
        return "\n".join(lines)


def read_sharegpt4v(path: Path, instruction: str, report: LoadReport) -> list[Record]:
    """Read a JSON list of ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}``.

    The instruction is the first human turn without its image placeholder, the reference the first answer to it.
    """
    builder = RecordBuilder(instruction, report)
    for index, entry in enumerate(_read_json_list(path)):
        where = f"record {index}"
        if not isinstance(entry, dict):
            builder.exclude("not an object", where)
            continue
        question, answer = _first_exchange(entry.get("conversations"))
        builder.add(where, image=_path(entry), reference=answer, instruction=question, own_id=entry.get("id"))
    return builder.records


def read_jsonl(path: Path, instruction: str, report: LoadReport) -> list[Record]:
    """Read a ``{"image", "reference"}`` a line, optionally ``id``, ``instruction`` and ``facts``; blank lines do not count."""
    builder = RecordBuilder(instruction, report)
    for number, line in _lines(path):
        where = f"line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or nested without end
            builder.exclude("broken line", f"{where}: {error}")
            continue
        if not isinstance(entry, dict):
            builder.exclude("not an object", where)
            continue
        builder.add(
            where,
            image=_path(entry),
            reference=entry.get("reference"),
            instruction=entry.get("instruction"),
            own_id=entry.get("id"),
            facts=entry.get("facts"),
        )
    return builder.records


class RecordBuilder:
    """Holds each entry to what a record needs, counts those that fall short, and makes sample ids unique."""

    def __init__(self, instruction: str, report: LoadReport) -> None:
        self.records: list[Record] = []
        self._instruction = instruction
        self._report = report
        self._ids: set[str] = set()

    def exclude(self, reason: str, where: str) -> None:
        """Count an entry that became no record."""
        self._report.num_records += 1
        self._report.exclude(reason, where)

    def add(
        self,
        where: str,
        *,
        image: str | int | None,
        reference: Any,
        instruction: Any = None,
        own_id: Any = None,
        facts: Any = None,
    ) -> None:
        """Make a record, or count why not. ``where`` names the entry in the file, and tells equal ids apart."""
        if image is None:
            return self.exclude("no image", _named(where, own_id))
        caption = clean_text(reference)
        if not caption:
            return self.exclude("empty caption", _named(where, own_id))
        self._report.num_records += 1
        sample_id = self._unique_id(own_id, image if isinstance(image, str) else where, where)
        asked = clean_text(instruction).replace(IMAGE_PLACEHOLDER, "").strip() or self._instruction
        self.records.append(Record(sample_id, image, caption, asked, facts))
        return None

    def _unique_id(self, own_id: Any, fallback: str, where: str) -> str:
        sample_id = clean_text("" if own_id is None else str(own_id)) or clean_text(fallback)
        while sample_id in self._ids:
            sample_id = f"{sample_id} ({where})"
        self._ids.add(sample_id)
        return sample_id


def _path(entry: dict[str, Any]) -> str | None:
    image = entry.get("image")
    return image if isinstance(image, str) and image.strip() else None


def _named(where: str, own_id: Any) -> str:
    return where if own_id is None else f"{where} (id {str(own_id)[:80]!r})"


def clean_text(value: Any) -> str:
    """The text without surrounding space and without lone surrogates, which no tokenizer takes; "" if it is no text."""
    if not isinstance(value, str):
        return ""
    return value.encode("utf-8", "replace").decode().strip()


def _first_exchange(conversations: Any) -> tuple[str | None, str | None]:
    """The first human turn and the first answer after it."""
    question: str | None = None
    for turn in conversations if isinstance(conversations, list) else []:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            continue
        if turn.get("from") == "human" and question is None:
            question = turn["value"]
        elif turn.get("from") == "gpt" and question is not None:
            return question, turn["value"]
    return question, None


def _read_json_list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"data.path: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"data.path: {path} is not valid JSON: {error}") from error
    if not isinstance(content, list):
        raise DatasetError(
            f"data.path: {path} holds {type(content).__name__}, expected a JSON list of records "
            "(for one record a line, set data.kind to jsonl)"
        )
    return content


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, without the empty ones."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DatasetError(f"data.path: {path} cannot be read: {error.strerror}") from error
