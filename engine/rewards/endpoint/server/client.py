"""Calls to a judge model over HTTP. This is the only module that imports the HTTP client.

A call is first looked up in the cache. If an equal call is in flight, it takes the reply to that one. Otherwise it is
sent to a server with a free place, and sent again where the failure may pass. Each request has a time-out, and replies
are read only up to a size limit. Only the configured addresses are contacted: no redirect is followed, and no proxy of
the environment is used unless the server's ``proxy_from_env`` is on. Error messages hold no header and no caption, and
at most one redacted line of what a server says.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from balcaprl.config import EndpointConfig, ProtocolConfig
from balcaprl.extras import install_extra
from balcaprl.rewards.endpoint.protocol import (
    Call,
    Reply,
    ReplyError,
    cache_key,
    parse_reply,
    request_body,
    request_form,
    request_headers,
    subject_key,
)
from balcaprl.rewards.endpoint.server.cache import ReplyCache
from balcaprl.rewards.endpoint.server.concurrency import AllServersGivenUpError, Clock, Dispatcher, Server
from balcaprl.rewards.endpoint.server.item_faults import CallIdentity, Control
from balcaprl.rewards.endpoint.server.outcomes import (
    HOPELESS,
    AttemptError,
    Blame,
    Unreached,
    error_inside,
    error_of_status,
    text_of,
)
from balcaprl.rewards.endpoint.server.refusals import CallFailedError, CallLeftOutError, RefusalMemory, Refusals
from balcaprl.rewards.endpoint.server.usage import Ledger, Reservation, Usage, most_tokens
from balcaprl.types import JudgeStoppedError

if TYPE_CHECKING:
    import aiohttp
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

_CHUNK = 1 << 16
_KEEP_ALIVE_S = 60.0
_JSON_TYPES = ("application/json", "text/json", "text/plain")


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
        self._headers = {server.url: request_headers(server) for server in endpoint.servers}
        keys = [header["Authorization"].split()[1] for header in self._headers.values() if "Authorization" in header]
        self._refusals = Refusals(refusals or RefusalMemory(), keys, endpoint.required_share)
        self._forms = {request_form(server, protocol.model): server for server in endpoint.servers}
        self._retry_library()
        self._dispatcher = Dispatcher(
            [
                Server.of(server, endpoint.timeout_s, endpoint.breaker_failures, endpoint.breaker_wait_s, clock)
                for server in endpoint.servers
            ],
            clock,
        )
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
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
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()
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
            reply, form = await self._retrying()(self._try, call, identity, affinity, bodies)
            ended = True
        except AttemptError as error:
            ended = True
            self._give_up(call, identity, item, error)
            raise CallFailedError(f"{call.task.name}: {error}") from None
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

    def _retrying(self) -> Any:
        tenacity = self._retry_library()
        used = 0

        def is_used_up(state: RetryCallState) -> bool:
            nonlocal used
            error = state.outcome.exception() if state.outcome is not None else None
            weight = error.weight if isinstance(error, AttemptError) else HOPELESS
            used += weight
            return weight == HOPELESS or used >= self._endpoint.max_attempts

        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(AttemptError), stop=is_used_up, wait=self._wait_s, reraise=True
        )

    def _wait_s(self, state: RetryCallState) -> float:
        """Seconds until the next attempt.

        A wait that the server asks for is kept, unless more than one server is free. Otherwise the wait is an
        exponential back-off with jitter. If the server answers most requests well, there is no back-off unless it is
        overloaded: a bad reply is asked for again at once, and after any other failure the wait does not grow.
        """
        tenacity, endpoint = self._retry_library(), self._endpoint
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.wait_s if isinstance(error, AttemptError) else None
        if asked and sum(server.is_free for server in self.servers) <= 1:
            return asked * random.uniform(1.0, 1.1)
        if isinstance(error, AttemptError) and error.server_is_sound:
            if error.blame is Blame.REPLY:
                return 0.0
            if error.blame is not Blame.OVERLOAD:
                return min(endpoint.max_retry_wait_s, endpoint.retry_wait_s * random.uniform(0.0, 2.0))
        backoff = tenacity.wait_random_exponential(multiplier=2 * endpoint.retry_wait_s, max=endpoint.max_retry_wait_s)
        return float(backoff(state))

    @staticmethod
    def _retry_library() -> Any:
        try:
            import aiohttp  # noqa: F401
            import tenacity
        except ImportError as error:
            raise ImportError(f"the endpoint judge needs aiohttp and tenacity: {install_extra('judge')}") from error
        return tenacity

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
            reply = await self._exchange(call, server, bodies[form], reservation)
            self.usage.num_valid += 1
            self.usage.latencies_s.append(self._clock() - started)
            server.note_served(self._clock() - started)
        except AttemptError as error:
            self.usage.failures[error.kind] += 1
            self._last_failure = str(error)
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
            server.note_refused(": ".join(filter(None, (str(error), self._refusals.shown(error, call)))))
        elif error.unreached is not None and not server.was_reached:
            server.note_unreachable(str(error), for_good=error.unreached in (Unreached.DNS, Unreached.TLS))
        elif error.blame is Blame.SERVER:
            server.note_failed(overloaded=error.kind == "timeout")
        elif error.blame is Blame.ITEM:
            server.note_alive()
        else:
            server.note_served(latency_s, valid=False)

    async def _exchange(self, call: Call, server: Server, body: dict[str, Any], reservation: Reservation) -> Reply:
        import aiohttp

        url = server.config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        headers = self._headers[server.config.url]
        data = json.dumps(body).encode()
        reservation.is_sent = True
        try:
            session = self._http(server.config.proxy_from_env)
            async with session.post(url, data=data, headers=headers, allow_redirects=False) as response:
                server.was_reached, server.unreached_since = True, None
                if response.status != 200:
                    reservation.is_sent = False  # no service charges for an error
                    told = await response.content.read(_CHUNK)
                    raise error_of_status(response.status, response.headers, told, self._endpoint.patience_s)
                kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                if kind not in _JSON_TYPES and not kind.endswith("+json"):
                    raise AttemptError("content_type", "the reply is not of type application/json")
                reply = bytearray()
                self._check_size(response.content_length or 0)  # rejects a reply by its announced length
                async for chunk in response.content.iter_chunked(_CHUNK):
                    reply += chunk
                    self._check_size(len(reply))
        except aiohttp.ConnectionTimeoutError:
            reservation.is_sent = False
            limit = self._endpoint.connect_timeout_s
            raise _unreached("timeout", f"no connection within {limit:g} s", Unreached.SILENT) from None
        except (TimeoutError, asyncio.TimeoutError):
            raise AttemptError("timeout", f"no reply within {self._endpoint.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, EOFError) as error:
            reservation.is_sent = not isinstance(error, aiohttp.ClientConnectorError)
            raise _connection_error(error) from None
        return self._read_envelope(call, reservation, bytes(reply))

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._endpoint.max_reply_bytes:
            raise AttemptError("too_large", "the reply exceeds endpoint.max_reply_bytes")

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

    def _http(self, proxy_from_env: bool) -> aiohttp.ClientSession:
        if proxy_from_env not in self._sessions:
            import aiohttp

            endpoint = self._endpoint
            timeout = aiohttp.ClientTimeout(total=endpoint.timeout_s, sock_connect=endpoint.connect_timeout_s)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            self._sessions[proxy_from_env] = aiohttp.ClientSession(
                connector=connector, timeout=timeout, trust_env=proxy_from_env, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._sessions[proxy_from_env]

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


def _connection_error(error: BaseException) -> AttemptError:
    """Describe why there was no connection, without the libraries' own texts, which may hold a proxy's password."""
    import aiohttp

    kind, name = "connection", type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return _unreached(kind, "the server's host name is not known: check the url", Unreached.DNS)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _unreached(kind, "the server's TLS certificate is not trusted, or is for another host", Unreached.TLS)
    if isinstance(error, aiohttp.ClientSSLError):
        return _unreached(kind, "no TLS connection could be made: does the server speak https?", Unreached.TLS)
    if isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError):
        return AttemptError(kind, f"the proxy of the environment cannot be used ({name})")
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, ConnectionRefusedError):
        return _unreached(kind, "the connection was refused: no server listens at this address", Unreached.REFUSED)
    return AttemptError(kind, f"the connection failed ({name})")


def _unreached(kind: str, message: str, why: Unreached) -> AttemptError:
    error = AttemptError(kind, message)
    error.unreached = why
    return error
