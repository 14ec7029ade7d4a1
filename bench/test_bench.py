"""The small cases under pytest-benchmark: ``pytest bench/ --benchmark-only``. All cases: ``python bench/run.py``.

Both use ``ops.timing.measure``. Here the first test of a case measures all its providers, interleaved. Each provider's test
then replays its own samples into pytest-benchmark through a clock that shows the measured times.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Makes the folders beside this file importable: they are not part of the package.
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ops.registry import OPS, applicable
from ops.timing import Measurement, Pass, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 1.0
CASES = [
    pytest.param(op, case, provider, id=f"{op.name}-{case.name.replace(' ', '-')}-{provider}")
    for op in OPS.values()
    for case in op.cases
    if case.small and DEVICE.type in case.devices
    for provider in applicable(op, case)
]


class ReplayClock:
    """A clock that returns, call by call, the begin and the end of each of the loaded samples."""

    def __init__(self) -> None:
        self.samples: Iterator[float] = iter(())
        self.now = 0.0
        self.running = False

    def load(self, samples: list[float]) -> None:
        self.samples, self.running = iter(samples), False

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.samples, 0.0)
        self.running = not self.running
        return self.now


CLOCK = ReplayClock()


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], Measurement]:
    """The measurements so far, by op and case."""
    return {}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("op", "case", "provider"), CASES)
def test_op(benchmark, measured, op, case, provider) -> None:
    reason = op.providers[provider].unavailable(DEVICE)
    if reason is not None:
        pytest.skip(f"{provider} {reason}")
    key = (op.name, case.name)
    if key not in measured:
        measured[key] = measure(op, case, DEVICE, SECONDS)
    result = measured[key]
    if provider in result.skipped:
        pytest.fail(f"{provider}: {result.skipped[provider]}")
    direction: Pass = "both" if op.differentiable else "forward"
    samples = result.samples[provider, direction]
    (timing,) = (t for t in result.timings if (t.provider, t.direction) == (provider, direction))
    benchmark.group = f"{op.name} {case.name}, {'forward and backward' if op.differentiable else 'forward'}"
    benchmark.extra_info.update(peak_bytes=timing.peak_bytes, output_error=timing.output_error)
    CLOCK.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
