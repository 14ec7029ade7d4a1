"""Requests to judge servers over HTTP. This is the only module that imports the HTTP client.

Each request has a time-out, and replies are read only up to a size limit. Only the configured addresses are contacted:
no redirect is followed, and no proxy of the environment is used unless the server's ``proxy_from_env`` is on. Error
messages hold no header.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from balcaprl.config import EndpointConfig
from balcaprl.rewards.endpoint.server.concurrency import Server
from balcaprl.rewards.endpoint.server.outcomes import AttemptError, Unreached, error_of_status
from balcaprl.rewards.endpoint.server.usage import Reservation

if TYPE_CHECKING:
    import aiohttp

_CHUNK = 1 << 16
_KEEP_ALIVE_S = 60.0
_JSON_TYPES = ("application/json", "text/json", "text/plain")


class Connections:
    """The connections to the servers of one judge model, opened when they are needed and kept for further requests.

    Args:
        endpoint: the limits of time and size.
        headers: the headers of all requests to a server, by the server's url.

    Raises:
        ImportError: the HTTP client is not installed.
    """

    def __init__(self, endpoint: EndpointConfig, headers: Mapping[str, dict[str, str]]) -> None:
        import aiohttp  # noqa: F401

        self._endpoint, self._headers = endpoint, headers
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def post(self, server: Server, body: dict[str, Any], reservation: Reservation) -> bytes:
        """Send a request to a server and read the reply, which has status 200 and is declared as JSON or plain text.

        Sets ``reservation.is_sent`` to whether the server may have worked on the request, and marks the server as
        reached once it answers.

        Raises:
            AttemptError: there was no connection, or no such reply.
        """
        import aiohttp

        url = server.config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        headers = self._headers[server.config.url]
        data = json.dumps(body).encode()
        reservation.is_sent = True
        try:
            session = self._session(server.config.proxy_from_env)
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
        return bytes(reply)

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._endpoint.max_reply_bytes:
            raise AttemptError("too_large", "the reply exceeds endpoint.max_reply_bytes")

    def _session(self, proxy_from_env: bool) -> aiohttp.ClientSession:
        if proxy_from_env not in self._sessions:
            import aiohttp

            endpoint = self._endpoint
            timeout = aiohttp.ClientTimeout(total=endpoint.timeout_s, sock_connect=endpoint.connect_timeout_s)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            self._sessions[proxy_from_env] = aiohttp.ClientSession(
                connector=connector, timeout=timeout, trust_env=proxy_from_env, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._sessions[proxy_from_env]


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
