"""A user's own rewards: Python functions, each a column beside the three.

A function takes the sample and either one ``caption`` (and returns a number) or all ``captions`` of a group (and returns as
many numbers); the second parameter's name says which. It may be ``async``: single captions then run together. NaN means no
score. A function that raises, or returns something else, leaves the scores out that it owed; that is counted and logged once.

    def mentions_colour(sample, caption):
        return float("red" in caption)

    async def longest_first(sample, captions):
        return [len(caption) / max(map(len, captions)) for caption in captions]
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from balcaprl.config import CustomReward
from balcaprl.rewards.judge import redact
from balcaprl.types import Sample

logger = logging.getLogger(__name__)

ENTRY_POINTS = "balcaprl.rewards"
MODEL_SOURCES = ("questions", "rubric")
"""Sources that the endpoint judge serves."""


class CustomRewards:
    """The custom rewards of a run that are Python functions.

    Raises:
        ValueError: a source names nothing that can be found, or a function of another signature.
    """

    def __init__(self, configs: Sequence[CustomReward]) -> None:
        self._functions = {c.name: load_reward(c.source) for c in configs if c.source not in MODEL_SOURCES}
        self._takes_all = {name: _takes_all(name, function) for name, function in self._functions.items()}
        self._failures: Counter[str] = Counter()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are filled in here."""
        return tuple(self._functions)

    def score(self, sample: Sample, captions: Sequence[str]) -> list[dict[str, float]]:
        """The columns of each caption of one group."""
        if not self._functions:
            return [{} for _ in captions]
        columns = asyncio.run(self._score_all(sample, list(captions)))
        return [{name: column[i] for name, column in columns.items()} for i in range(len(captions))]

    def take_metrics(self) -> dict[str, float]:
        """Scores that are missing since the last call, by reward."""
        failures, self._failures = self._failures, Counter()
        return {f"custom/missing_{name}": float(failures[name]) for name in self._functions}

    async def _score_all(self, sample: Sample, captions: list[str]) -> dict[str, list[float]]:
        columns = await asyncio.gather(*(self._score_one(name, sample, captions) for name in self._functions))
        return dict(zip(self._functions, columns, strict=True))

    async def _score_one(self, name: str, sample: Sample, captions: list[str]) -> list[float]:
        function = self._functions[name]
        if self._takes_all[name]:
            try:
                scores = await _awaited(function(sample, list(captions)))
                if len(scores) != len(captions):
                    raise ValueError(f"{len(scores)} scores for {len(captions)} captions")
            except Exception as error:  # foreign code; no error of it may end a run
                return [self._missing(name, error, sample, captions) for _ in captions]
            return [self._checked(name, score, sample, captions) for score in scores]
        return list(await asyncio.gather(*(self._score_caption(name, sample, caption) for caption in captions)))

    async def _score_caption(self, name: str, sample: Sample, caption: str) -> float:
        try:
            score = await _awaited(self._functions[name](sample, caption))
        except Exception as error:  # as above
            return self._missing(name, error, sample, [caption])
        return self._checked(name, score, sample, [caption])

    def _checked(self, name: str, score: Any, sample: Sample, captions: Sequence[str]) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError):
            return self._missing(name, ValueError(f"{type(score).__name__} is no number"), sample, captions)
        if math.isinf(number) or abs(number) > 1e30:
            return self._missing(name, ValueError("the score is infinite or beyond 1e30"), sample, captions)
        if math.isnan(number):
            self._failures[name] += 1
        return number

    def _missing(self, name: str, error: Exception, sample: Sample, captions: Sequence[str]) -> float:
        self._failures[name] += 1
        text = redact(f"{type(error).__name__}: {error}", [*captions, sample.reference])
        _log_once(name, text)
        return math.nan


@lru_cache(maxsize=1024)
def _log_once(name: str, error: str) -> None:
    logger.warning("the reward %s gave no score: %s (further cases are only counted)", name, error)


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def load_reward(source: str) -> Callable[..., Any]:
    """The function that ``reward.custom`` names: ``module:function``, ``file.py:function`` or an entry point.

    Raises:
        ValueError: there is no such function.
    """
    where, _, attribute = source.rpartition(":")
    if not where:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=source):
            return _callable(entry.load(), source)
        known = sorted(entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))
        raise ValueError(
            f"reward.custom: {source!r} is neither module:function, file.py:function, {' nor '.join(MODEL_SOURCES)}, nor an "
            f"entry point of {ENTRY_POINTS} (there are {', '.join(known) or 'none'})"
        )
    try:
        module = _load_file(Path(where).resolve()) if where.endswith(".py") else importlib.import_module(where)
        return _callable(getattr(module, attribute), source)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"reward.custom: {source!r} cannot be loaded: {error}") from error


@lru_cache(maxsize=256)  # a file is run once, however many of its functions are asked for, and how often
def _load_file(path: Path) -> Any:
    name = f"balcaprl_custom_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _callable(function: Any, source: str) -> Callable[..., Any]:
    if not callable(function):
        raise ValueError(f"reward.custom: {source!r} is {type(function).__name__}, expected a function")
    return function


def _takes_all(name: str, function: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(function).parameters)
    if len(parameters) < 2 or parameters[1] not in ("caption", "captions"):
        raise ValueError(
            f"reward.custom: the function of {name} takes ({', '.join(parameters)}); expected (sample, caption), which "
            "returns a number, or (sample, captions), which returns a list"
        )
    return parameters[1] == "captions"
