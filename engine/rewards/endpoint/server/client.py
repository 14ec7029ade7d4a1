"""Calls to a judge model.

A call is first looked up in the cache. If an equal call is in flight, it takes the reply to that one. Otherwise it is
sent to a server with a free place (``connections``), and sent again where the failure may pass (``retries``). Error
messages hold no header and no caption, and at most one redacted line of what a server says.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from balcaprl.config import EndpointConfig, ProtocolConfig
from balcaprl.extras import install_extra
from balcaprl.rewards.endpoint.protocol import (
    Call,
    Reply,
    cache_key,
    request_body,
    request_form,
    request_headers,
    subject_key,
)
from balcaprl.rewards.endpoint.reply_checks import ReplyError, parse_reply
from balcaprl.rewards.endpoint.server.cache import ReplyCache
from balcaprl.rewards.endpoint.server.concurrency import AllServersGivenUpError, Clock, Dispatcher, Server
from balcaprl.rewards.endpoint.server.connections import Connections
from balcaprl.rewards.endpoint.server.item_faults import CallIdentity, Control
from balcaprl.rewards.endpoint.server.outcomes import AttemptError, Blame, Unreached, error_inside, text_of
from balcaprl.rewards.endpoint.server.refusals import CallFailedError, CallLeftOutError, RefusalMemory, Refusals
from balcaprl.rewards.endpoint.server.retries import Retries
from balcaprl.rewards.endpoint.server.usage import Ledger, Reservation, Usage, most_tokens
from balcaprl.types import JudgeStoppedError


@dataclass
class _UnderWay:
    task: asyncio.Task[Reply]
    num_waiting: int = 0


class JudgeClient:
    """Asks the servers of one judge model. All methods except the constructor must be called in one event loop.

    Raises:
        ValueError: no server or no model is configured, or a key's environment variable is empty.
        ImportError: the HTTP client or the retry library is not installed.
    """

    def __init__(
        self,
        protocol: ProtocolConfig,
        endpoint: EndpointConfig,
        *,
        ledger: Ledger | None = None,
        refusals: RefusalMemory | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        if not endpoint.servers:
            raise ValueError(
                "endpoint.servers: the endpoint judge needs at least one server, such as http://host:8000/v1"
            )
        if not protocol.model and not all(server.model for server in endpoint.servers):
            raise ValueError("reward.protocol.model: name the judge model as its servers call it")
        self._protocol, self._endpoint, self._clock = protocol, endpoint, clock
        self.cache: ReplyCache | None = None
        """Reply cache that is consulted before a server is asked; None: no cache."""
        self.ledger = ledger or Ledger(endpoint)
        self.usage = Usage()
        headers = {server.url: request_headers(server) for server in endpoint.servers}
        keys = [header["Authorization"].split()[1] for header in headers.values() if "Authorization" in header]
        self._refusals = Refusals(refusals or RefusalMemory(), keys, endpoint.required_share)
        self._forms = {request_form(server, protocol.model): server for server in endpoint.servers}
        self._dispatcher = Dispatcher(
            [
                Server.of(server, endpoint.timeout_s, endpoint.breaker_failures, endpoint.breaker_wait_s, clock)
                for server in endpoint.servers
            ],
            clock,
        )
        try:
            self._connections, self._retries = Connections(endpoint, headers), Retries(endpoint, self.servers)
        except ImportError as error:
            raise ImportError(f"the endpoint judge needs aiohttp and tenacity: {install_extra('judge')}") from error
        self._under_way: dict[bytes, _UnderWay] = {}
        self._watchdog: asyncio.Task[None] | None = None
        self._last_valid = 0.0
        self._last_failure = ""
        self.stopped: JudgeStoppedError | None = None

    @property
    def servers(self) -> list[Server]:
        """The servers with their current state."""
        return self._dispatcher.servers

    @property
    def num_slots(self) -> int:
        """Largest number of requests that may be in flight at once."""
        return sum(server.config.max_concurrency for server in self.servers)

    async def ask(self, call: Call, affinity: str = "", item: Hashable = None) -> Reply:
        """Get the valid reply to a call.

        Args:
            call: the call to make.
            affinity: calls with the same affinity go to the same server while it has room.
            item: calls with the same item are about one thing, such as the captions of one picture; default: this call.

        Raises:
            CallRefusedError: the call can never be answered, because of its picture or text.
            CallLeftOutError: the call fails time after time, while others are answered.
            CallFailedError: no attempt brought a valid reply.
            JudgeStoppedError: the budget is spent; every server is given up; no server was ever reached for
                ``endpoint.reach_s``; none gave a valid reply for ``endpoint.patience_s``; or every call is refused.
        """
        self.usage.num_calls += 1
        identity = self._identify(call)
        item = identity.key if item is None else item
        cached = self._cached(identity, call)
        if cached is not None:
            self.usage.num_cached += 1
            self._refusals.note_cached(call, identity)
            return cached
        try:
            self._refusals.check(call, identity, item)
        except (CallLeftOutError, JudgeStoppedError) as error:
            self.usage.note_left_out(is_failing=getattr(error, "may_pass", False))
            raise
        under_way = self._under_way.get(identity.key)
        if under_way is None:
            sending = asyncio.create_task(self._send_until_valid(call, identity, affinity, item))
            under_way = self._under_way[identity.key] = _UnderWay(sending)
            self._start_watchdog()
        else:
            self.usage.num_shared += 1
        under_way.num_waiting += 1
        try:
            return await asyncio.shield(under_way.task)
        except asyncio.CancelledError:
            if under_way.task.cancelled() and self.stopped is not None:
                raise self.stopped from None
            raise
        finally:
            under_way.num_waiting -= 1
            if not under_way.num_waiting:
                under_way.task.cancel()  # no caller waits for the reply any more; a finished task is not affected

    async def close(self) -> None:
        """Close all connections and the refusal memory, and save the ledger."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        await self._connections.close()
        self.ledger.save()
        self._refusals.memory.close()

    # ------------------------------------------------------------------------------------------------ cache

    def _identify(self, call: Call) -> CallIdentity:
        by_model = {
            form: cache_key(call, self._protocol, server.model or self._protocol.model, server.request)
            for form, server in self._forms.items()
        }
        servers = "\n".join(sorted(f"{server.config.url} {server.config.model}" for server in self.servers)).encode()
        key = hashlib.sha256(b"".join(by_model.values()) + servers).digest()
        subject = subject_key(call, self._protocol, ",".join(self._forms))
        return CallIdentity(by_model, key, subject and hashlib.sha256(subject + servers).digest())

    def _cached(self, identity: CallIdentity, call: Call) -> Reply | None:
        if self.cache is None:
            return None
        for value in map(self.cache.get, identity.by_model.values()):
            try:
                if value is not None:
                    return parse_reply(call, value.decode(), self._protocol)
            except (ReplyError, UnicodeDecodeError):
                continue  # not an entry that this client wrote; it counts as missing
        return None

    def _store(self, key: bytes, call: Call, reply: Reply, model: str) -> None:
        if self.cache is not None:
            value = reply.model_dump_json().encode()
            self.cache.put(key, value, task=f"{call.task.name}.{call.task.version}", model=model)

    # ------------------------------------------------------------------------------------------------ attempts

    async def _send_until_valid(self, call: Call, identity: CallIdentity, affinity: str, item: Hashable) -> Reply:
        """Make attempts until one is valid or all are used up, and count how the call ended."""
        bodies: dict[str, Any] = {}
        ended = False
        self._refusals.note_start(call, item)
        try:
            reply, form = await self._retries.of_one_call()(self._try, call, identity, affinity, bodies)
            ended = True
        except AttemptError as error:
            ended = True
            self._give_up(call, identity, item, error)
            raise CallFailedError(f"{call.task.name}: {self._refusals.told(error, call)}") from None
        except AllServersGivenUpError as error:
            self.usage.num_given_up += 1
            raise JudgeStoppedError(f"no judge server is left: {error}") from None
        except (JudgeStoppedError, asyncio.CancelledError) as error:
            self.usage.note_ended(is_cancelled=isinstance(error, asyncio.CancelledError))
            raise
        finally:
            self._under_way.pop(identity.key, None)
            if not ended:
                self._refusals.note_failed(call, item)
        self._last_valid = self._clock()
        self._refusals.note_valid(call, identity)
        self._store(identity.by_model[form], call, reply, form)
        return reply

    def _give_up(self, call: Call, identity: CallIdentity, item: Hashable, error: AttemptError) -> None:
        """Count a call whose attempts are used up; raises whatever ``Refusals.leave_out`` raises."""
        try:
            self._refusals.leave_out(call, identity, item, error)
        except (CallLeftOutError, JudgeStoppedError) as left_out:
            self._last_valid = self._clock()
            self.usage.note_left_out(is_failing=getattr(left_out, "may_pass", False))
            raise
        self.usage.num_given_up += 1

    async def _try(
        self, call: Call, identity: CallIdentity, affinity: str, bodies: dict[str, Any]
    ) -> tuple[Reply, str]:
        """Make one attempt; if it fails, find out whether the call or the server is at fault."""
        try:
            # The first attempt fills bodies, so bodies that are not empty mean a retry.
            reply, form, _ = await self._attempt(call, affinity, bodies, again=bool(bodies))
            return reply, form
        except AttemptError as error:
            await self._refusals.faults.note_failed(call, identity, error, partial(self._ask_control, affinity))
            raise

    async def _ask_control(self, affinity: str, control: Control) -> str:
        """Make one attempt at a call that was answered before; returns the server's url."""
        self.usage.num_calls += 1
        try:
            _, _, url = await self._attempt(control.call, affinity, {}, again=True)
        except BaseException as error:
            self.usage.note_ended(is_cancelled=isinstance(error, asyncio.CancelledError))
            raise
        self._last_valid = self._clock()
        self._refusals.note_control(control.call)
        return url

    async def _attempt(
        self, call: Call, affinity: str, bodies: dict[str, Any], *, again: bool
    ) -> tuple[Reply, str, str]:
        """Make one attempt at one server and count how it ended; returns the reply, the request form and the url."""
        server = await self._dispatcher.acquire(affinity, again=again)
        try:
            model = server.config.model or self._protocol.model
            form = request_form(server.config, model)
            if form not in bodies:
                bodies[form] = request_body(call, self._protocol, model, server.config.request)
            most = most_tokens(bodies[form], call.image.num_pixels if call.image is not None else 0)
            reservation = await self.ledger.reserve(server.config, most)
        except BaseException:
            server.breaker.note_neutral()
            self._dispatcher.release(server)
            raise
        started = self._clock()
        self.usage.num_attempts += 1
        try:
            data = await self._connections.post(server, bodies[form], reservation)
            reply = self._read_envelope(call, reservation, data)
            self.usage.num_valid += 1
            self.usage.latencies_s.append(self._clock() - started)
            server.note_served(self._clock() - started)
        except AttemptError as error:
            self.usage.failures[error.kind] += 1
            self._last_failure = self._refusals.told(error, call)
            self._note(server, call, error, self._clock() - started)
            error.server, error.server_is_sound = server.config.url, server.is_sound
            raise
        except BaseException:
            self.usage.failures["cancelled"] += 1
            server.breaker.note_neutral()
            raise
        finally:
            self.ledger.release(self.usage, reservation)
            self._dispatcher.release(server)
        return reply, form, server.config.url

    def _note(self, server: Server, call: Call, error: AttemptError, latency_s: float) -> None:
        """Record in the server's state how an attempt failed."""
        if error.blame is Blame.OVERLOAD:
            server.note_overloaded(error.wait_s or 0.0)
        elif error.blame in (Blame.ACCESS, Blame.FORM):
            server.note_refused(self._refusals.told(error, call))
        elif error.unreached is not None and not server.was_reached:
            server.note_unreachable(str(error), for_good=error.unreached in (Unreached.DNS, Unreached.TLS))
        elif error.blame is Blame.SERVER:
            server.note_failed(overloaded=error.kind == "timeout")
        elif error.blame is Blame.ITEM:
            server.note_alive()
        else:
            server.note_served(latency_s, valid=False)

    def _read_envelope(self, call: Call, reservation: Reservation, data: bytes) -> Reply:
        """Parse the reply inside the API's envelope, and book its cost whether or not it is valid."""
        if not data.strip():
            raise AttemptError("empty", "the reply is empty")
        try:
            envelope = json.loads(data)
        except (ValueError, RecursionError):
            raise AttemptError("not_json", "the reply is no whole JSON object") from None
        if not isinstance(envelope, dict):
            raise AttemptError("schema", "the reply is no chat completion")
        self.ledger.book(self.usage, reservation, envelope.get("usage"), len(data))
        inside = error_inside(envelope, self._endpoint.patience_s)
        if inside is not None:
            raise inside
        try:
            choice = envelope["choices"][0]
            text, finish_reason = text_of(choice["message"]["content"]), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise AttemptError("schema", "the reply is no chat completion") from None
        if not isinstance(text, str):
            raise AttemptError("schema", "the reply is no text")
        try:
            return parse_reply(call, text, self._protocol, finish_reason=finish_reason)
        except ReplyError as error:
            # A reply that was cut off once is usually cut off again, at full price, so it uses up two attempts.
            raise AttemptError(error.kind, str(error), weight=2 if error.kind == "truncated" else 1) from None

    # ------------------------------------------------------------------------------------------------ patience

    def _start_watchdog(self) -> None:
        if self._watchdog is None or self._watchdog.done():
            self._last_valid = self._clock()
            self.stopped = None
            self._watchdog = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """End all calls if no server is reached or no valid reply comes for too long; runs while any are in flight."""
        patience, reach = self._endpoint.patience_s, self._endpoint.reach_s
        while self._under_way:
            await asyncio.sleep(min(1.0, patience / 10, reach / 10))
            self._end_if_unreached(reach)
            if self.stopped is not None:
                return
            if self._clock() - self._last_valid > patience:
                failures = ", ".join(f"{kind} {count}" for kind, count in self.usage.failures.most_common(5))
                servers = ", ".join(server.config.url for server in self.servers)
                self.stopped = JudgeStoppedError(
                    f"no valid reply of a judge server for {patience:g} s (endpoint.patience_s) from {servers}; "
                    f"failures since the last step: {failures or 'none, they do not answer'}"
                    + (f"; the last: {self._last_failure}" if self._last_failure else "")
                )
                self._cancel_all()
                return

    def _end_if_unreached(self, reach_s: float) -> None:
        """Stop if every server has been unreachable since its first attempt, for more than ``reach_s`` seconds."""
        now, servers = self._clock(), self.servers
        if all(s.unreached_since is not None and now - s.unreached_since > reach_s for s in servers):
            told = "; ".join(f"{server.config.url}: {server.why_unreached}" for server in servers)
            self.stopped = JudgeStoppedError(
                f"no judge server was ever reached, for {reach_s:g} s (endpoint.reach_s): {told}. Is it running, and is the "
                "url right?"
            )
            self._cancel_all()

    def _cancel_all(self) -> None:
        for under_way in list(self._under_way.values()):
            under_way.task.cancel()
