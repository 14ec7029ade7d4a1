"""Turns the first SIGINT or SIGTERM into a request to stop, and leaves the second one its usual effect."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def first_signal(call: Callable[[int], None]) -> Iterator[None]:
    """Within the context, call a function with the number of the first SIGINT or SIGTERM; the second acts as before.

    Only the main thread can handle signals; in another thread, the context has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)
        call(number)

    for each in previous:
        signal.signal(each, handle)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
