"""How many requests a server is given at once, when it is left alone, and who gets the next free place.

Everything here is plain arithmetic on a clock that is passed in; the dispatcher waits, and nothing touches the network.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from balcaprl.config import ServerConfig

Clock = Callable[[], float]

_PLATEAU = 1.05
"""More places that do not bring this much more throughput are given back."""
_CUT = 0.7
_CUT_COST = 0.85
"""A cut that leaves less than this of the throughput is taken back."""
_MAX_WINDOW = 8
"""A window of refusals alone ends after this many times its size."""
_HOLD_WINDOWS = 8
"""Windows without a try after one that failed."""
_MAX_BREAKER_WAIT_S = 60.0
_REFUSALS = 3
"""Refusals in a row (401, 403, 404) after which a server is given up for good."""


class AdaptiveLimit:
    """The number of requests in flight that a server is worth.

    A *window* is as many served requests as the limit, and at least two replies long, for replies come in bursts. While all
    places are taken the limit grows from window to window, first twofold, then by a quarter, as long as throughput grows along.
    Where the server is overloaded (429, or replies that take half of the time-out) it is cut; a cut that costs throughput is
    taken back, for then the overload does not come from us.
    """

    def __init__(self, maximum: int, timeout_s: float, clock: Clock = time.monotonic) -> None:
        self.maximum = maximum
        self.limit = maximum
        self._slow_s = 0.5 * timeout_s
        self._clock = clock
        self._latency_s = 0.0
        """Of served requests, a running mean."""
        self._doubling = True
        self._no_growth = self._no_cuts = 0
        """Windows for which it is not tried again what was not worth it."""
        self._num_useless_cuts = 0
        self._raised: tuple[int, float] | None = None
        """Limit and throughput before it was raised, while it is seen whether that was worth it."""
        self._cut: tuple[int, float] | None = None
        """Limit and throughput before it was cut, likewise."""
        self._settling = True
        """The window only waits until requests of the old limit are gone, or the first ones are there."""
        self._start_window()

    def _start_window(self) -> None:
        self._started = self._clock()
        self._done = self._refused = self._slow = 0
        self._saturated = False

    def note(self, *, in_flight: int, overloaded: bool = False, latency_s: float = 0.0) -> None:
        """One request ended, served or refused; ``in_flight`` counts it."""
        self._done += 1
        self._refused += overloaded
        self._slow += latency_s > self._slow_s
        self._saturated |= in_flight >= self.limit
        size = max(4, self.limit)
        if not overloaded and latency_s > 0:
            self._latency_s = latency_s if self._latency_s == 0 else 0.9 * self._latency_s + 0.1 * latency_s
        if self._clock() - self._started < 2 * self._latency_s:
            return
        if self._done - self._refused >= size or self._done >= _MAX_WINDOW * size:
            if self._settling:
                self._settling = False
            else:
                self._end_window()
            self._start_window()

    def _end_window(self) -> None:
        overload = (self._refused + self._slow) / self._done
        throughput = (self._done - self._refused) / max(1e-9, self._clock() - self._started)
        if self._cut is not None:
            limit, before = self._cut
            self._cut = None
            if throughput < _CUT_COST * before:
                self.limit = max(limit, self.limit)
                self._num_useless_cuts += 1
                self._no_cuts = _HOLD_WINDOWS * 2 ** min(6, self._num_useless_cuts)
                return
            self._doubling, self._num_useless_cuts = False, 0
        self._no_cuts, self._no_growth = max(0, self._no_cuts - 1), max(0, self._no_growth - 1)
        if overload > 0.1 and self.limit > 1 and not self._no_cuts:
            self._cut, self._raised = (self.limit, throughput), None
            self.limit, self._settling = max(1, int(self.limit * _CUT)), True
            return
        if self._raised is not None:
            limit, before = self._raised
            self._raised = None
            if throughput < _PLATEAU * before:
                self.limit, self._doubling, self._no_growth = limit, False, _HOLD_WINDOWS
                return
        if self._saturated and self.limit < self.maximum and not self._no_growth:
            self._raised = (self.limit, throughput)
            grown = 2 * self.limit if self._doubling else self.limit + max(1, self.limit // 4)
            self.limit = min(self.maximum, grown)


class CircuitBreaker:
    """Leaves a server alone after failures in a row; then lets one request through to see."""

    def __init__(self, failures: int, wait_s: float, clock: Clock = time.monotonic) -> None:
        self._allowed = failures
        self._first_wait_s = self._wait_s = wait_s
        self._clock = clock
        self._failures = 0
        self._probing = False
        self.open_until = -math.inf
        self.num_opened = 0

    @property
    def is_open(self) -> bool:
        """Whether no request may be started now."""
        return self._clock() < self.open_until or self._probing

    def note_start(self) -> None:
        """A request was started; the first after a pause is the only one until it ends."""
        self._probing = self._failures >= self._allowed

    def note_success(self) -> None:
        """The server answered."""
        self._failures, self._wait_s, self._probing = 0, self._first_wait_s, False

    def note_neutral(self) -> None:
        """A request ended that says nothing of the server's health."""
        self._probing = False

    def note_failure(self) -> None:
        """The server did not answer as a healthy one does."""
        self._failures += 1
        self._probing = False
        if self._failures >= self._allowed and self._clock() >= self.open_until:
            self.open_until = self._clock() + self._wait_s * random.uniform(0.8, 1.2)
            self._wait_s = min(_MAX_BREAKER_WAIT_S, 2 * self._wait_s)
            self.num_opened += 1


@dataclass
class Server:
    """One server with all that is known of its state."""

    config: ServerConfig
    limit: AdaptiveLimit
    breaker: CircuitBreaker
    clock: Clock = time.monotonic
    in_flight: int = 0
    paused_until: float = -math.inf
    """It asked to be left alone until then."""
    num_refusals: int = 0
    was_reached: bool = False
    """Whether it ever answered anything."""
    unreached_since: float | None = None
    """Since when nobody could be spoken to there, if nobody ever was."""
    why_unreached: str = ""
    given_up: str = ""
    """Why it is never asked again, if so."""
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=16))
    """Whether each of the last requests was refused for lack of room."""
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=32))
    """Whether each of the last requests brought no valid reply."""

    @classmethod
    def of(cls, config: ServerConfig, timeout_s: float, failures: int, wait_s: float, clock: Clock) -> Server:
        """A server that nothing is known of."""
        limit = AdaptiveLimit(config.max_concurrency, timeout_s, clock)
        return cls(config, limit, CircuitBreaker(failures, wait_s, clock), clock)

    @property
    def is_free(self) -> bool:
        """Whether a request may be started now."""
        free = not self.given_up and self.in_flight < self.limit.limit
        return free and self.clock() >= self.paused_until and not self.breaker.is_open

    @property
    def opens_at(self) -> float:
        """When it may be asked again, as far as time decides; never, if it is given up."""
        return math.inf if self.given_up else max(self.paused_until, self.breaker.open_until)

    @property
    def is_sound(self) -> bool:
        """Whether most of the last requests brought a valid reply: what failed then is likely to pass at once."""
        return 2 * sum(self.failed) < len(self.failed)

    def note_served(self, latency_s: float, *, valid: bool = True) -> None:
        """It gave a reply, good or bad."""
        self.failed.append(not valid)
        self.limit.note(in_flight=self.in_flight, latency_s=latency_s)
        self.breaker.note_success()
        self.recent.append(False)
        self.num_refusals = 0

    def note_overloaded(self, retry_after_s: float) -> None:
        """It had no room. Where it mostly has none, all wait as long as it asks, and not this request alone."""
        self.limit.note(in_flight=self.in_flight, overloaded=True)
        self.breaker.note_neutral()
        self.recent.append(True)
        self.failed.append(True)
        if len(self.recent) >= 8 and sum(self.recent) > len(self.recent) // 2:
            self.paused_until = max(self.paused_until, self.clock() + retry_after_s)

    def note_failed(self, *, overloaded: bool = False) -> None:
        """It broke off, took too long, or reported an error of its own."""
        self.failed.append(True)
        self.limit.note(in_flight=self.in_flight, overloaded=overloaded)
        self.breaker.note_failure()

    def note_alive(self) -> None:
        """It answered that this request can never succeed, which tells of the request and not of the server."""
        self.breaker.note_success()
        self.recent.append(False)
        self.num_refusals = 0

    def note_unreachable(self, why: str, *, for_good: bool) -> None:
        """No connection to it was ever made; for good where waiting will not make one."""
        self.why_unreached = why
        if self.unreached_since is None:
            self.unreached_since = self.clock()
        if for_good:
            self.note_refused(why)
        else:
            self.note_failed()

    def note_refused(self, why: str) -> None:
        """It does not want us: wrong key, wrong model, wrong address."""
        self.breaker.note_neutral()
        self.num_refusals += 1
        if self.num_refusals >= _REFUSALS:
            self.given_up = why


class AllServersGivenUpError(RuntimeError):
    """No server is left that may be asked; the message says why for each."""


class Dispatcher:
    """Gives out places at servers, first come first served, so that calls about one image reach one server together.

    Second attempts go before first ones: a step ends with its last call, and one that still has to be repeated when all others
    are done keeps every other place idle.

    Of the servers with a free place the one that an image's hash prefers by weight is taken (weighted rendezvous hashing): its
    prefix cache holds the image. Must be used from one event loop.
    """

    def __init__(self, servers: Sequence[Server], clock: Clock = time.monotonic) -> None:
        self.servers = list(servers)
        self._clock = clock
        self._waiting: deque[tuple[asyncio.Future[Server], str]] = deque()
        self._waiting_again: deque[tuple[asyncio.Future[Server], str]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, affinity: str, *, again: bool = False) -> Server:
        """A place at a server, to be given back by ``release``.

        Args:
            affinity: which server is preferred.
            again: for a call that was tried before.

        Raises:
            AllServersGivenUpError: no server is left.
        """
        future: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        (self._waiting_again if again else self._waiting).append((future, affinity))
        self.wake()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())  # given in the very moment of the cancellation
            raise

    def release(self, server: Server) -> None:
        """Give a place back; what came of the request was told to the server before."""
        server.in_flight -= 1
        self.wake()

    def wake(self) -> None:
        """Give free places to those who wait, in their order."""
        while queue := self._waiting_again or self._waiting:
            future, affinity = queue[0]
            if future.done():
                queue.popleft()
                continue
            if all(server.given_up for server in self.servers):
                reasons = "; ".join(f"{server.config.url}: {server.given_up}" for server in self.servers)
                future.set_exception(AllServersGivenUpError(reasons))
                continue
            server = self._choose(affinity)
            if server is None:
                self._wake_later()
                return
            queue.popleft()
            server.in_flight += 1
            server.breaker.note_start()
            future.set_result(server)

    def _choose(self, affinity: str) -> Server | None:
        free = [server for server in self.servers if server.is_free]
        return max(free, key=lambda server: _preference(server, affinity), default=None)

    def _wake_later(self) -> None:
        """At the time when the next pause ends; places that become free wake by themselves."""
        pauses = [server.opens_at for server in self.servers if server.opens_at > self._clock()]
        soonest = min(pauses, default=math.inf)
        if math.isinf(soonest) or (self._timer is not None and not self._timer.cancelled()):
            return
        self._timer = asyncio.get_running_loop().call_later(soonest - self._clock() + 1e-3, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.wake()


def _preference(server: Server, affinity: str) -> float:
    """Rendezvous hashing: of many images, each server is the most preferred one of a share that its weight decides."""
    digest = hashlib.blake2b(f"{server.config.url}\0{affinity}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 2)
    return -server.config.weight / math.log(uniform)
