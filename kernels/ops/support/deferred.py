"""Checks of values on a GPU that do not wait for the GPU.

A host that reads a flag from a GPU waits for all work that is queued there. ``check`` therefore only starts to copy the
flag. The error is raised by the first later ``check`` of the same thread that finds the copy finished, or by
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
    """The checks of one thread whose flags have not been read yet, oldest first."""

    def __init__(self) -> None:
        self.checks: deque[_Check] = deque()


_pending = _Pending()


def check(flag: Tensor, explain: Explain) -> None:
    """Calls ``explain``, which raises, if the flag is not 0: at once on a CPU, later on a GPU.

    Args:
        flag: one element; anything but 0, NaN included, means that a value is invalid.
        explain: raises the error. What it refers to stays in memory until the flag is read.

    Raises:
        ValueError: on a CPU: this check failed; on a GPU: an earlier check of this thread failed.
    """
    if not flag.is_cuda:
        if flag:
            explain()
        return
    _raise(wait=False)
    _pending.checks.append(_Check(*_copied_to_host(flag), explain))


def _copied_to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Starts to copy a flag to the host; returns the copy, and the event after which it holds the flag."""
    copy = torch.empty((), dtype=flag.dtype, pin_memory=True)
    with torch.cuda.device(flag.device):
        copy.copy_(flag.view(()), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    return copy, copied


def raise_pending() -> None:
    """Waits until all checks of this thread are done. Call it where results are read: it costs nothing more there.

    Raises:
        ValueError: a value that was passed to an op on a GPU is invalid; the message starts with the argument's name.
    """
    _raise(wait=True)


def _raise(*, wait: bool) -> None:
    """Reads the pending flags in order and forgets each. At the first failed check, forgets all others too, and raises.

    Without ``wait``, stops at the first flag that has not arrived.
    """
    checks = _pending.checks
    while checks and (wait or checks[0].copied.query()):
        done = checks.popleft()
        done.copied.synchronize()
        if done.flag:
            checks.clear()  # what was computed after an invalid value says nothing more
            done.explain()
