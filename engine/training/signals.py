"""Turns the first SIGINT or SIGTERM into a request to stop; the second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The handler with which each of the two signals ends a process."""


@contextmanager
def first_signal(call: Callable[[int], None]) -> Iterator[None]:
    """Within the context, call a function with the number of the first SIGINT or SIGTERM.

    The second signal then has the effect that it had before the context. If that was none (a shell starts background
    jobs with SIGINT ignored), it ends the process, because the first signal had an effect too.

    Only the main thread can handle signals; in another thread, the context has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        for each, handler in previous.items():
            signal.signal(each, _ENDS[each] if handler is signal.SIG_IGN else handler)
        call(number)

    for each in previous:
        signal.signal(each, handle)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
