"""What a run's judge calls cost: requests, failures by kind, tokens, money; and the budget."""

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
from balcaprl.jsonl import read_json
from balcaprl.ownership import write_atomically
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
    """The run spent what it may."""


@dataclass
class Usage:
    """Counts of a stretch of time.

    ``num_attempts = num_valid + all of failures``; a *call* ends valid after one or more attempts, or is given up.
    """

    num_calls: int = 0
    num_cached: int = 0
    """Calls that the cache answered; they are no attempts."""
    num_shared: int = 0
    """Calls that equalled one under way, and took its reply."""
    num_attempts: int = 0
    num_valid: int = 0
    num_given_up: int = 0
    """Calls without a valid reply, whatever was tried."""
    num_refused: int = 0
    """Those of them that can never succeed, for what they are about; from memory, they are no attempts."""
    num_failing: int = 0
    """Those of them that fail time after time while others are answered; from memory, they are no attempts."""
    num_cancelled: int = 0
    """Calls that were under way when they were no longer wanted."""
    failures: Counter[str] = field(default_factory=Counter)
    """Attempts that brought no valid reply, by kind."""
    num_replies: int = 0
    """Replies that tell their tokens, valid or not."""
    estimated_tokens: int = 0
    """Those of the following that no server told: the most that it can have been."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    """Of the latest valid attempts."""

    def note_ended(self, *, is_cancelled: bool) -> None:
        """A call ended without a reply."""
        self.num_cancelled += is_cancelled
        self.num_given_up += not is_cancelled

    def note_left_out(self, *, is_failing: bool) -> None:
        """A call is not made, or not made again: it fails time after time, or else is refused."""
        self.num_given_up += 1
        self.num_failing += is_failing
        self.num_refused += not is_failing

    def metrics(self) -> dict[str, float]:
        """For the log, under ``judge/``; latencies under ``time/``, as no two runs agree on them."""
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
    """Tokens of one request, or of many."""

    prompt: int
    completion: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.prompt + self.completion


def most_tokens(body: dict[str, Any], num_pixels: int) -> Tokens:
    """More than these a request does not take: the rule by which budgets are kept before, and where no server tells.

    One token for each byte of text (no tokenizer of bytes makes more), one for each 14 x 14 pixels and 1,024 for an image,
    1,024 for what a chat template adds, and the longest reply that is allowed.
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
    """What a request under way may cost."""

    server: ServerConfig
    most: Tokens
    is_sent: bool = False
    """Whether a server may have worked on it."""
    is_booked: bool = False

    @property
    def cost(self) -> float:
        """Most that it may cost."""
        return _cost(self.server, self.most)


class Ledger:
    """Adds up a run's usage, keeps it in the run folder over restarts, and says when the budget is spent.

    A request is started only while what is spent, and the most that it and all those under way may take, stays within the
    budget; else it waits for those under way. Where not even one fits, requests go one at a time, as long as one as dear as
    the dearest so far still fits: so the budget is exceeded by one request at most. What a server does not tell, or tells
    against all reason, is booked as the most that it can be, and so is a request that brought no reply.

    The account is written once a second and at the end; after kill -9 it holds what was under way as if it were spent.

    Raises:
        ValueError: the account is damaged; or there is a budget that cannot be kept, for a server has no prices.
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
        """How often a request took what was thought the most that it can take: some bill an image as 30 times its patches."""
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
        """Permission to start a request, to be given back by ``release``.

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
        """Raise where not even a request of the usual size is left, with no other under way."""
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
        """Book what a request took.

        Args:
            usage: of this stretch of time.
            reservation: of the request.
            told: the ``usage`` of its reply, whatever that is.
            num_bytes: length of the reply, if it was read: no more tokens were written, as far as can be seen.
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
        """A request ended; one that was sent and brought no reply is booked at its most."""
        if reservation.is_sent and not reservation.is_booked:
            self.book(usage, reservation)
        self._under_way.discard(reservation)
        if self._released is not None:
            self._released.set()
            self._released = None
        if self._clock() - self._saved_at >= _SAVE_EVERY_S:
            try:
                self.save()
            except OSError as error:  # said aloud where the run writes it next
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
    """What a reply says it took, where that can be, and how many tokens of it are estimates instead.

    Args:
        told: OpenAI's ``prompt_tokens``, ``completion_tokens`` and ``total_tokens``, or ``input_tokens`` and ``output_tokens``;
            whole numbers, also as 20.0 or "20".
        estimate: taken where nothing is told.
        most: far more than this, or next to nothing, is not believed.
    """
    told = told if isinstance(told, dict) else {}
    prompt = _told(told, ("prompt_tokens", "input_tokens"), most.prompt, estimate.prompt)
    completion = _told(told, ("completion_tokens", "output_tokens"), most.completion, estimate.completion)
    total = _told(told, ("total_tokens",), most.total, estimate.prompt)
    if total is not None and prompt is None and completion is None:
        completion = min(total, estimate.completion)  # the dearer part of it, mostly
        prompt = total - completion
    elif total is not None and prompt is None and completion is not None:
        prompt = max(total - completion, 0)
    elif total is not None and prompt is not None and total > prompt:
        completion = max(completion or 0, total - prompt)  # thoughts, which some do not count among the reply's
    num_estimated = (estimate.prompt if prompt is None else 0) + (estimate.completion if completion is None else 0)
    took = Tokens(
        estimate.prompt if prompt is None else prompt, estimate.completion if completion is None else completion
    )
    return took, num_estimated


def _told(told: dict[str, Any], names: tuple[str, ...], most: int, estimate: int) -> int | None:
    """A number of tokens that is told and can be: at least a 512th of the estimate and not 0, at most 64 times the most."""
    value = next((told[name] for name in names if told.get(name) is not None), None)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if max(1, estimate // _FAR_LESS) <= value <= _FAR_MORE * max(most, 1) else None
