"""Checks of values on a GPU that do not wait for the GPU.

A host that reads a flag from a GPU waits for all work that is queued there. ``check`` therefore only starts to copy the
flag, and the error is raised once the copy has arrived: in the next ``check`` of the same thread, or in
``raise_pending``, which waits for it. An op whose check failed has by then returned NaN. On a CPU the flag is read at
once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

Explain = Callable[[], NoReturn]
"""Finds out which value is invalid, and raises ValueError; it may wait for the GPU."""


class _Check(NamedTuple):
    """A flag on its way to the host."""

    flag: Tensor
    """0-d, in pinned memory; valid once ``copied`` has happened."""
    copied: torch.cuda.Event
    explain: Explain


class _Pending(threading.local):
    """The checks of one thread whose flag nobody has read yet, oldest first."""

    def __init__(self) -> None:
        self.checks: deque[_Check] = deque()


_pending = _Pending()


def check(flag: Tensor, explain: Explain) -> None:
    """Raises by ``explain`` if the flag says so: at once on a CPU, later on a GPU.

    Args:
        flag: one element; anything but 0 means that a value is invalid, NaN too.
        explain: raises the error. What it refers to stays in memory until the flag is read.

    Raises:
        ValueError: this check failed, or on a GPU an earlier one of this thread.
    """
    if not flag.is_cuda:
        if flag:
            explain()
        return
    _raise(wait=False)
    _pending.checks.append(_Check(*_copied_to_host(flag), explain))


def _copied_to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Starts to copy a flag to the host; returns the copy, and the event after which it is there."""
    copy = torch.empty((), dtype=flag.dtype, pin_memory=True)
    with torch.cuda.device(flag.device):
        copy.copy_(flag.view(()), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    return copy, copied


def raise_pending() -> None:
    """Waits until all checks of this thread are done. Call it where results are read: it costs nothing more there.

    Raises:
        ValueError: a value that an op was given on a GPU is invalid; the message starts with the argument's name.
    """
    _raise(wait=True)


def _raise(*, wait: bool) -> None:
    """Raises for the first failed check, and forgets those that were read; without ``wait``, reads only what is there."""
    checks = _pending.checks
    while checks and (wait or checks[0].copied.query()):
        done = checks.popleft()
        done.copied.synchronize()
        if done.flag:
            checks.clear()  # what was computed after an invalid value says nothing more
            done.explain()
