"""What a run's judge calls cost (requests, failures by kind, tokens, money), and the budget that limits it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balcaprl.config import EndpointConfig, ServerConfig
from balcaprl.files.jsonl import read_json
from balcaprl.files.ownership import write_atomically
from balcaprl.types import JudgeStoppedError

LEDGER = "judge_usage.json"
logger = logging.getLogger(__name__)

_MAX_LEDGER_BYTES = 1 << 16
_TOTALS = ("num_replies", "prompt_tokens", "completion_tokens", "cost")
_UNDER_WAY = {name: f"{name}_under_way" for name in _TOTALS[1:]}
_LARGEST = ("dearest", "longest")
_SAVE_EVERY_S = 1.0
_TEMPLATE_TOKENS = 1024
_PIXELS_PER_TOKEN = 14 * 14
_FAR_LESS = 512
_FAR_MORE = 64


class BudgetSpentError(JudgeStoppedError):
    """The run has spent its budget of money or tokens."""


@dataclass
class Usage:
    """Counts of what happened in one period of time.

    ``num_attempts = num_valid + failures.total()``. A *call* is answered by the cache or by an equal call, or makes
    attempts until it has a valid reply, is given up, or is cancelled.
    """

    num_calls: int = 0
    num_cached: int = 0
    """Calls that the cache answered; they do not count as attempts."""
    num_shared: int = 0
    """Calls that took the reply to an equal call in flight."""
    num_attempts: int = 0
    num_valid: int = 0
    num_given_up: int = 0
    """Calls that ended without a valid reply, except cancelled ones."""
    num_refused: int = 0
    """Given-up calls that can never succeed, because of their picture or text; remembered ones make no attempt."""
    num_failing: int = 0
    """Given-up calls that fail time after time while others are answered; remembered ones make no attempt."""
    num_cancelled: int = 0
    """Calls that were cancelled in flight."""
    failures: Counter[str] = field(default_factory=Counter)
    """Attempts that brought no valid reply, by kind."""
    num_replies: int = 0
    """Replies that report their token counts, valid or not."""
    estimated_tokens: int = 0
    """Tokens in the next two counts that no server reported: the most that the requests can have taken."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    """Duration of each of the latest valid attempts, in seconds."""

    def note_ended(self, *, is_cancelled: bool) -> None:
        """Count a call that ended without a reply."""
        self.num_cancelled += is_cancelled
        self.num_given_up += not is_cancelled

    def note_left_out(self, *, is_failing: bool) -> None:
        """Count a call that is not made, or not made again, because it fails time after time or is refused."""
        self.num_given_up += 1
        self.num_failing += is_failing
        self.num_refused += not is_failing

    def metrics(self) -> dict[str, float]:
        """Metrics for the log: counts under ``judge/``; latencies, which differ from run to run, under ``time/``."""
        values: dict[str, float] = {
            "judge/calls": self.num_calls,
            "judge/cached": self.num_cached,
            "judge/shared": self.num_shared,
            "judge/attempts": self.num_attempts,
            "judge/valid": self.num_valid,
            "judge/given_up": self.num_given_up,
            "judge/refused": self.num_refused,
            "judge/failing": self.num_failing,
            "judge/cancelled": self.num_cancelled,
            "judge/prompt_tokens": self.prompt_tokens,
            "judge/completion_tokens": self.completion_tokens,
            "judge/estimated_tokens": self.estimated_tokens,
            "judge/cost": self.cost,
            **{f"judge/failed_{kind}": count for kind, count in sorted(self.failures.items())},
        }
        if self.latencies_s:
            ordered = sorted(self.latencies_s)
            values["time/judge_p50"] = ordered[len(ordered) // 2]
            values["time/judge_p95"] = ordered[int(0.95 * (len(ordered) - 1))]
        return {name: float(value) for name, value in values.items()}


@dataclass(frozen=True)
class Tokens:
    """Numbers of prompt and completion tokens, of one request or of many."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt + self.completion


def most_tokens(body: dict[str, Any], num_pixels: int) -> Tokens:
    """Upper bound of the tokens of a request: reserved before it is sent, and booked if no server reports its tokens.

    It is the sum of one token for each byte of text (no byte-level tokenizer makes more), one for each 14 x 14 pixels
    and 1,024 for an image, 1,024 for what a chat template adds, and the longest reply that is allowed.
    """
    texts = [json.dumps(body.get("response_format", ""))]
    num_images = 0
    for message in body["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        texts += [part["text"] for part in parts if "text" in part]
        num_images += sum("image_url" in part for part in parts)
    prompt = sum(len(text.encode("utf-8", "replace")) for text in texts) + _TEMPLATE_TOKENS * (1 + num_images)
    longest = body.get("max_completion_tokens") or body["max_tokens"]
    return Tokens(prompt + num_pixels // _PIXELS_PER_TOKEN, int(longest))


@dataclass(eq=False)
class Reservation:
    """What a request in flight may cost."""

    server: ServerConfig
    most: Tokens
    is_sent: bool = False
    """Whether a server may have worked on the request."""
    is_booked: bool = False

    @property
    def cost(self) -> float:
        """The most that the request may cost."""
        return _cost(self.server, self.most)


class Ledger:
    """Adds up a run's usage, keeps it in the run folder across restarts, and tells when the budget is spent.

    A request is started only if what is spent, plus the most that it and all requests in flight may take, stays within
    the budget. Otherwise it waits for the requests in flight. If not even one request fits, requests go one at a time,
    as long as the budget has room for a request as expensive as the most expensive one so far. So the budget is
    exceeded by one request at most. A token count that a server does not report, or reports implausibly, is booked as
    the most that it can be, and so is a request that brought no reply.

    The account is written about once a second and at the end. It includes what the requests in flight may take, so that
    they count as spent after kill -9.

    Raises:
        ValueError: the account is damaged, or a budget cannot be kept: a server has no prices, or all prices are 0.
    """

    def __init__(
        self, config: EndpointConfig, path: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._path = path
        self._clock = clock
        self.totals: dict[str, float] = dict.fromkeys(_TOTALS, 0)
        self._under_way: set[Reservation] = set()
        self._released: asyncio.Event | None = None
        self._dearest = 0.0
        self._longest = 0.0
        self._factor = 1.0
        """Largest ratio so far, from 1 to 64, of the tokens that a request took to its ``most_tokens``.

        Reservations are scaled by it, because some services bill an image as 30 times its patches.
        """
        self._saved_at = -math.inf
        self._lock = threading.Lock()
        self._distrusted: set[str] = set()
        _check_prices(config)
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            plain = read_json(path, _MAX_LEDGER_BYTES)
            values = {
                **dict.fromkeys([*_UNDER_WAY.values(), *_LARGEST], 0),
                **{name: plain[name] for name in _TOTALS},
                **plain,
            }
            if not all(type(value) in (int, float) and 0 <= value < math.inf for value in values.values()):
                raise ValueError("a total is no number, or below 0")
            self.totals = {name: values[name] + values.get(_UNDER_WAY.get(name), 0) for name in _TOTALS}
            number = max(1, values["num_replies"])
            self._dearest = values["dearest"] or self.totals["cost"] / number
            self._longest = values["longest"] or self._tokens / number
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged account of what the judge cost; mend or remove it") from error

    async def reserve(self, server: ServerConfig, most: Tokens) -> Reservation:
        """Wait until a request may start, and reserve what it may cost; ``release`` gives the reservation back.

        Raises:
            BudgetSpentError: the budget of money or tokens is spent.
        """
        reservation = Reservation(server, Tokens(int(self._factor * most.prompt), int(self._factor * most.completion)))
        while not self._fits(
            sum(r.cost for r in self._under_way), sum(r.most.total for r in self._under_way), reservation
        ):
            if not self._under_way:
                self._check_last(reservation)
                break
            self._released = self._released or asyncio.Event()
            await self._released.wait()
        self._under_way.add(reservation)
        return reservation

    def _fits(self, cost: float, tokens: float, reservation: Reservation) -> bool:
        budget, token_budget = self._config.budget, self._config.token_budget
        cost += self.totals["cost"] + reservation.cost
        tokens += self._tokens + reservation.most.total
        return (budget is None or cost <= budget) and (token_budget is None or tokens <= token_budget)

    def _check_last(self, reservation: Reservation) -> None:
        """Raise if the budget has no room for a request as large as the largest so far; no other may be in flight."""
        config, cost = self._config, self.totals["cost"]
        if config.budget is not None and cost + max(self._dearest, 1e-300) > config.budget:
            raise BudgetSpentError(
                f"the judge's budget is spent: {cost:.4g} of endpoint.budget {config.budget:g}; raise it to go on"
            )
        if config.token_budget is not None and self._tokens + max(self._longest, 1) > config.token_budget:
            raise BudgetSpentError(
                f"the judge's tokens are spent: {self._tokens:,} of endpoint.token_budget {config.token_budget:,}; "
                "raise it to go on"
            )

    @property
    def _tokens(self) -> float:
        return self.totals["prompt_tokens"] + self.totals["completion_tokens"]

    def book(self, usage: Usage, reservation: Reservation, told: Any = None, num_bytes: int | None = None) -> None:
        """Book the tokens and the cost of a request.

        Args:
            usage: counts of the current period, which are increased.
            reservation: the request's reservation.
            told: the ``usage`` field of the reply, unchecked.
            num_bytes: length of the reply in bytes, if it was read; bounds the completion tokens that are assumed.
        """
        most = reservation.most
        if num_bytes is not None:
            most = Tokens(most.prompt, min(most.completion, num_bytes))
        took, num_estimated = told_tokens(told, most, reservation.most)
        reservation.is_booked = True
        excess = max(
            took.prompt / max(1, reservation.most.prompt), took.completion / max(1, reservation.most.completion)
        )
        self._factor = min(_FAR_MORE, max(self._factor, self._factor * excess))
        if num_estimated and reservation.server.url not in self._distrusted and num_bytes is not None:
            self._distrusted.add(reservation.server.url)
            limited = self._config.budget is not None or self._config.token_budget is not None
            logger.log(
                logging.WARNING if limited else logging.INFO,
                "%s tells no tokens, or none that can be: estimated as one for each byte of text and each 14 x 14 pixels",
                reservation.server.url,
            )
        cost = _cost(reservation.server, took)
        self._dearest, self._longest = max(self._dearest, cost), max(self._longest, took.total)
        usage.num_replies += not num_estimated
        usage.estimated_tokens += num_estimated
        usage.prompt_tokens += took.prompt
        usage.completion_tokens += took.completion
        usage.cost += cost
        for name, value in zip(_TOTALS, (not num_estimated, took.prompt, took.completion, cost), strict=True):
            self.totals[name] += value

    def release(self, usage: Usage, reservation: Reservation) -> None:
        """End a request; one that was sent but brought no reply is booked at the most that it can have taken."""
        if reservation.is_sent and not reservation.is_booked:
            self.book(usage, reservation)
        self._under_way.discard(reservation)
        if self._released is not None:
            self._released.set()
            self._released = None
        if self._clock() - self._saved_at >= _SAVE_EVERY_S:
            try:
                self.save()
            except OSError as error:  # not fatal here: the run's next ``save`` raises it
                logger.warning("%s cannot be written: %s", self._path, error)

    def save(self) -> None:
        """Write the totals to the run folder, whole or not at all."""
        self._saved_at = self._clock()
        if self._path is None:
            return
        under_way = list(self._under_way)
        amounts = {
            "prompt_tokens": sum(r.most.prompt for r in under_way),
            "completion_tokens": sum(r.most.completion for r in under_way),
            "cost": sum(r.cost for r in under_way),
        }
        plain = {**self.totals, **{key: amounts[name] for name, key in _UNDER_WAY.items()}}
        plain |= zip(_LARGEST, (self._dearest, self._longest), strict=True)
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, (json.dumps(plain, indent=2) + "\n").encode())


def _check_prices(config: EndpointConfig) -> None:
    if config.budget is None:
        return
    missing = [s.url for s in config.servers if s.input_price is None or s.output_price is None]
    if missing:
        raise ValueError(
            f"endpoint.budget: what is spent cannot be told without prices; give input_price and output_price for {missing[0]} "
            "(0 where it is free), or use endpoint.token_budget"
        )
    if config.servers and not any(s.input_price or s.output_price for s in config.servers):
        raise ValueError("endpoint.budget: all prices are 0, so that it is never spent; use endpoint.token_budget")


def _cost(server: ServerConfig, tokens: Tokens) -> float:
    return (tokens.prompt * (server.input_price or 0) + tokens.completion * (server.output_price or 0)) / 1e6


def told_tokens(told: Any, estimate: Tokens, most: Tokens) -> tuple[Tokens, int]:
    """Tokens that a request took, as its reply reports them if plausible, and how many of them are estimates instead.

    Args:
        told: a mapping with OpenAI's ``prompt_tokens``, ``completion_tokens`` and ``total_tokens``, or with
            ``input_tokens`` and ``output_tokens``; whole numbers, also as 20.0 or "20".
        estimate: tokens to assume where none are reported; a reported number far below it is not believed.
        most: upper bound of the tokens; a reported number far above it is not believed.
    """
    told = told if isinstance(told, dict) else {}
    prompt = _told(told, ("prompt_tokens", "input_tokens"), most.prompt, estimate.prompt)
    completion = _told(told, ("completion_tokens", "output_tokens"), most.completion, estimate.completion)
    total = _told(told, ("total_tokens",), most.total, estimate.prompt)
    if total is not None and prompt is None and completion is None:
        completion = min(total, estimate.completion)  # usually the more expensive kind
        prompt = total - completion
    elif total is not None and prompt is None and completion is not None:
        prompt = max(total - completion, 0)
    elif total is not None and prompt is not None and total > prompt:
        completion = max(completion or 0, total - prompt)  # some services do not count thoughts
    num_estimated = (estimate.prompt if prompt is None else 0) + (estimate.completion if completion is None else 0)
    took = Tokens(
        estimate.prompt if prompt is None else prompt, estimate.completion if completion is None else completion
    )
    return took, num_estimated


def _told(told: dict[str, Any], names: tuple[str, ...], most: int, estimate: int) -> int | None:
    """A reported number of tokens, or None if implausible: 0, below ``estimate // 512``, or above ``64 * most``."""
    value = next((told[name] for name in names if told.get(name) is not None), None)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if max(1, estimate // _FAR_LESS) <= value <= _FAR_MORE * max(most, 1) else None
