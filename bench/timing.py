"""The one timing protocol.

All providers of an op get the same tensors. In every round each of them runs once, the order rotating, so that a change
of the machine's speed hits all alike. A sample is the mean of enough calls to last ``MIN_SAMPLE_SECONDS``; medians and
quartiles are over rounds. Peak memory is what the allocator saw above the inputs; only CUDA's can be asked, on a CPU it
is null.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from registry import Op, Sizes, check_provider, inputs_for
from torch import Tensor

Pass = Literal["forward", "backward", "both"]
MIN_SAMPLE_SECONDS = 2e-3
MAX_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """One provider on one shape and pass; times in milliseconds per call."""

    provider: str
    direction: Pass
    median_ms: float
    quartile_low_ms: float
    quartile_high_ms: float
    rounds: int
    calls_per_round: int
    peak_bytes: int | None


def passes_of(op: Op) -> tuple[Pass, ...]:
    """The passes that can be timed."""
    return ("forward", "backward", "both") if op.differentiable else ("forward",)


def measure(op: Op, sizes: Sizes, direction: Pass, device: torch.device, rounds: int = 21) -> list[Timing]:
    """Times every provider of ``op`` on one shape, after checking its result.

    Raises:
        AssertionError: a provider's result is wrong.
    """
    inputs = inputs_for(op, sizes, device)
    gradients = [inputs[name] for name in op.differentiable]
    calls: dict[str, Callable[[int], float]] = {}
    for name, function in op.providers.items():
        check_provider(op, name, sizes, device)
        calls[name] = _timer(partial(function, inputs, sizes), gradients, direction, device)
    repeats = {name: _calls_needed(call) for name, call in calls.items()}
    peaks = {name: _peak_bytes(call, device) for name, call in calls.items()}

    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(calls[name](repeats[name]) * 1e3)
    timings = []
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        timings.append(Timing(name, direction, median, low, high, rounds, repeats[name], peaks[name]))
    return timings


def copy_bandwidth(device: torch.device, megabytes: int = 64, rounds: int = 9) -> float:
    """Bytes per second of a large device copy, read and write counted: the measured ceiling of memory-bound ops."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        _synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def _timer(
    forward: Callable[[], Tensor], gradients: list[Tensor], direction: Pass, device: torch.device
) -> Callable[[int], float]:
    """A function that runs the pass n times and returns the mean seconds of one."""

    def run_all(count: int) -> float:
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            output = forward()
            if direction == "both":
                torch.autograd.grad(output.sum(), gradients)
        _synchronize(device)
        return (time.perf_counter() - begin) / count

    def run_backward(count: int) -> float:
        outputs = [forward().sum() for _ in range(count)]
        _synchronize(device)
        begin = time.perf_counter()
        for output in outputs:
            torch.autograd.grad(output, gradients)
        _synchronize(device)
        return (time.perf_counter() - begin) / count

    return run_backward if direction == "backward" else run_all


def _calls_needed(call: Callable[[int], float]) -> int:
    """Warms up, and says how many calls make one sample."""
    seconds = min(call(1) for _ in range(3))
    return max(1, min(MAX_CALLS, int(MIN_SAMPLE_SECONDS / max(seconds, 1e-9))))


def _peak_bytes(call: Callable[[int], float], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(1)
    return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
