"""Plain records from the files of a data set, and the report of what had to be left out.

A *record* names an image and holds one reference caption. A reader turns one file format into records, and counts each
entry that it cannot use in the ``LoadReport`` under a short reason. Only a fault that makes the whole data set unusable
raises ``DatasetError``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from balcaprl.data.records.forms import IMAGE_PLACEHOLDER, Fields
from balcaprl.logtext import printable

MAX_EXAMPLES = 3
"""Most examples that are kept for each reason of exclusion."""
MAX_ID_CHARS = 200


class DatasetError(ValueError):
    """A data set cannot be used at all; the message says where the fault is and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One usable entry of a data set: an image and one reference caption."""

    sample_id: str
    image: str | int
    """A path, or the key with which an ``ImageColumn`` finds an embedded image."""
    reference: str
    instruction: str
    facts: Any = None
    """What the data set knows about the image beyond the reference, as plain JSON: questions, a rubric."""
    image_id: str = ""
    """Identifies the image: the same for all records of one image. ``RecordImages.checked`` fills it in."""


@dataclass
class Exclusions:
    """The records that were left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class LoadReport:
    """What became of the records of a data set."""

    source: str
    """Kind and path of the data set."""
    num_records: int = 0
    """Number of records read, including the excluded ones."""
    num_train: int = 0
    num_eval: int = 0
    num_eval_images: int | None = None
    """Number of held-out images; None for drawn scenes, where each image has one record."""
    exclusions: dict[str, Exclusions] = field(default_factory=dict)
    """The records that were left out, by reason."""

    @property
    def num_excluded(self) -> int:
        """Number of records that were left out."""
        return sum(e.count for e in self.exclusions.values())

    def exclude(self, reason: str, where: str) -> None:
        """Count one record as left out; ``where`` names the record, and may say more about it."""
        entry = self.exclusions.setdefault(reason, Exclusions())
        entry.count += 1
        if len(entry.examples) < MAX_EXAMPLES:
            entry.examples.append(printable(where, 400))

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.num_train:,} training and {self.num_eval:,} held-out samples"]
        if self.num_eval_images not in (None, self.num_eval):
            lines[0] += f" of {self.num_eval_images:,} images"
        if self.num_excluded:
            lines[0] += f"; {self.num_excluded:,} of {self.num_records:,} records left out"
        for reason, entry in sorted(self.exclusions.items(), key=lambda item: -item[1].count):
            lines.append(f"  {reason}: {entry.count:,}")
            lines += [f"    {example}" for example in entry.examples]
            if entry.count > len(entry.examples):
                lines.append("    ...")
        return "\n".join(lines)


class RecordBuilder:
    """Makes records from entries, counts the entries that cannot become records, and makes sample ids unique."""

    def __init__(self, instruction: str, report: LoadReport) -> None:
        self.records: list[Record] = []
        self._instruction = instruction
        self._report = report
        self._ids: set[str] = set()

    def exclude(self, reason: str, where: str) -> None:
        """Count an entry that cannot become a record."""
        self._report.num_records += 1
        self._report.exclude(reason, where)

    def add(self, where: str, fields: Fields, image: str | int) -> None:
        """Make one record per reference of an entry; a reference without text is counted as left out.

        Args:
            where: the entry's place in the file, for messages and to tell equal ids apart.
            fields: the contents of the entry.
            image: the image's path, or the key with which the image column finds an embedded image.
        """
        asked = clean_text(fields.instruction).replace(IMAGE_PLACEHOLDER, "").strip() or self._instruction
        for number, reference in enumerate(fields.references, 1):
            place = where if number == 1 else f"{where}, caption {number}"
            caption = clean_text(reference)
            if not caption:
                reason, fault = _why_unusable(reference)
                self.exclude(reason, f"{_named(place, fields.own_id)}: the caption {fault}")
                continue
            self._report.num_records += 1
            sample_id = self._unique_id(fields.own_id, image if isinstance(image, str) else where, place)
            self.records.append(Record(sample_id, image, caption, asked, fields.facts))

    def _unique_id(self, own_id: Any, fallback: str, where: str) -> str:
        """Return an unused id of one printable line, because ids appear in logs, messages and file names."""
        own = clean_text(str(own_id))[:MAX_ID_CHARS] if isinstance(own_id, str | int) else ""
        sample_id = printable(own or clean_text(fallback)[-MAX_ID_CHARS:], MAX_ID_CHARS)
        while sample_id in self._ids:
            sample_id = f"{sample_id} ({where})"
        self._ids.add(sample_id)
        return sample_id


def _why_unusable(reference: Any) -> tuple[str, str]:
    """Return the reason under which a reference without text is counted, and what is wrong with it."""
    if reference is None or isinstance(reference, str):
        return "empty caption", "is empty"
    return "caption is not text", f"is {type(reference).__name__}, expected text"


def _named(where: str, own_id: Any) -> str:
    return where if own_id is None else f"{where} (id {printable(repr(own_id), 80)})"


def clean_text(value: Any) -> str:
    """Return the stripped text without NUL, and with ``?`` for each lone surrogate; "" if it is not text.

    No tokenizer takes NUL or lone surrogates.
    """
    if not isinstance(value, str):
        return ""
    return value.encode("utf-8", "replace").decode().replace("\0", "").strip()
