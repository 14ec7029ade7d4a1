"""The section ``endpoint``: how a judge model is reached."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from balcaprl.config.base import Section

_FORMS = {
    "url": (
        r"https?://[^\s/?#@]+(/[^\s?#@]*)?",
        "http://host:port/v1 or https://..., without user, password, query or fragment",
    ),
    "api_key_env": (
        r"([A-Z_][A-Z0-9_]{0,63})?",
        "the name of an environment variable, such as JUDGE_API_KEY; never a key itself",
    ),
}
"""Pattern that each of two fields must match, and the text of its error. pydantic's own patterns are not used, because
their errors repeat what was given, which may be a password or a key."""


class RequestOptions(Section):
    """How the requests to a server differ from the usual ones. This is part of the cache key."""

    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the request field that limits the reply; reasoning models of some services need
    ``max_completion_tokens``."""
    temperature: bool = True
    """Send ``reward.protocol.temperature``; set this to false for models that accept only their own temperature."""
    schema_bounds: bool = True
    """Keep the bounds on lengths and counts in the schemas; set this to false for services that accept only a strict
    subset of JSON Schema."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, such as ``reasoning_effort: low``."""

    @field_validator("extra_body")
    @classmethod
    def _keeps_what_is_asked(cls, extra: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "messages", "response_format", "stream", "n"} & extra.keys()
        if own:
            raise ValueError(f"{', '.join(sorted(own))} cannot be replaced")
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected what JSON can say: {error}") from None
        return extra


class ServerConfig(Section):
    """One OpenAI-compatible server of the judge model."""

    url: str
    """Address of the server, such as ``http://127.0.0.1:8000/v1``, without user, password, query or fragment."""
    model: str = ""
    """Name of the model on this server. Empty: the name in ``reward.protocol.model``."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; the key itself is not written to any file."""
    weight: float = Field(1.0, gt=0)
    """Share of the images that this server gets, relative to the other servers."""
    max_concurrency: int = Field(64, ge=1, le=100_000)
    """Most requests at once; the run finds out how many of them are worthwhile."""
    input_price: float | None = Field(None, ge=0)
    """Price of a million prompt tokens, in the currency of ``endpoint.budget``. A budget needs this price; 0 means that
    prompt tokens are free."""
    output_price: float | None = Field(None, ge=0)
    """Price of a million completion tokens, in the same currency. A budget needs this price too; 0: they are free."""
    request: RequestOptions = RequestOptions()
    """Form of the requests to this server."""
    proxy_from_env: bool = False
    """Reach the server through the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name; if false, these are
    ignored."""

    @field_validator(*_FORMS)
    @classmethod
    def _has_its_form(cls, text: str, info: ValidationInfo) -> str:
        pattern, expected = _FORMS[info.field_name or ""]
        if not re.fullmatch(pattern, text):
            raise ValueError(f"expected {expected}")
        return text


class EndpointConfig(Section):
    """How the judge model is reached. A resumed run may change any of it."""

    servers: list[ServerConfig] = Field([])
    """Servers of the judge model, all of which serve the same model. Nothing else is ever contacted."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds after which a request is given up and made again."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Seconds after which an attempt to connect is given up."""
    max_attempts: int = Field(6, ge=1)
    """Most attempts at one request; refusals because the server has no room (429) do not count."""
    retry_wait_s: float = Field(0.5, ge=0)
    """Mean wait before the second attempt, in seconds. The wait doubles with each further attempt, with jitter; a
    server's Retry-After takes precedence. While the server answers most requests well, the wait does not grow unless
    the server is overloaded, and a request with an invalid reply is repeated at once."""
    max_retry_wait_s: float = Field(30.0, ge=0)
    """Longest wait between two attempts, in seconds."""
    max_reply_bytes: int = Field(1 << 20, ge=1024)
    """Longest reply, in bytes; a longer reply is not read to its end."""
    breaker_failures: int = Field(10, ge=1)
    """Failures in a row after which the circuit breaker pauses a server; then one request tries the server again."""
    breaker_wait_s: float = Field(2.0, gt=0)
    """First pause of the circuit breaker, in seconds; each further pause is twice as long, up to a minute."""
    required_share: float = Field(0.9, gt=0, le=1)
    """Share of a step's scores with which the step goes on, after a last wait of ``grace_s``; the other scores count as
    missing. A picture, reference or request on which a server always fails, while it answers others, is left out for a
    while: at most as many as this share allows, but always up to four of a kind."""
    grace_s: float = Field(20.0, ge=0)
    """Seconds to wait for stragglers once the required share has arrived."""
    patience_s: float = Field(600.0, gt=0)
    """Seconds without a single valid reply after which the run is saved and ends."""
    reach_s: float = Field(60.0, gt=0)
    """Seconds after which the run ends if no server was ever reached, because nothing listens there (ours)."""
    budget: float | None = Field(None, gt=0)
    """Most that the run may spend, by the prices of its servers; at that point the run is saved and ends. The excess is
    at most the cost of one request. A resumed run continues the count; each call of ``prepare``, ``recaption`` and
    ``judge-audit`` has its own count. If a server does not report its tokens, an upper bound is counted: mainly one for
    each byte of text and for each 14 x 14 pixels, and the longest reply."""
    token_budget: int | None = Field(None, ge=1, le=10**15)
    """Most tokens that the run may use, prompts and completions together; counted like ``budget``."""
    cache: Path | None = Path("~/.cache/balcaprl/judge.db")
    """File of the reply cache, which runs and processes share; null: no cache."""
    cache_max_mib: int = Field(4096, ge=1)
    """Bound on the size of the cache's files together, in MiB; the entries that were unused for longest are removed."""
    units: Path | None = None
    """File of reference units that ``balcaprl prepare`` wrote. Default: the one beside ``data.path``, if it is
    there."""
