"""What a run's judge calls cost: requests, failures by kind, tokens, money; and the budget."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balcaprl.config import EndpointConfig, ServerConfig
from balcaprl.jsonl import number, read_json
from balcaprl.ownership import write_atomically
from balcaprl.types import JudgeStoppedError

LEDGER = "judge_usage.json"
_MAX_LEDGER_BYTES = 1 << 16
_TOTALS = ("num_replies", "prompt_tokens", "completion_tokens", "cost")


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
    num_cancelled: int = 0
    """Calls that were under way when they were no longer wanted."""
    failures: Counter[str] = field(default_factory=Counter)
    """Attempts that brought no valid reply, by kind."""
    num_replies: int = 0
    """Replies that tell their tokens, valid or not."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    """Of the latest valid attempts."""

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
            "judge/cancelled": self.num_cancelled,
            "judge/prompt_tokens": self.prompt_tokens,
            "judge/completion_tokens": self.completion_tokens,
            "judge/cost": self.cost,
            **{f"judge/failed_{kind}": count for kind, count in sorted(self.failures.items())},
        }
        if self.latencies_s:
            ordered = sorted(self.latencies_s)
            values["time/judge_p50"] = ordered[len(ordered) // 2]
            values["time/judge_p95"] = ordered[int(0.95 * (len(ordered) - 1))]
        return {name: float(value) for name, value in values.items()}


class Ledger:
    """Adds up a run's usage, keeps it in the run folder over restarts, and says when the budget is spent.

    A request may be started only while what is spent, and what it and those under way will cost if each is as dear as the
    dearest so far, stays within the budget.
    """

    def __init__(self, config: EndpointConfig, path: Path | None = None) -> None:
        self._config = config
        self._path = path
        self.totals: dict[str, float] = dict.fromkeys(_TOTALS, 0)
        self.in_flight = 0
        self._dearest = self._longest = 0.0
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            plain = read_json(path, _MAX_LEDGER_BYTES)
            totals = {name: plain[name] for name in _TOTALS}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged account of what the judge cost; mend or remove it") from error
        # What is no number, or less than nothing, would lift the budget.
        if not all(0.0 <= number(value) < math.inf for value in totals.values()):
            raise ValueError(f"{path}: damaged account of what the judge cost: {totals}; mend or remove it"[:500])
        self.totals = totals

    def check(self) -> None:
        """Raise where no further request may be started.

        Raises:
            BudgetSpentError: the budget of money or tokens is spent.
        """
        config, totals = self._config, self.totals
        tokens = totals["prompt_tokens"] + totals["completion_tokens"]
        num_replies = max(1.0, totals["num_replies"])
        reserved = self.in_flight + 1
        dearest = max(self._dearest, totals["cost"] / num_replies)
        longest = max(self._longest, tokens / num_replies)
        if config.budget is not None and totals["cost"] + reserved * dearest > config.budget:
            raise BudgetSpentError(
                f"the judge's budget is spent: {totals['cost']:.4g} of endpoint.budget {config.budget:g}; raise it to go on"
            )
        if config.token_budget is not None and tokens + reserved * longest > config.token_budget:
            raise BudgetSpentError(
                f"the judge's tokens are spent: {tokens:,} of endpoint.token_budget {config.token_budget:,}; "
                "raise it to go on"
            )

    def add(self, usage: Usage, server: ServerConfig, told: Any) -> None:
        """Book what a reply says it took; a reply that tells nothing sensible books nothing."""
        if not isinstance(told, dict):
            return
        prompt, completion = _count(told.get("prompt_tokens")), _count(told.get("completion_tokens"))
        cost = (prompt * server.input_price + completion * server.output_price) / 1e6
        self._dearest, self._longest = max(self._dearest, cost), max(self._longest, float(prompt + completion))
        usage.num_replies += 1
        usage.prompt_tokens += prompt
        usage.completion_tokens += completion
        usage.cost += cost
        for name, value in zip(_TOTALS, (1, prompt, completion, cost), strict=True):
            self.totals[name] += value

    def save(self) -> None:
        """Write the totals to the run folder, whole or not at all."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, (json.dumps(self.totals, indent=2) + "\n").encode())


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else 0
