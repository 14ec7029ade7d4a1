"""How many requests a server gets at once, when it is left alone for a while, and which call gets the next free place.

Limits and circuit breakers are plain arithmetic on a clock that is passed in. Only the dispatcher waits, and nothing
here touches the network.
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
"""A raise of the limit is undone if it does not multiply the throughput by at least this factor."""
_CUT = 0.7
_CUT_COST = 0.85
"""A cut of the limit is undone if it leaves less than this share of the throughput."""
_MAX_WINDOW = 8
"""A window ends after this many times its size in requests, however many of them were refused."""
_HOLD_WINDOWS = 8
"""Windows to wait before an undone change of the limit is tried again; doubled for each useless cut in a row."""
_MAX_BREAKER_WAIT_S = 60.0
_REFUSALS = 3
"""Refusals in a row (such as 401, 403, 404) after which a server is given up for good."""


class AdaptiveLimit:
    """Finds the number of requests in flight that brings the most throughput at a server.

    A *window* holds as many served requests as the limit, at least 4, and lasts at least as long as two replies,
    because replies come in bursts. While all places are taken, the limit grows from window to window as long as the
    throughput grows with it: first it doubles, later it grows by a quarter. When the server is overloaded (more than a
    tenth of the requests get 429 or take more than half of the time-out), the limit is cut. A cut that costs throughput
    is undone, because then the overload does not come from us.
    """

    def __init__(self, maximum: int, timeout_s: float, clock: Clock = time.monotonic) -> None:
        self.maximum = maximum
        self.limit = maximum
        self._slow_s = 0.5 * timeout_s
        self._clock = clock
        self._latency_s = 0.0
        """Running mean of the latency of served requests, in seconds."""
        self._doubling = True
        self._no_growth = self._no_cuts = 0
        """Windows left in which the limit is not raised, or not cut, because the last such change was undone."""
        self._num_useless_cuts = 0
        self._raised: tuple[int, float] | None = None
        """Limit and throughput before the last raise, while its effect is being measured."""
        self._cut: tuple[int, float] | None = None
        """Limit and throughput before the last cut, while its effect is being measured."""
        self._settling = True
        """Whether the current window is not measured. The first one is not, nor is one after a cut, because requests
        that started before the cut end in it."""
        self._start_window()

    def _start_window(self) -> None:
        self._started = self._clock()
        self._done = self._refused = self._slow = 0
        self._saturated = False

    def note(self, *, in_flight: int, overloaded: bool = False, latency_s: float = 0.0) -> None:
        """Record the end of one request, served or refused; ``in_flight`` still includes this request."""
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
    """Circuit breaker: blocks a server for a while after failures in a row, then lets one request through as a test."""

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
        """Record the start of a request; the first one after a pause is the only one until it ends."""
        self._probing = self._failures >= self._allowed

    def note_success(self) -> None:
        """Record that the server answered."""
        self._failures, self._wait_s, self._probing = 0, self._first_wait_s, False

    def note_neutral(self) -> None:
        """Record the end of a request that says nothing about the server's health."""
        self._probing = False

    def note_failure(self) -> None:
        """Record that the server did not answer as a healthy one does."""
        self._failures += 1
        self._probing = False
        if self._failures >= self._allowed and self._clock() >= self.open_until:
            self.open_until = self._clock() + self._wait_s * random.uniform(0.8, 1.2)
            self._wait_s = min(_MAX_BREAKER_WAIT_S, 2 * self._wait_s)
            self.num_opened += 1


@dataclass
class Server:
    """One server with its current state."""

    config: ServerConfig
    limit: AdaptiveLimit
    breaker: CircuitBreaker
    clock: Clock = time.monotonic
    in_flight: int = 0
    paused_until: float = -math.inf
    """Clock time until which the server asked to be left alone."""
    num_refusals: int = 0
    was_reached: bool = False
    """Whether the server ever answered anything."""
    unreached_since: float | None = None
    """Clock time of the first failed connection, as long as no connection was ever made; otherwise None."""
    why_unreached: str = ""
    given_up: str = ""
    """Why the server is never asked again; empty if it may be."""
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=16))
    """For each of the last requests that it replied to or refused, whether it was refused for lack of room."""
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=32))
    """For each of the last requests, except those refused for good, whether it brought no valid reply."""

    @classmethod
    def of(cls, config: ServerConfig, timeout_s: float, failures: int, wait_s: float, clock: Clock) -> Server:
        """Create a server of which nothing is known yet."""
        limit = AdaptiveLimit(config.max_concurrency, timeout_s, clock)
        return cls(config, limit, CircuitBreaker(failures, wait_s, clock), clock)

    @property
    def is_free(self) -> bool:
        """Whether a request may be started now."""
        free = not self.given_up and self.in_flight < self.limit.limit
        return free and self.clock() >= self.paused_until and not self.breaker.is_open

    @property
    def opens_at(self) -> float:
        """Clock time at which both the pause and the breaker's wait are over; infinity if the server is given up."""
        return math.inf if self.given_up else max(self.paused_until, self.breaker.open_until)

    @property
    def is_sound(self) -> bool:
        """Whether most of the last requests brought a valid reply; if so, a retry is likely to succeed at once."""
        return 2 * sum(self.failed) < len(self.failed)

    def note_served(self, latency_s: float, *, valid: bool = True) -> None:
        """Record that the server gave a reply, valid or not."""
        self.failed.append(not valid)
        self.limit.note(in_flight=self.in_flight, latency_s=latency_s)
        self.breaker.note_success()
        self.recent.append(False)
        self.num_refusals = 0

    def note_overloaded(self, retry_after_s: float) -> None:
        """Record that the server had no room; if it mostly has none, all requests wait as long as the server asks."""
        self.limit.note(in_flight=self.in_flight, overloaded=True)
        self.breaker.note_neutral()
        self.recent.append(True)
        self.failed.append(True)
        if len(self.recent) >= 8 and sum(self.recent) > len(self.recent) // 2:
            self.paused_until = max(self.paused_until, self.clock() + retry_after_s)

    def note_failed(self, *, overloaded: bool = False) -> None:
        """Record that the server broke off, took too long, or reported an error of its own."""
        self.failed.append(True)
        self.limit.note(in_flight=self.in_flight, overloaded=overloaded)
        self.breaker.note_failure()

    def note_alive(self) -> None:
        """Record the answer that this request can never succeed, which is the request's fault and not the server's."""
        self.breaker.note_success()
        self.recent.append(False)
        self.num_refusals = 0

    def note_unreachable(self, why: str, *, for_good: bool) -> None:
        """Record a failed connection to a server that was never reached; ``for_good``: waiting does not help."""
        self.why_unreached = why
        if self.unreached_since is None:
            self.unreached_since = self.clock()
        if for_good:
            self.note_refused(why)
        else:
            self.note_failed()

    def note_refused(self, why: str) -> None:
        """Record that the server accepts no request of ours, because of a wrong key, model, address or option."""
        self.breaker.note_neutral()
        self.num_refusals += 1
        if self.num_refusals >= _REFUSALS:
            self.given_up = why


class AllServersGivenUpError(RuntimeError):
    """No server is left that may be asked; the message says why for each."""


class Dispatcher:
    """Gives out places at servers, first come, first served, so that calls about one image reach one server together.

    Retries go before first attempts. A step ends with its last call, and a call that is retried after all others are
    done leaves every other place idle.

    Of the servers with a free place, weighted rendezvous hashing picks the one that the image's hash prefers, because
    its prefix cache holds the image. Must be used from one event loop.
    """

    def __init__(self, servers: Sequence[Server], clock: Clock = time.monotonic) -> None:
        self.servers = list(servers)
        self._clock = clock
        self._waiting: deque[tuple[asyncio.Future[Server], str]] = deque()
        self._waiting_again: deque[tuple[asyncio.Future[Server], str]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, affinity: str, *, again: bool = False) -> Server:
        """Wait for a place at a server; ``release`` gives it back.

        Args:
            affinity: key whose hash decides which server is preferred.
            again: whether the call was tried before; such calls go first.

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
                self.release(future.result())  # the place was given just before the cancellation
            raise

    def release(self, server: Server) -> None:
        """Give a place back; the caller has already recorded the outcome of the request at the server."""
        server.in_flight -= 1
        self.wake()

    def wake(self) -> None:
        """Give free places to the waiting calls in their order, retries first."""
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
        """Schedule ``wake`` for the end of the next pause; ``release`` calls ``wake`` itself."""
        pauses = [server.opens_at for server in self.servers if server.opens_at > self._clock()]
        soonest = min(pauses, default=math.inf)
        if math.isinf(soonest) or (self._timer is not None and not self._timer.cancelled()):
            return
        self._timer = asyncio.get_running_loop().call_later(soonest - self._clock() + 1e-3, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.wake()


def _preference(server: Server, affinity: str) -> float:
    """Score for weighted rendezvous hashing; a server's weight sets the share of images for which it scores highest."""
    digest = hashlib.blake2b(f"{server.config.url}\0{affinity}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 2)
    return -server.config.weight / math.log(uniform)
