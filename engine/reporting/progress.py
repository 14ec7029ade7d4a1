"""A run's progress on the terminal: one line with the few metrics that show whether the run is healthy."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_ETA_WINDOW_S = 3600.0
"""Seconds of past steps from which the time left is estimated: one hour."""
_SHOWN = (
    ("reward/b_capscore", "b-cap", "{:.3f}"),
    ("reward/precision", "prec", "{:.3f}"),
    ("reward/recall", "rec", "{:.3f}"),
    ("reward/linguistic", "ling", "{:.3f}"),
    ("length_ratio", "len", "{:.2f}"),
    ("sampling_kl", "kl", "{:.1e}"),
    ("tokens_per_second", "tok/s", "{:.0f}"),
)


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line now and then, as fits a log file.

    Args:
        num_steps: number of steps of the whole run.
        start_step: number of steps that are already done when a run resumes.
        every_steps: number of steps after which the next plain line is due.
        every_seconds: number of seconds after which the next plain line is due, if that is sooner.
        console: rich console; by default standard error, so that standard output stays free for results.
    """

    def __init__(
        self,
        num_steps: int,
        start_step: int = 0,
        *,
        every_steps: int = 10,
        every_seconds: float = 10.0,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self._num_steps, self._start_step = num_steps, start_step
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._printed_at = time.monotonic()
        self._printed_step = start_step
        # Without a terminal, the bar is never started and only estimates the time left. The estimate leaves out the
        # first step, which loads and compiles.
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=12))
        self._progress = Progress(
            *columns,
            console=self.console,
            transient=False,
            speed_estimate_period=_ETA_WINDOW_S,
            get_time=lambda: time.monotonic(),
        )
        self._task = self._progress.add_task(f"step {start_step}/{num_steps}", total=num_steps, completed=start_step)

    def __enter__(self) -> ProgressLine:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the state after ``step`` steps, without metrics that are missing."""
        self._progress.update(self._task, completed=step)
        task = self._progress.tasks[0]
        line = f"step {step}/{self._num_steps}{format_metrics(metrics)}  eta {TimeRemainingColumn().render(task)}"
        if self.console.is_terminal:
            self._progress.update(self._task, description=line)
            return
        now = time.monotonic()
        due = step - self._printed_step >= self._every_steps or now - self._printed_at >= self._every_seconds
        first = self._printed_step == self._start_step
        if due or first or step >= self._num_steps:
            self.message(line)
            self._printed_step, self._printed_at = step, now

    def message(self, text: str) -> None:
        """Print a line of its own, above the live line where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Keep the last line on the screen and release the terminal; closing twice is harmless."""
        if self.console.is_terminal:
            self._progress.stop()


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The few metrics that show whether a run is healthy, such as ``  b-cap 0.512  prec 0.481``."""
    parts = []
    for key, label, pattern in _SHOWN:
        value = metrics.get(key)
        if value is not None:
            parts.append(f"  {label} {pattern.format(float(value)) if math.isfinite(value) else '-'}")
    return "".join(parts)
