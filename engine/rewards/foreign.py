"""Calls a user's reward function in a separate thread and within a time limit, and accepts any result and any error.

All code of the function runs in that thread: its body, what it awaits, and the conversion of what it returns
(``__len__``, ``__float__``, ...), so that none of this code can hold up or end the run. The main thread stays free for
signals. One case is beyond reach: code that keeps the interpreter's lock (a runaway regular expression) stops the whole
process, and only ``kill`` ends it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from balcaprl.rewards.background import DaemonThread
from balcaprl.types import Sample

Outcome = float | BaseException
"""A score, which may be NaN, or the error because of which there is no score."""
_LARGEST = 1e30


class CallTimeoutError(RuntimeError):
    """A call did not return in time, or was not made because an earlier call has not returned yet."""


class ForeignFunction:
    """A reward function: ``(sample, caption)`` gives a number, ``(sample, captions)`` gives one number per caption."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  # an object with an asynchronous __call__
        )
        self._takes_all = False
        self._thread = DaemonThread("custom-reward")
        self._out: concurrent.futures.Future[list[Outcome]] | None = None
        """The call that timed out and may still be running."""

    def check_signature(self, name: str) -> None:
        """Find out whether the function takes one caption or all captions of a group.

        Raises:
            ValueError: the parameters are neither ``(sample, caption)`` nor ``(sample, captions)``.
        """
        try:
            parameters = list(inspect.signature(self._function).parameters)
        except (TypeError, ValueError):  # some builtins have no signature
            parameters = ["?"]
        if len(parameters) < 2 or parameters[1] not in ("caption", "captions"):
            raise ValueError(
                f"reward.custom: the function of {name} takes ({', '.join(parameters)}); expected (sample, caption), which "
                "returns a number, or (sample, captions), which returns a list"
            )
        self._takes_all = parameters[1] == "captions"

    def start(self, sample: Sample, captions: Sequence[str], limit_s: float) -> Callable[[], list[Outcome]]:
        """Ask for the scores of all captions; only an asynchronous function starts before they are waited for.

        Returns:
            a function that waits for the outcomes and returns one per caption.
        """
        captions = list(captions)
        if self._takes_all:
            return self._begin(
                lambda: _ask_all(self._function, sample, captions), len(captions), limit_s, self._is_async
            )
        if self._is_async:
            together = _ask_together(self._function, sample, captions)
            return self._begin(lambda: asyncio.run(together()), len(captions), limit_s, True)

        def one_by_one() -> list[Outcome]:
            outcomes: list[Outcome] = []
            for caption in captions:
                ask = self._begin(lambda caption=caption: [_ask_one(self._function, sample, caption)], 1, limit_s, True)  # type: ignore[misc]
                outcomes += ask()
            return outcomes

        return one_by_one

    def _begin(
        self, call: Callable[[], list[Outcome]], count: int, limit_s: float, at_once: bool
    ) -> Callable[[], list[Outcome]]:
        if not at_once:
            return lambda: self._begin(call, count, limit_s, True)()
        if self._out is not None and not self._out.done():
            error = CallTimeoutError("not asked, as an earlier call has not come back yet")
            return lambda: [error] * count
        self._out = None
        future, deadline = self._thread.submit(call), time.monotonic() + limit_s

        def wait() -> list[Outcome]:
            try:
                return future.result(max(0.0, deadline - time.monotonic()))
            except concurrent.futures.TimeoutError:
                self._out = future
                return [CallTimeoutError(f"no answer within {limit_s:g} s (timeout_s of the reward)")] * count

        return wait


# ---------------------------- what runs in the function's thread (``_ask_together`` itself only builds what runs there)


def _ask_all(function: Callable[..., Any], sample: Sample, captions: list[str]) -> list[Outcome]:
    try:
        scores = _listed(_awaited(function(sample, list(captions))), len(captions))
    except BaseException as error:  # foreign code: none of its errors may end a run
        return [error] * len(captions)
    return [_score_of(score) for score in scores]


def _ask_one(function: Callable[..., Any], sample: Sample, caption: str) -> Outcome:
    try:
        return _number(_awaited(function(sample, caption)))
    except BaseException as error:  # as above
        return error


def _ask_together(function: Callable[..., Any], sample: Sample, captions: list[str]) -> Callable[[], Any]:
    async def one(caption: str) -> Outcome:
        try:
            return _number(await function(sample, caption))
        except BaseException as error:  # as above
            return error

    async def all_together() -> list[Outcome]:
        return list(await asyncio.gather(*map(one, captions)))

    return all_together


def _awaited(value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _listed(scores: Any, count: int) -> list[Any]:
    """Return the function's scores for all captions as a list.

    Raises:
        ValueError: the scores are not an ordered collection, or their number is wrong.
    """
    if isinstance(scores, str | bytes | Mapping | Set):
        raise ValueError(f"{type(scores).__name__} is no list of scores")
    try:
        length = len(scores)
    except TypeError:
        raise ValueError(f"{type(scores).__name__} is no list of scores") from None
    if length != count:
        raise ValueError(f"{length} scores for {count} captions")
    return list(scores)


def _score_of(score: Any) -> Outcome:
    try:
        return _number(score)
    except BaseException as error:  # foreign code runs in __float__
        return error


def _number(score: Any) -> float:
    """Return a score as a finite float or NaN; one-element arrays and tensors and booleans count as numbers.

    Raises:
        ValueError: the score is not a number, is infinite, or is beyond 1e30.
    """
    item = getattr(score, "item", None)
    plain = item() if callable(item) and not isinstance(score, type) else score
    complex_only = isinstance(plain, numbers.Complex) and not isinstance(plain, numbers.Real)
    if complex_only or isinstance(plain, str | bytes | bytearray):
        raise ValueError(f"{type(plain).__name__} is no number")
    try:
        number = float(plain)
    except TypeError:
        raise ValueError(f"{type(plain).__name__} is no number") from None
    except OverflowError:
        number = math.inf
    if abs(number) > _LARGEST:  # false for NaN
        raise ValueError("the score is infinite or beyond 1e30")
    return number
