"""Requests that can never succeed: remembered, so that none is made twice, and watched, so that no run learns from nothing.

A picture that a provider's filter blocks, or a text that exceeds the model's context, is refused however often it is sent. It
costs its own scores and nothing else. The memory is a file in the run's folder, so that a resumed run does not ask again;
remove the file to have everything asked for anew. It holds hashes and kinds, no text. What is refused is a call: picture, text
and settings. Where two calls were refused and none answered that differ in the caption alone, the picture or the reference is
taken for the cause, and calls about it are made no more.

But where *all* requests are refused it is no matter of single pictures: the model takes none, or the request's form is not
understood. Then the run ends, with the server's words. And nothing is remembered of a server that never answered a task: what
it refuses says something about the configuration, which may be mended before the run is resumed.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from balcaprl.rewards.outcomes import HOPELESS, AttemptError, Blame
from balcaprl.rewards.protocol import Call
from balcaprl.rewards.redaction import redact
from balcaprl.rewards.reference_units import open_for_append
from balcaprl.types import JudgeStoppedError

logger = logging.getLogger(__name__)

REFUSALS = "judge_refusals.jsonl"
_HEADER = {"format": "balcaprl judge refusals", "version": 1}
_ENOUGH_CALLS = 2
_FIRST = 8
_LATER = 32
_ROUNDS = 4
_MAX_LOGGED = 20


class CallFailedError(RuntimeError):
    """A call that brought no valid reply after all attempts; the message names the last failure."""


class CallRefusedError(CallFailedError):
    """A call that can never succeed, for what it is about; ``kind`` is that of the failure, see ``outcomes``."""

    def __init__(self, message: str, kind: str, words: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.words = words
        """The server's, fit for a log; empty where it said nothing, or said it in an earlier run."""


@dataclass(frozen=True)
class CallIdentity:
    """What a call is known by."""

    by_model: dict[str, bytes]
    """Keys of the reply cache, by what the servers call the model."""
    key: bytes
    """Of the call, at all servers together."""
    subject: bytes | None
    """Of what it shares with others about the same picture or reference."""


def refusals_path(output: Path) -> Path:
    """Where the refusals lie that came up while a file was written."""
    return output.with_name(output.name + ".refused.jsonl")


class RefusalMemory:
    """Which calls were refused for good, over restarts where there is a file.

    Args:
        path: the file, or None: remembered for as long as this object lives.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._calls: dict[bytes, str] = {}
        self._subjects: dict[bytes, Counter[str]] = defaultdict(Counter)
        self._answered: set[bytes] = set()
        self._trusted: set[str] = set()
        self._waiting: dict[str, list[dict[str, str]]] = defaultdict(list)
        self._file: BinaryIO | None = None
        if path is not None and path.is_file() and path.stat().st_size:
            self._load(path)

    def known(self, key: bytes, subject: bytes | None) -> str | None:
        """The kind of refusal that a call would meet, or None where it may be made."""
        kind = self._calls.get(key)
        if kind is None and subject is not None and subject not in self._answered and subject in self._subjects:
            kinds = self._subjects[subject]
            kind = kinds.most_common(1)[0][0] if kinds.total() >= _ENOUGH_CALLS else None
        return kind

    def add(self, task: str, key: bytes, subject: bytes | None, kind: str) -> None:
        """A call was refused for good."""
        line = {"key": key.hex(), "kind": kind, **({} if subject is None else {"subject": subject.hex()})}
        self._take(line)
        self._waiting[task].append(line)
        if task in self._trusted:
            self._write(task)

    def note_answered(self, task: str, subject: bytes | None) -> None:
        """A call was answered: its server answers calls of this task, and its subject was not what others were refused for."""
        self._trusted.add(task)
        if subject is not None and subject in self._subjects and subject not in self._answered:
            self._answered.add(subject)
            self._waiting[task].append({"answered": subject.hex()})
        if self._waiting[task]:
            self._write(task)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, line: dict[str, str]) -> None:
        if "answered" in line:
            self._answered.add(bytes.fromhex(line["answered"]))
            return
        key, kind = bytes.fromhex(line["key"]), str(line["kind"])[:40]
        if key not in self._calls and "subject" in line:
            self._subjects[bytes.fromhex(line["subject"])][kind] += 1
        self._calls[key] = kind

    def _load(self, path: Path) -> None:
        with open(path, "rb") as file:
            if file.readline() != json.dumps(_HEADER).encode() + b"\n":
                logger.warning("%s is no record of refusals and is left alone; refused calls are made again", path)
                self.path = None
                return
            for line in file:
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # half a line of a killed run, or a damaged one

    def _write(self, task: str) -> None:
        lines = self._waiting.pop(task, [])
        if self.path is None or not lines:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open_for_append(self.path)
            header = [_HEADER] if self._file.seek(0, os.SEEK_END) == 0 else []
            self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in [*header, *lines]))
        except OSError as error:  # a full disk costs requests, not the run
            logger.warning("%s cannot be written (%s); refused calls are made again after a restart", self.path, error)
            self.path = None


@dataclass
class _Item:
    num_pending: int = 0
    is_refused: bool = False


class RefusalWatch:
    """Tells when everything is refused: of a task's items the first 8, or later 32 in a row, in the order of their first call.

    The order is that of asking, not of ending: a refusal comes in milliseconds, a reply may take seconds.
    """

    def __init__(self) -> None:
        self._items: dict[str, dict[Hashable, _Item]] = defaultdict(dict)
        self.answered: set[str] = set()
        """Tasks that had a valid reply."""

    def note_start(self, task: str, item: Hashable) -> None:
        """A call about an item was begun."""
        self._items[task].setdefault(item, _Item()).num_pending += 1

    def note_valid(self, task: str) -> None:
        """A call was answered."""
        self.answered.add(task)
        self._items[task].clear()

    def note_failed(self, task: str, item: Hashable) -> None:
        """A call ended without telling whether it can be answered."""
        known = self._items[task].get(item)
        if known is not None:
            known.num_pending -= 1
            if known.num_pending <= 0 and not known.is_refused:
                del self._items[task][item]

    def note_refused(self, task: str, item: Hashable) -> int:
        """A call was refused for good; returns how many items in a row were, if that is too many, else 0."""
        known = self._items[task].setdefault(item, _Item(1))
        known.num_pending -= 1
        known.is_refused = True
        in_a_row = 0
        for each in self._items[task].values():
            if not each.is_refused:
                break
            in_a_row += 1
        return in_a_row if in_a_row >= (_LATER if task in self.answered else _FIRST) else 0


class RefusalLog:
    """Says what is refused: once for each sample, and not without end."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def note(self, name: str, error: CallRefusedError) -> None:
        """A call about the sample of that name was refused."""
        if name in self._names or len(self._names) > _MAX_LOGGED:
            return
        self._names.add(name)
        if len(self._names) > _MAX_LOGGED:
            logger.warning("further samples that the judge's servers refuse are only counted, as judge/refused")
            return
        words = f": {error.words}" if error.words else ""
        logger.warning("%r: refused for good, left out and not asked for again: %s%s", name, error, words)


class Refusals:
    """The memory and the watch together, as the client needs them.

    Args:
        memory: what was refused before.
        secrets: keys, which no message may show.
    """

    def __init__(self, memory: RefusalMemory, secrets: Sequence[str] = ()) -> None:
        self.memory = memory
        self._secrets = secrets
        self._watch = RefusalWatch()
        self._rounds: Counter[bytes] = Counter()
        self._last: dict[str, tuple[AttemptError, str]] = {}
        """By task the last refusal that a server spoke in this run, with its words."""
        self._fault: JudgeStoppedError | None = None

    def check(self, call: Call, identity: CallIdentity, item: Hashable) -> None:
        """Raise where a call need not be made.

        Raises:
            CallRefusedError: it was refused before.
            JudgeStoppedError: all is refused.
        """
        if self._fault is not None:
            raise self._fault
        kind = self.memory.known(identity.key, identity.subject)
        if kind is not None:
            self._watch.note_start(call.task.name, item)
            self.refuse(call, identity, item, AttemptError(kind, f"refused earlier ({kind})", weight=HOPELESS))

    def note_start(self, call: Call, item: Hashable) -> None:
        """A call is made."""
        self._watch.note_start(call.task.name, item)

    def note_valid(self, call: Call, identity: CallIdentity) -> None:
        """It was answered."""
        self._watch.note_valid(call.task.name)
        self.memory.note_answered(call.task.name, identity.subject)

    def note_failed(self, call: Call, item: Hashable) -> None:
        """It ended without an answer, but may be answered another time."""
        self._watch.note_failed(call.task.name, item)

    def is_refusal(self, call: Call, identity: CallIdentity, error: AttemptError) -> bool:
        """Whether a call can never be answered: its server says so, or all it ever brought are replies that are no good, in
        round after round of attempts, while other calls of its task are answered."""
        if error.blame is Blame.REPLY:
            self._rounds[identity.key] += 1
            return self._rounds[identity.key] >= _ROUNDS and call.task.name in self._watch.answered
        return error.blame is Blame.ITEM

    def shown(self, error: AttemptError, call: Call) -> str:
        """What the server says, fit for a log: one short line without keys, texts of the call and control characters."""
        return redact(error.words, [*self._secrets, *_texts(call.data)])

    def refuse(self, call: Call, identity: CallIdentity, item: Hashable, error: AttemptError) -> NoReturn:
        """Book a refusal and raise it.

        Raises:
            CallRefusedError: always, but
            JudgeStoppedError: where too many were refused in a row.
        """
        task = call.task.name
        words = self.shown(error, call)
        if words or task not in self._last:
            self._last[task] = error, words
        self.memory.add(task, identity.key, identity.subject, error.kind)
        in_a_row = self._watch.note_refused(task, item)
        if not in_a_row:
            raise CallRefusedError(f"{task}: {error}", error.kind, words)
        (error, words), path = self._last[task], self.memory.path
        self._fault = JudgeStoppedError(
            f"the judge's servers refuse every call of the task {task}, {in_a_row} items in a row: {error}"
            + (f": {words}" if words else "")
            + "; where all are refused it is no matter of single pictures or texts: does the model take images, is its context "
            "long enough, is a filter on, does the service know the options of reward.protocol?"
            + (f" {path} holds what was refused before; remove it to ask again" if path and path.is_file() else "")
        )
        raise self._fault


def _texts(value: Any) -> list[str]:
    """All texts of a call's data."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    return [value] if isinstance(value, str) else []
