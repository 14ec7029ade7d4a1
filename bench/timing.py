"""The one timing protocol, for ``run.py`` and for ``pytest bench/``.

1. Every provider is checked first: outputs and gradients against the reference, in float64 where that is affordable.
   Ours being wrong stops the run; a peer that is wrong, missing, or fails is left out, with the reason in the results.
2. All providers get the same tensors. In every round each of them runs once, the order rotating, so that a change of the
   machine's speed hits all alike. Where slow ones leave time for few rounds, the others have some more, without
   them. A sample is the mean of enough calls to last ``MIN_SAMPLE_SECONDS``.
3. ``forward`` runs without gradients being asked for. ``both`` runs forward and gradients. ``backward`` is, round by round,
   what ``both`` takes beyond ``forward``: fair to ops that make their gradients in the forward. Medians and quartiles
   are over rounds.
4. Peak memory is what one call takes beyond what was there before and beyond the tensors that it returns (outputs and
   gradients). On a GPU it is the allocator's peak. On a CPU it is the peak of the process's resident memory, which sees
   native code too: the heap is trimmed, the kernel's high-water mark is reset through ``/proc/self/clear_refs``, and read
   as ``VmHWM`` after the call; it is null where the system has neither. Scratch that a peer's library keeps from an
   earlier call is not counted; ours is given back before, and is.
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from inputs import Case, Inputs
from registry import Op, Provider, applicable, measure_inputs
from torch import Tensor

from balcaprl.kernels import native_head

Pass = Literal["forward", "backward", "both"]
Call = Callable[[], tuple[Tensor, ...]]
MIN_SAMPLE_SECONDS = 5e-3
MAX_CALLS = 200
MIN_ROUNDS, MAX_ROUNDS = 3, 31
ENOUGH_ROUNDS, SLOW_FACTOR = 15, 2
"""Providers that take at most one part in ``SLOW_FACTOR`` of the slowest's time get ``ENOUGH_ROUNDS`` at least."""
EXACT_FLOPS = 5e10
"""Work above which the yardstick is computed in float32 for half-precision inputs."""


@dataclass(frozen=True)
class Timing:
    """One provider on one case and pass; times in milliseconds per call."""

    provider: str
    direction: Pass
    median_ms: float
    quartile_low_ms: float
    quartile_high_ms: float
    rounds: int
    calls_per_round: int
    peak_bytes: int | None
    output_error: float | None
    """Largest error relative to the largest exact value; None where nothing is compared."""
    gradient_error: float | None
    """2-norm of the error relative to the exact gradient's, the worst of the gradients."""


@dataclass
class Measurement:
    """What ``measure`` found: timings, the samples that they come from, and who was left out."""

    timings: list[Timing] = field(default_factory=list)
    samples: dict[tuple[str, Pass], list[float]] = field(default_factory=dict)
    """Seconds per call, a value per round."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Provider to reason."""
    bfloat16_error: float | None = None
    """Of a filtered case: the gradient error of the reference in bfloat16 on the same inputs, which bounds the filter's."""


class WrongResult(AssertionError):
    """A provider's result is not the reference's; it is not timed."""


@dataclass
class _Entry:
    """One provider, ready to be called."""

    provider: Provider
    calls: dict[Pass, Call]
    errors: tuple[float | None, float | None]
    repeats: dict[Pass, int] = field(default_factory=dict)
    peaks: dict[Pass, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Yardstick:
    """What providers are held to."""

    results: tuple[Tensor, ...]
    """Exact output and gradients."""
    allowed_output: float
    allowed_gradient: float


def passes_of(op: Op) -> tuple[Pass, ...]:
    """The passes that are reported."""
    return ("forward", "backward", "both") if op.differentiable else ("forward",)


def measure(op: Op, case: Case, device: torch.device, seconds: float = 30.0) -> Measurement:
    """Checks and times every provider of ``op`` on one case.

    Args:
        op: from the registry.
        case: one of the op's.
        device: where it runs.
        seconds: about what the timed rounds may take; there are ``MIN_ROUNDS`` at least.

    Raises:
        WrongResult: an implementation of ours is wrong.
    """
    made = measure_inputs(op, case, device)
    result = Measurement()
    entries = _entries(op, case, made, device, result)
    if case.memory_only:
        return _measure_memory(op, entries, device, result)
    measured: tuple[Pass, ...] = ("forward", "both") if op.differentiable else ("forward",)
    for entry in entries.values():
        for direction in measured:
            entry.repeats[direction] = _calls_needed(entry.calls[direction], device)
            entry.peaks[direction] = _peak_bytes(entry.calls[direction], device)
    _run_rounds(entries, measured, device, seconds, result)
    for name, entry in entries.items():
        result.timings += [_timing(name, entry, direction, result) for direction in passes_of(op)]
    return result


def _entries(op: Op, case: Case, made: Inputs, device: torch.device, result: Measurement) -> dict[str, _Entry]:
    """The providers that can run and are right; the others go to ``result.skipped``."""
    entries: dict[str, _Entry] = {}
    exact = None if case.memory_only else _reference(op, case, made, _exact_dtype(op, case))
    if exact is not None and case.filter_eps is not None:
        result.bfloat16_error = _gradient_error(_reference(op, case, made, torch.bfloat16), exact)
    yardstick = None
    if exact is not None:
        yardstick = _Yardstick(exact, *_allowed_errors(op, case, made, exact, result.bfloat16_error))
    for name, provider in applicable(op, case).items():
        reason = provider.unavailable(device)
        if reason is None:
            calls = _calls(op, provider, made, case)
            try:
                errors = (None, None) if yardstick is None else _check(op, case, provider, calls, yardstick)
            except Exception as error:
                if provider.ours:
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if reason is not None:
            result.skipped[name] = reason
        else:
            entries[name] = _Entry(provider, calls, errors)
    return entries


def _calls(op: Op, provider: Provider, made: Inputs, case: Case) -> dict[Pass, Call]:
    """The passes as functions without arguments; each returns all that it made."""
    gradients_of = [made[name] for name in op.differentiable]
    detached = {name: tensor.detach() for name, tensor in made.items()}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (provider.run(detached, case),)

    def both() -> tuple[Tensor, ...]:
        if provider.gradients is not None:
            return provider.gradients(detached if provider.ceiling else made, case)
        output = provider.run(made, case)
        return output.detach(), *torch.autograd.grad(output, gradients_of, made.get("upstream"))

    return {"forward": forward, "both": both} if op.differentiable else {"forward": forward}


def _exact_dtype(op: Op, case: Case) -> torch.dtype:
    """Float64, or float32 for half-precision inputs of a large case."""
    large = op.floor_flops(case)[1] > EXACT_FLOPS
    return torch.float32 if large and case.dtype != torch.float32 else torch.float64


def _reference(op: Op, case: Case, made: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output and gradients of the reference in some dtype."""
    cast = {n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in made.items()}
    gradients_of = [cast[name].requires_grad_() for name in op.differentiable]
    output = op.exact(cast, case)
    if not gradients_of:
        return (output,)
    upstream = cast["upstream"].to(output.dtype) if "upstream" in cast else None
    return output.detach(), *torch.autograd.grad(output, gradients_of, upstream)


def _allowed_errors(
    op: Op, case: Case, made: Inputs, exact: tuple[Tensor, ...], bfloat16_error: float | None
) -> tuple[float, float]:
    """Largest errors of output and gradients. In half precision the plain version's own error is doubled where it is
    more than the op's tolerance: a ratio that the rounding moves across the clip changes a token's whole gradient."""
    tolerance = op.tolerance[case.dtype]
    if bfloat16_error is not None:
        return tolerance, bfloat16_error
    if case.dtype == torch.float32 or not op.differentiable:
        return tolerance, tolerance
    plain = _calls(op, Provider(op.exact), made, case)["both"]()
    return tolerance, max(tolerance, 2 * (_gradient_error(plain, exact) or 0.0))


def _check(
    op: Op,
    case: Case,
    provider: Provider,
    calls: dict[Pass, Call],
    yardstick: _Yardstick,
) -> tuple[float | None, float | None]:
    """Errors of output and gradients; runs every call once, which also warms it up.

    Raises:
        WrongResult: an error exceeds the op's tolerance.
    """
    (forward_output,) = calls["forward"]()
    outputs = calls["both"]() if "both" in calls else (forward_output,)
    if provider.ceiling or provider.every_token:
        return None, None
    output_error = max(_largest_error(o, yardstick.results[0]) for o in (forward_output, outputs[0]))
    gradient_error = _gradient_error(outputs, yardstick.results)
    for kind, error, limit in (
        ("output", output_error, yardstick.allowed_output),
        ("gradient", gradient_error, yardstick.allowed_gradient),
    ):
        if error is not None and not error <= limit:
            raise WrongResult(f"{op.name}, {case.name}: {kind} error {error:.2e} exceeds {limit:.2e}")
    return output_error, gradient_error


def _largest_error(actual: Tensor, exact: Tensor) -> float:
    # A loss is a mean of terms of both signs and may be near 0 by chance: 0.1 is the least that it is measured by.
    largest = max(float(exact.abs().max()), 1e-30 if exact.dim() else 0.1)
    return float((actual.detach().to(exact.dtype) - exact).abs().max()) / largest


def _gradient_error(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float | None:
    """The worst relative error of the gradients, which follow the output; None without any."""
    return max((_norm_error(a, e) for a, e in zip(actual[1:], exact[1:], strict=True)), default=None)


def _norm_error(actual: Tensor, exact: Tensor) -> float:
    """In slices: a vocabulary's gradient in float64 is the largest tensor here."""
    actual, exact = actual.reshape(exact.shape).flatten(), exact.flatten()
    difference = total = 0.0
    for a, e in zip(actual.split(1 << 24), exact.split(1 << 24), strict=True):
        difference += float((a.to(e.dtype) - e).double().square().sum())
        total += float(e.double().square().sum())
    return (difference / max(total, 1e-60)) ** 0.5


def _measure_memory(op: Op, entries: dict[str, _Entry], device: torch.device, result: Measurement) -> Measurement:
    """Peak memory of one forward with gradients, unchecked: other cases hold the same code to the reference.

    A first call on the op's first case loads what a process loads once, 150 MiB of code and tables among it.
    """
    first = op.cases[0]
    made = measure_inputs(op, first, device)
    for name, entry in entries.items():
        _calls(op, entry.provider, made, first)["both"]()
        begin = time.perf_counter()
        entry.peaks["both"], entry.repeats["both"] = _peak_bytes(entry.calls["both"], device), 1
        result.samples[name, "both"] = [time.perf_counter() - begin] * 2
        result.timings.append(_timing(name, entry, "both", result))
    return result


def _run_rounds(
    entries: dict[str, _Entry], measured: tuple[Pass, ...], device: torch.device, seconds: float, result: Measurement
) -> None:
    """Interleaves the providers until the time is spent, within the bounds on rounds; then those that are not slow go on."""
    result.samples = {(name, direction): [] for name in entries for direction in measured}
    begin, done = time.perf_counter(), 0
    while entries and done < MAX_ROUNDS and (done < MIN_ROUNDS or time.perf_counter() - begin < seconds):
        _run_round(entries, list(entries), measured, device, done, result)
        done += 1
    # A few rounds are too few for a ratio of medians that are close.
    longest = {name: max(result.samples[name, direction][-1] for direction in measured) for name in entries}
    quick = [name for name, longest_s in longest.items() if SLOW_FACTOR * longest_s <= max(longest.values())]
    for further in range(done, ENOUGH_ROUNDS if quick else done):
        _run_round(entries, quick, measured, device, further, result)
    if "both" in measured:
        for name in entries:
            pairs = zip(result.samples[name, "both"], result.samples[name, "forward"], strict=True)
            result.samples[name, "backward"] = [both - forward for both, forward in pairs]


def _run_round(
    entries: dict[str, _Entry],
    names: list[str],
    measured: tuple[Pass, ...],
    device: torch.device,
    index: int,
    result: Measurement,
) -> None:
    """Each of ``names`` once, another one first in every round."""
    turn = index % len(names)
    for name in names[turn:] + names[:turn]:
        for direction in measured:
            sample = _sample(entries[name].calls[direction], entries[name].repeats[direction], device)
            result.samples[name, direction].append(sample)


def _timing(name: str, entry: _Entry, direction: Pass, result: Measurement) -> Timing:
    values = [1e3 * seconds for seconds in result.samples[name, direction]]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    repeats = entry.repeats["both" if direction == "backward" else direction]
    output_error, gradient_error = entry.errors
    peak = entry.peaks.get(direction)
    return Timing(name, direction, median, low, high, len(values), repeats, peak, output_error, gradient_error)


def _sample(call: Call, count: int, device: torch.device) -> float:
    """Mean seconds of ``count`` calls."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - begin) / count


def _calls_needed(call: Call, device: torch.device) -> int:
    """How many calls make one sample; two calls are made to find out, fewer where one is long."""
    seconds = _sample(call, 1, device)
    if seconds < 0.5:
        seconds = min(seconds, _sample(call, 1, device))
    return max(1, min(MAX_CALLS, round(MIN_SAMPLE_SECONDS / max(seconds, 1e-9))))


def copy_bandwidth(device: torch.device, megabytes: int = 64, rounds: int = 9) -> float:
    """Bytes per second of a large device copy, read and write counted: the measured ceiling of memory-bound ops."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = [_sample(lambda: (target.copy_(source),), 1, device) for _ in range(rounds)]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int = 768) -> float:
    """Operations per second of a square matrix product: what the cost of a case is guessed with."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [_sample(lambda: (a @ b,), 1, device) for _ in range(5)]
    return 2 * size**3 / statistics.median(seconds)


def _peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes that one call takes beyond what it returns."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = _bytes_of(call())
        return max(0, torch.cuda.max_memory_allocated(device) - before - returned)
    if not _reset_high_water_mark():
        return None
    before = _resident("VmRSS")
    returned = _bytes_of(call())
    return max(0, _resident("VmHWM") - before - returned)


def _bytes_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _reset_high_water_mark() -> bool:
    """Gives free memory back to the system, then makes the peak of resident memory what it is now. False: not here."""
    native_head.release_scratch()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _resident(field_name: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field_name}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
