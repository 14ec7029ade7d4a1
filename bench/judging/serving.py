"""A scripted judge on loopback, in its own process."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))

from scripted_judge import FAULTS, ScriptedServer

__all__ = ["FAULTS", "serving"]


@contextmanager
def serving(**settings: Any) -> Iterator[str]:
    """Starts a scripted server in its own process, yields its address, and stops it at the end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, settings), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("stop")
        process.join(10)
        if process.is_alive():
            process.kill()


def serve(connection: Any, settings: dict[str, Any]) -> None:
    """Runs the server in its process until told to stop."""
    with ScriptedServer(**settings) as server:
        connection.send(server.url)
        connection.recv()
