"""Failures that look like an outage but belong to one call, such as a picture on which the server breaks or hangs.

A server error, a time-out, a broken connection, an unusable reply or an overload ("no room", HTTP 429) does not tell
whose fault it is. So from a call's second failure on, each failure is followed by a *control*: a call of the same task
that was answered before is asked again, once. If the server answers the controls and fails on the call, time after
time, until the call's attempts are used up, the call is to blame. If a control fails, or there is none, the server may
be to blame, and the failure counts as an outage. After an overload, a control is asked only if no other call of the
task has been answered since this call's previous failure.

This verdict is probably right, but not certain. So a failing call is left out only for a time (see ``refusals``), and
``endpoint.required_share`` limits how many pictures, references and calls are left out. Beyond that limit, the scores
are missing, and the run ends as it does when a server fails.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count

from balcaprl.rewards.endpoint.protocol import Call
from balcaprl.rewards.endpoint.server.outcomes import HOPELESS, AttemptError, Blame

_BLAMES = (Blame.SERVER, Blame.REPLY, Blame.OVERLOAD)
_ENOUGH_PROOFS = 5
"""Proofs after which a call is to blame: with the default of six attempts, all failures but the first can give one.

If a server fails at random on 40% of the requests, one call in 3,000 gets that many by chance.
"""
_ENOUGH_PROOFS_OF_OVERLOAD = 8
"""Proofs after which a call is to blame for its overloads, which use up no attempts and hit all calls at random."""
_FEW = 4
"""Pictures or references, and likewise calls, that may always be left out, whatever share they are: if a first step has
eight pictures, a single one is already more than a tenth."""
_NUM_CONTROLS = 4


@dataclass(frozen=True)
class CallIdentity:
    """The keys by which a call is recognised."""

    by_model: dict[str, bytes]
    """Keys in the reply cache, by request form (the servers' name for the model and their request options)."""
    key: bytes
    """Key of the call, for all servers together."""
    subject: bytes | None
    """Key of the call without its caption, equal for all calls of a task about one picture or reference; None if the
    call has only a caption."""


@dataclass(frozen=True)
class Control:
    """A call that was answered, by a server or the cache."""

    call: Call
    identity: CallIdentity


AskControl = Callable[[Control], Awaitable[str]]
"""Makes one attempt at a control and returns the server's url, or raises the ``AttemptError``."""


@dataclass
class _Case:
    num_failures: int = 0
    num_proofs: int = 0
    """Failures after which the server that had failed then answered a control; 0 again when no control is answered."""
    num_answered: int = 0
    """Number of the task's answered calls, as last seen: at this call's last failure, or after the control that
    followed."""


class ItemFaults:
    """Decides for each failing call whether the call or the server is to blame. Must be used from one event loop.

    Args:
        required_share: value of ``endpoint.required_share``.
    """

    def __init__(self, required_share: float) -> None:
        self._allowed = 1.0 - required_share
        self._cases: dict[bytes, _Case] = defaultdict(_Case)
        self._controls: dict[str, deque[Control]] = defaultdict(lambda: deque(maxlen=_NUM_CONTROLS))
        self._num_answered: Counter[str] = Counter()
        self._answered_subjects: dict[str, set[bytes]] = defaultdict(set)
        self._failed_calls: dict[str, set[bytes]] = defaultdict(set)
        self._failed_subjects: dict[str, set[bytes]] = defaultdict(set)
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._moments = count()
        self._last: dict[str, tuple[int, str]] = {}
        """Task -> the moment at which its last control began, and the url of the server that answered it (or empty)."""

    def note_answered(self, call: Call, identity: CallIdentity) -> None:
        """Record that a call has its valid reply."""
        task, known = call.task.name, self._controls[call.task.name]
        self._num_answered[task] += 1
        self._cases.pop(identity.key, None)
        if identity.subject is not None:
            self._answered_subjects[task].add(identity.subject)
            self._failed_subjects[task].discard(identity.subject)
        if all(control.identity.key != identity.key for control in known):
            known.append(Control(call, identity))

    async def note_failed(self, call: Call, identity: CallIdentity, error: AttemptError, ask: AskControl) -> None:
        """Record a failed attempt, and ask a control where its answer may tell why.

        If further attempts are useless, ``error`` is marked as hopeless.
        """
        if error.blame not in _BLAMES or error.unreached is not None:
            return
        task, case = call.task.name, self._cases[identity.key]
        is_overload, num_answered = error.blame is Blame.OVERLOAD, self._num_answered[task]
        others_get_on, case.num_answered = num_answered > case.num_answered, num_answered
        case.num_failures += 1
        # One failure is no sign yet. In an overload that others get through, a control would take a place from them.
        if case.num_failures < 2 or (is_overload and others_get_on):
            return
        server = await self._ask_control(task, identity.key, ask)
        case.num_answered = self._num_answered[task]  # answers that came during the control do not count as progress
        if not server:
            case.num_proofs = 0
        elif server == error.server:
            case.num_proofs += 1
        if is_overload and case.num_proofs >= _ENOUGH_PROOFS_OF_OVERLOAD:
            error.weight = HOPELESS

    def is_calls_fault(self, call: Call, identity: CallIdentity) -> bool:
        """Decide whether a call whose attempts are used up is left out: if it is to blame and few are left out yet."""
        task, subject = call.task.name, identity.subject
        if self._cases[identity.key].num_proofs < _ENOUGH_PROOFS:
            return False
        if subject is not None and subject not in self._answered_subjects[task]:
            failed, name, num_answered = self._failed_subjects[task], subject, len(self._answered_subjects[task])
        else:
            failed, name, num_answered = self._failed_calls[task], identity.key, self._num_answered[task]
        num_failed = len(failed) + (name not in failed)
        if num_failed > max(_FEW, self._allowed * (num_answered + num_failed)):
            return False
        failed.add(name)
        return True

    async def _ask_control(self, task: str, key: bytes, ask: AskControl) -> str:
        """The url of the server that answered a control begun after this failure, or "" if no control was answered.

        Calls that fail at about the same time share one control.
        """
        failed_at = next(self._moments)
        async with self._locks[task]:
            if self._last.get(task, (-1, ""))[0] < failed_at:
                controls = self._controls[task]
                control = next((c for c in reversed(controls) if c.identity.key != key), None)
                if control is None:
                    return ""
                started, server = next(self._moments), ""
                try:
                    server = await ask(control)
                except AttemptError:
                    controls.rotate(1)  # try another control next time
                self._last[task] = started, server
            return self._last[task][1]
