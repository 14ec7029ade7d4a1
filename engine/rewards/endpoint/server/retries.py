"""Whether a call to a judge model is sent again after an attempt that failed, and after how long a wait."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from balcaprl.config import EndpointConfig
from balcaprl.rewards.endpoint.server.concurrency import Server
from balcaprl.rewards.endpoint.server.outcomes import HOPELESS, AttemptError, Blame

if TYPE_CHECKING:
    from tenacity import RetryCallState


class Retries:
    """The rules of retries for the calls to some servers.

    Raises:
        ImportError: the retry library is not installed.
    """

    def __init__(self, endpoint: EndpointConfig, servers: Sequence[Server]) -> None:
        import tenacity  # noqa: F401

        self._endpoint, self._servers = endpoint, servers

    def of_one_call(self) -> Any:
        """Tenacity's retry loop for one call; it counts how many of ``max_attempts`` the call's failures use up."""
        import tenacity

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

        If the server asks for a wait, that wait counts, unless more than one server is free. Otherwise the wait is an
        exponential back-off with jitter. While the server answers most requests well, only overloads have a back-off: a
        bad reply is asked for again at once, and after any other failure the wait does not grow.
        """
        import tenacity

        endpoint = self._endpoint
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.wait_s if isinstance(error, AttemptError) else None
        if asked and sum(server.is_free for server in self._servers) <= 1:
            return asked * random.uniform(1.0, 1.1)
        if isinstance(error, AttemptError) and error.server_is_sound:
            if error.blame is Blame.REPLY:
                return 0.0
            if error.blame is not Blame.OVERLOAD:
                return min(endpoint.max_retry_wait_s, endpoint.retry_wait_s * random.uniform(0.0, 2.0))
        backoff = tenacity.wait_random_exponential(multiplier=2 * endpoint.retry_wait_s, max=endpoint.max_retry_wait_s)
        return float(backoff(state))
