"""A user's own rewards: Python functions, each of which adds one column to the three built-in rewards.

A function takes the sample and either one ``caption`` (and returns a number) or all ``captions`` of a group (and
returns one number per caption); the name of the second parameter says which. The function may be ``async``: then its
calls for single captions run concurrently. NaN means no score. If a function raises (``sys.exit`` included), returns
something else, or takes longer than its ``timeout_s``, the scores of that call are missing; missing scores are counted,
and each distinct error is logged once. A thread cannot be ended from outside: until a call that timed out has returned,
the function is not called again, and the scores of the skipped calls are missing too.

    def mentions_colour(sample, caption):
        return float("red" in caption)

    async def longest_first(sample, captions):
        return [len(caption) / max(map(len, captions)) for caption in captions]
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from balcaprl.config import CustomReward
from balcaprl.rewards.endpoint.server.redaction import redact
from balcaprl.rewards.foreign import ForeignFunction, Outcome
from balcaprl.types import Sample

logger = logging.getLogger(__name__)

ENTRY_POINTS = "balcaprl.rewards"
MODEL_SOURCES = ("questions", "rubric")
"""Sources whose scores come from the endpoint judge and not from a Python function."""


class CustomRewards:
    """The custom rewards of a run that are Python functions.

    Creating this object runs the functions' files, so create it before anything heavy is loaded.

    Raises:
        ValueError: a source cannot be found or loaded, or its function takes other parameters.
    """

    def __init__(self, configs: Sequence[CustomReward]) -> None:
        self._configs = {c.name: c for c in configs if c.source not in MODEL_SOURCES}
        self._functions = {name: _foreign_function(c.source) for name, c in self._configs.items()}
        for name, function in self._functions.items():
            function.check_signature(name)
        self._failures: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        """The last failure reason of each reward that failed."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the reward columns that these functions fill."""
        return tuple(self._functions)

    def score(self, sample: Sample, captions: Sequence[str]) -> list[dict[str, float]]:
        """Return each caption's scores by reward name for one group.

        This method never fails, and waits at most ``timeout_s`` for each call.
        """
        asked = {n: f.start(sample, captions, self._configs[n].timeout_s) for n, f in self._functions.items()}
        columns = {name: self._checked(name, finish(), sample, captions) for name, finish in asked.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(captions))]

    def take_metrics(self) -> dict[str, float]:
        """Return for each reward how many scores were missing since the last call of this method."""
        failures, self._failures = self._failures, Counter()
        return {f"custom/missing_{name}": float(failures[name]) for name in self._functions}

    def _checked(self, name: str, outcomes: Sequence[Outcome], sample: Sample, captions: Sequence[str]) -> list[float]:
        """Return the scores, with NaN in place of errors; counts every NaN and logs the errors."""
        scores = [math.nan if isinstance(outcome, BaseException) else outcome for outcome in outcomes]
        self._failures[name] += sum(map(math.isnan, scores))
        for error in outcomes:
            if isinstance(error, BaseException):
                self.reasons[name] = redact(_told(error), [*captions, sample.reference])
                _log_once(name, self.reasons[name])
        return scores


@lru_cache(maxsize=1024)
def _log_once(name: str, error: str) -> None:
    logger.warning("the reward %s gave no score: %s (further cases are only counted)", name, error)


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # the error's __str__ is foreign code too
        return type(error).__name__


def load_reward(source: str) -> Callable[..., Any]:
    """Return the function that ``reward.custom`` names: ``module:function``, ``file.py:function`` or an entry point.

    Raises:
        ValueError: there is no such function, or it cannot be loaded.
    """
    where, _, attribute = source.rpartition(":")
    if not where:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=source):
            with _told_as_value_error(source):
                return _callable(entry.load(), source)
        known = sorted(entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))
        raise ValueError(
            f"reward.custom: {source!r} is neither module:function, file.py:function, {' nor '.join(MODEL_SOURCES)}, nor an "
            f"entry point of {ENTRY_POINTS} (there are {', '.join(known) or 'none'})"
        )
    with _told_as_value_error(source):
        module = _load_file(Path(where).resolve()) if where.endswith(".py") else importlib.import_module(where)
        return _callable(getattr(module, attribute), source)


@contextmanager
def _told_as_value_error(source: str) -> Iterator[None]:
    """Turn any error that foreign code raises while it is loaded into ``ValueError``; let interrupts pass."""
    try:
        yield
    except _NotAFunctionError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.custom: {source!r} cannot be loaded: {_told(error)}") from error


class _NotAFunctionError(ValueError):
    """The object that a source names exists but is not a function."""


@lru_cache(maxsize=256)  # a file runs only once, however often its functions are loaded
def _load_file(path: Path) -> Any:
    name = f"balcaprl_custom_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _callable(function: Any, source: str) -> Callable[..., Any]:
    if not callable(function):
        raise _NotAFunctionError(f"reward.custom: {source!r} is {type(function).__name__}, expected a function")
    return function


@lru_cache(maxsize=256)  # all users of a function share one object, so that all of them know when the function hangs
def _foreign_function(source: str) -> ForeignFunction:
    return ForeignFunction(load_reward(source))
