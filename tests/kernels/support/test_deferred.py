"""Checks whose flag arrives later, with a stand-in for the GPU's event; ``test_cuda.py`` has them on a GPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from balcaprl.kernels.support import deferred


class Flag(Tensor):
    """A flag that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


class Event:
    """The end of a copy, which comes when the test says so, or when it is waited for."""

    def __init__(self, flag: Tensor) -> None:
        self.flag, self.copy, self.waits = flag.as_subclass(Tensor), torch.full((), math.nan), 0

    def arrive(self) -> None:
        self.copy.copy_(self.flag)

    def query(self) -> bool:
        return not self.copy.isnan()

    def synchronize(self) -> None:
        self.waits += not self.query()
        self.arrive()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Event]]:
    made: list[Event] = []

    def copied(flag: Tensor) -> tuple[Tensor, Event]:
        made.append(Event(flag))
        return made[-1].copy, made[-1]

    monkeypatch.setattr(deferred, "_copied_to_host", copied)
    yield made
    deferred._pending.checks.clear()


def on_gpu(value: float) -> Tensor:
    return torch.tensor(value).as_subclass(Flag)


def named(name: str) -> Callable[[], NoReturn]:
    def explain() -> NoReturn:
        raise ValueError(f"{name}: invalid")

    return explain


@pytest.mark.parametrize("bad", [1.0, -1.0, math.nan, math.inf])
def test_on_a_cpu_an_error_comes_at_once(bad: float) -> None:
    deferred.check(torch.tensor(0.0), named("sound"))
    with pytest.raises(ValueError, match=r"^targets"):
        deferred.check(torch.tensor([bad]), named("targets"))
    deferred.raise_pending()


def test_the_next_check_raises_what_has_arrived_and_waits_for_nothing(events: list[Event]) -> None:
    deferred.check(on_gpu(0.0), named("sound"))
    deferred.check(on_gpu(1.0), named("targets"))
    deferred.check(on_gpu(0.0), named("sound"))
    events[0].arrive()
    deferred.check(on_gpu(0.0), named("sound"))
    events[1].arrive()
    with pytest.raises(ValueError, match=r"^targets"):
        deferred.check(on_gpu(0.0), named("sound"))
    assert sum(event.waits for event in events) == 0
    deferred.raise_pending()
    assert not deferred._pending.checks


def test_a_read_of_results_raises_the_first_error_once(events: list[Event]) -> None:
    for value, name in ((0.0, "sound"), (2.0, "advantages"), (1.0, "targets")):
        deferred.check(on_gpu(value), named(name))
    with pytest.raises(ValueError, match=r"^advantages"):
        deferred.raise_pending()
    deferred.raise_pending()
    assert [event.waits for event in events] == [1, 1, 0]


def test_sound_checks_are_forgotten(events: list[Event]) -> None:
    for _ in range(100):
        deferred.check(on_gpu(0.0), named("sound"))
        events[-1].arrive()
    assert len(deferred._pending.checks) == 1


def test_a_thread_raises_only_its_own_errors(events: list[Event]) -> None:
    other = threading.Thread(target=deferred.check, args=(on_gpu(1.0), named("targets")))
    other.start()
    other.join()
    deferred.raise_pending()
    assert len(events) == 1
