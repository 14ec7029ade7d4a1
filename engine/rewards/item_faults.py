"""Failures that look like an outage and belong to one call: a picture on which the server breaks, or thinks for ever.

A server error, a time-out, a broken connection, a reply that is no good or "no room" says nothing of whose fault it is. So
after a call's second failure each further one is followed by a *control*: a call of the same task that was answered before is
asked again, once. Where the server answers the control and fails on the call, time after time in turn, and the call's attempts
are used up, the call is to blame. If a control fails, or there is none, the server may be: then it counts as an outage.

That is likely, and not certain. So what fails is left out for a time alone (see ``refusals``), and no more is left out than
``endpoint.required_share`` allows, of pictures or references and of calls: beyond it the scores are missing, and the run ends
as it does where a server fails.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count

from balcaprl.rewards.outcomes import HOPELESS, AttemptError, Blame
from balcaprl.rewards.protocol import Call

_BLAMES = (Blame.SERVER, Blame.REPLY, Blame.OVERLOAD)
_ENOUGH_PROOFS = 5
"""As many as a round of attempts brings. A server that fails at random at 40% brings them to one call of 3,000."""
_ENOUGH_PROOFS_OF_OVERLOAD = 8
"""Such failures use up no attempts, and come at random to all."""
_FEW = 4
"""So many pictures, or calls, may be left out whatever their share is: of the first step's eight one is more than a tenth."""
_NUM_CONTROLS = 4


@dataclass(frozen=True)
class CallIdentity:
    """What a call is known by."""

    by_model: dict[str, bytes]
    """Keys of the reply cache, by what the servers call the model."""
    key: bytes
    """Of the call, at all servers together."""
    subject: bytes | None
    """Of what it shares with others about the same picture or reference."""


@dataclass(frozen=True)
class Control:
    """A call that was answered, by a server or the cache."""

    call: Call
    identity: CallIdentity


AskControl = Callable[[Control], Awaitable[str]]
"""Makes one attempt and gives the server's url, or raises the ``AttemptError``."""


@dataclass
class _Case:
    num_failures: int = 0
    num_proofs: int = 0
    """Failures in a row after each of which the same server answered a control."""
    num_answered: int = 0
    """Calls of the task that were answered before the last failure."""


class ItemFaults:
    """Tells, call by call, whether it is the call or the server that fails. Belongs to one event loop.

    Args:
        required_share: ``endpoint.required_share``.
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
        """By task the moment at which the last control began, and the server that answered it; empty if none did."""

    def note_answered(self, call: Call, identity: CallIdentity) -> None:
        """A call has its valid reply."""
        task, known = call.task.name, self._controls[call.task.name]
        self._num_answered[task] += 1
        self._cases.pop(identity.key, None)
        if identity.subject is not None:
            self._answered_subjects[task].add(identity.subject)
            self._failed_subjects[task].discard(identity.subject)
        if all(control.identity.key != identity.key for control in known):
            known.append(Control(call, identity))

    async def note_failed(self, call: Call, identity: CallIdentity, error: AttemptError, ask: AskControl) -> None:
        """An attempt failed. Asks a control where that may tell why; makes ``error`` the last where it is no use to go on."""
        if error.blame not in _BLAMES or error.unreached is not None:
            return
        task, case = call.task.name, self._cases[identity.key]
        is_overload, num_answered = error.blame is Blame.OVERLOAD, self._num_answered[task]
        others_get_on, case.num_answered = num_answered > case.num_answered, num_answered
        case.num_failures += 1
        if case.num_failures < 2 or (is_overload and others_get_on):  # a control would take the room of one of them
            return
        server = await self._ask_control(task, identity.key, ask)
        case.num_answered = self._num_answered[task]  # the control is none of the others
        if not server:
            case.num_proofs = 0
        elif server == error.server:
            case.num_proofs += 1
        if is_overload and case.num_proofs >= _ENOUGH_PROOFS_OF_OVERLOAD:
            error.weight = HOPELESS

    def is_calls_fault(self, call: Call, identity: CallIdentity) -> bool:
        """Whether a call whose attempts are used up is to be left out: it is to blame, and few are."""
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
        """The server that answered a control since now, or nothing. Calls that fail together share one."""
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
                    controls.rotate(1)  # another may do the next time
                self._last[task] = started, server
            return self._last[task][1]
