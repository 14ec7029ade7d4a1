"""Remembers requests that can never succeed, so that none is made twice, and ends a run in which all are refused.

A picture that a provider's filter blocks, or a text that exceeds the model's context, is refused however often it is
sent. Only its own scores are missing. The memory is a file in the run's folder, so that a resumed run does not ask
again; remove the file to have everything asked for anew. The file holds hashes and kinds, no text. A refusal holds for
one call only: this picture, text and settings. If two calls that differ only in the caption were refused and no such
call was answered, the picture or the reference is taken for the cause, and no more calls are made about it.

If *all* requests are refused, the cause is not in single pictures: the model takes no images, or does not understand
the form of the request. Then the run ends with the server's words. Refusals of a task are written to the file only
after a call of that task was answered. Before that, they may come from the configuration, which can be corrected before
the run is resumed.

Calls that only *fail* time after time, while other calls are answered (see ``item_faults``), are kept in the same file,
but only for a time: the cause may be the server after all, or one part of it that gets repaired. Such a call is not
made for an hour. A picture or reference is left out as a whole if two calls about it failed and none was answered.
After another failure the pause is twice as long, up to a day.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from balcaprl.rewards.endpoint.protocol import Call
from balcaprl.rewards.endpoint.reference_units import open_for_append
from balcaprl.rewards.endpoint.server.item_faults import CallIdentity, ItemFaults
from balcaprl.rewards.endpoint.server.outcomes import HOPELESS, AttemptError, Blame
from balcaprl.rewards.endpoint.server.redaction import redact
from balcaprl.types import JudgeStoppedError

logger = logging.getLogger(__name__)

REFUSALS = "judge_refusals.jsonl"
_HEADER = {"format": "balcaprl judge refusals", "version": 1}
_ENOUGH_CALLS = 2
_FIRST = 8
_LATER = 32
_MAX_LOGGED = 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 3600.0, 86_400.0


class CallFailedError(RuntimeError):
    """A call that brought no valid reply after all attempts; the message names the last failure."""


class CallLeftOutError(CallFailedError):
    """A call that is not made, or not made again, because of its picture or text; ``kind`` is the failure's kind."""

    verdict = "it fails whenever it is asked for, while others are answered; it is left out for a while"
    may_pass = True

    def __init__(self, message: str, kind: str, words: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.words = words
        """The server's words, fit for a log; empty if it gave none, or gave them in an earlier run."""


class CallRefusedError(CallLeftOutError):
    """A call that can never succeed."""

    verdict = "refused for good, left out and not asked for again"
    may_pass = False


@dataclass
class _Pause:
    kind: str
    until: float
    wait_s: float


def refusals_path(output: Path) -> Path:
    """Path of the file that keeps the refusals met while ``output`` was written."""
    return output.with_name(output.name + ".refused.jsonl")


class RefusalMemory:
    """Remembers which calls were refused for good or kept failing; across restarts if there is a file.

    Args:
        path: the file, or None to remember only as long as this object lives.
        now: function that returns the time in seconds since 1970.
    """

    def __init__(self, path: Path | None = None, now: Callable[[], float] = time.time) -> None:
        self.path, self._now = path, now
        self._pauses: dict[bytes, _Pause] = {}
        """Pauses of the calls and subjects that failed, by key."""
        self._failing: dict[bytes, set[bytes]] = defaultdict(set)
        """Subject -> keys of the failed calls about it."""
        self._calls: dict[bytes, str] = {}
        self._subjects: dict[bytes, Counter[str]] = defaultdict(Counter)
        self._answered: set[bytes] = set()
        self._written: set[bytes] = set()
        """Answered subjects that the file lists as answered."""
        self._trusted: set[str] = set()
        self._waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._file: BinaryIO | None = None
        if path is not None and path.is_file() and path.stat().st_size:
            self._load(path)

    def known(self, key: bytes, subject: bytes | None) -> str | None:
        """The kind of refusal that a call would meet, or None if the call may be made."""
        kind = self._calls.get(key)
        if kind is None and subject is not None and subject not in self._answered and subject in self._subjects:
            kinds = self._subjects[subject]
            kind = kinds.most_common(1)[0][0] if kinds.total() >= _ENOUGH_CALLS else None
        return kind

    def paused(self, key: bytes, subject: bytes | None) -> str | None:
        """The kind of failure that a call would likely meet, or None if the call may be made."""
        names = [key]
        if (
            subject is not None
            and subject not in self._answered
            and len(self._failing.get(subject, ())) >= _ENOUGH_CALLS
        ):
            names.append(subject)
        pauses = [self._pauses[name] for name in names if name in self._pauses]
        return next((pause.kind for pause in pauses if self._now() < pause.until), None)

    def add(self, task: str, key: bytes, subject: bytes | None, kind: str, *, for_good: bool = True) -> None:
        """Remember a call that was refused for good, or failed time after time."""
        line: dict[str, Any] = {"key": key.hex(), "kind": kind}
        line |= {} if subject is None else {"subject": subject.hex()}
        line |= {} if for_good else {"failed_at": self._now()}
        self._take(line)
        self._waiting[task].append(line)
        if task in self._trusted:
            self._write(task)

    def note_answered(self, task: str, subject: bytes | None) -> None:
        """Record an answered call: the task's refusals can be trusted, and the subject did not cause other refusals."""
        self._trusted.add(task)
        self.note_cached(subject)
        if (
            subject is not None
            and subject not in self._written
            and (subject in self._subjects or subject in self._failing)
        ):
            self._written.add(subject)
            self._waiting[task].append({"answered": subject.hex()})
        if self._waiting[task]:
            self._write(task)

    def note_cached(self, subject: bytes | None) -> None:
        """Record that a call about a subject was answered earlier."""
        if subject is not None:
            self._answered.add(subject)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, line: dict[str, Any]) -> None:
        if "answered" in line:
            self._answered.add(bytes.fromhex(line["answered"]))
            self._written.add(bytes.fromhex(line["answered"]))
            return
        key, kind = bytes.fromhex(line["key"]), str(line["kind"])[:40]
        if "failed_at" in line:
            self._take_failed(key, kind, line)
            return
        if key not in self._calls and "subject" in line:
            self._subjects[bytes.fromhex(line["subject"])][kind] += 1
        self._calls[key] = kind

    def _take_failed(self, key: bytes, kind: str, line: dict[str, Any]) -> None:
        failed_at = min(float(line["failed_at"]), self._now())  # the clock may have been wrong when this was written
        if not math.isfinite(failed_at):
            return
        self._pause(key, kind, failed_at)
        if "subject" in line:
            subject = bytes.fromhex(line["subject"])
            self._failing[subject].add(key)
            self._pause(subject, kind, failed_at)

    def _pause(self, name: bytes, kind: str, failed_at: float) -> None:
        """Begin a pause, unless one is still running: calls that failed together count once."""
        known = self._pauses.get(name)
        if known is None:
            self._pauses[name] = _Pause(kind, failed_at + _FIRST_PAUSE_S, _FIRST_PAUSE_S)
        elif failed_at >= known.until:
            wait_s = min(_LONGEST_PAUSE_S, 2 * known.wait_s)
            self._pauses[name] = _Pause(kind, failed_at + wait_s, wait_s)

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
                    continue  # a line that a killed run left incomplete, or a damaged line

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
        except OSError as error:  # a full disk costs repeated requests, but does not end the run
            logger.warning("%s cannot be written (%s); refused calls are made again after a restart", self.path, error)
            self.path = None


@dataclass
class _Item:
    num_pending: int = 0
    is_refused: bool = False


class RefusalWatch:
    """Detects that everything is refused: the first 8 items of a task, or 32 in a row once a call of it was answered.

    Items are ordered by their first call, not by their end, because a refusal comes in milliseconds and a reply may
    take seconds.
    """

    def __init__(self) -> None:
        self._items: dict[str, dict[Hashable, _Item]] = defaultdict(dict)
        self.answered: set[str] = set()
        """Tasks that had a valid reply."""

    def note_start(self, task: str, item: Hashable) -> None:
        """Record the start of a call about an item."""
        self._items[task].setdefault(item, _Item()).num_pending += 1

    def note_valid(self, task: str) -> None:
        """Record that a call was answered, which starts the count of refused items anew."""
        self.answered.add(task)
        self._items[task].clear()

    def note_failed(self, task: str, item: Hashable) -> None:
        """Record a call that ended without telling whether it can be answered."""
        known = self._items[task].get(item)
        if known is not None:
            known.num_pending -= 1
            if known.num_pending <= 0 and not known.is_refused:
                del self._items[task][item]

    def note_refused(self, task: str, item: Hashable) -> int:
        """Record a call refused for good; returns the number of items refused in a row, or 0 if it is not too high."""
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
    """Logs what is refused, once for each sample and for a limited number of samples."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def note(self, name: str, error: CallLeftOutError) -> None:
        """Log that a call about the sample of that name was left out."""
        if name in self._names or len(self._names) > _MAX_LOGGED:
            return
        self._names.add(name)
        if len(self._names) > _MAX_LOGGED:
            logger.warning(
                "further samples that the judge's servers refuse or fail on are only counted: judge/refused, judge/failing"
            )
            return
        words = f": {error.words}" if error.words else ""
        logger.warning("%r: %s: %s%s", name, error.verdict, error, words)


class Refusals:
    """The refusal memory, the watch and the item faults together, as the client needs them.

    Args:
        memory: the calls that were refused before.
        secrets: keys that no message may show.
        required_share: value of ``endpoint.required_share``.
    """

    def __init__(self, memory: RefusalMemory, secrets: Sequence[str], required_share: float) -> None:
        self.memory = memory
        self.faults = ItemFaults(required_share)
        self._secrets = secrets
        self._watch = RefusalWatch()
        self._last: dict[str, tuple[AttemptError, str]] = {}
        """Last refusal of each task in this run with the server's words; one without words does not replace another."""
        self._fault: JudgeStoppedError | None = None

    def check(self, call: Call, identity: CallIdentity, item: Hashable) -> None:
        """Raise if a call need not be made.

        Raises:
            CallRefusedError: the call was refused before.
            CallLeftOutError: the call failed time after time not long ago.
            JudgeStoppedError: every call is refused.
        """
        if self._fault is not None:
            raise self._fault
        kind = self.memory.known(identity.key, identity.subject)
        if kind is not None:
            self._watch.note_start(call.task.name, item)
            self.refuse(call, identity, item, AttemptError(kind, f"refused earlier ({kind})", weight=HOPELESS))
        kind = self.memory.paused(identity.key, identity.subject)
        if kind is not None:
            raise CallLeftOutError(f"{call.task.name}: failed not long ago ({kind})", kind)

    def note_start(self, call: Call, item: Hashable) -> None:
        """Record the start of a call."""
        self._watch.note_start(call.task.name, item)

    def note_valid(self, call: Call, identity: CallIdentity) -> None:
        """Record that a call was answered."""
        self._watch.note_valid(call.task.name)
        self.faults.note_answered(call, identity)
        self.memory.note_answered(call.task.name, identity.subject)

    def note_control(self, call: Call) -> None:
        """Record that a control was answered: not everything is refused, but no new call was answered."""
        self._watch.note_valid(call.task.name)

    def note_cached(self, call: Call, identity: CallIdentity) -> None:
        """Record that the cache has the reply to a call."""
        self.faults.note_answered(call, identity)
        self.memory.note_cached(identity.subject)

    def note_failed(self, call: Call, item: Hashable) -> None:
        """Record a call that ended without an answer, but may be answered another time."""
        self._watch.note_failed(call.task.name, item)

    def leave_out(self, call: Call, identity: CallIdentity, item: Hashable, error: AttemptError) -> None:
        """Decide what becomes of a call whose attempts are used up; returns if the call may be made another time.

        Raises:
            CallRefusedError: the server says that the call can never be answered.
            JudgeStoppedError: the server says so, and too many items in a row were refused.
            CallLeftOutError: the call itself is to blame for its failures.
        """
        if error.blame is Blame.ITEM:
            self.refuse(call, identity, item, error)
        self.note_failed(call, item)
        if self.faults.is_calls_fault(call, identity):
            self.memory.add(call.task.name, identity.key, identity.subject, error.kind, for_good=False)
            raise CallLeftOutError(f"{call.task.name}: {error}", error.kind, self.shown(error, call))

    def shown(self, error: AttemptError, call: Call) -> str:
        """What the server says, fit for a log: one short line without keys, texts of the call or control characters."""
        return redact(error.words, [*self._secrets, *_texts(call.data)])

    def told(self, error: AttemptError, call: Call) -> str:
        """The failure and what the server says about it, fit for a log."""
        return ": ".join(filter(None, (str(error), self.shown(error, call))))

    def refuse(self, call: Call, identity: CallIdentity, item: Hashable, error: AttemptError) -> NoReturn:
        """Record a refusal and raise it.

        Raises:
            CallRefusedError: always, unless too many items in a row were refused.
            JudgeStoppedError: too many items in a row were refused.
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
    """All texts in a call's data, those in nested mappings included."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    return [value] if isinstance(value, str) else []
