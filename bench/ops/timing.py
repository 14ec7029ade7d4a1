"""The timing protocol of ``run.py`` and of ``pytest bench/``.

1. Every provider is checked first: its outputs and gradients are compared with the reference, in float64 where that is
   affordable. If ours is wrong, the run stops. A peer that is wrong, missing or fails is left out, and the results give
   the reason.
2. All providers get the same tensors. In every round each provider runs once, in rotating order, so that a change of
   the machine's speed affects all alike. If slow providers leave time for only a few rounds, the others get more rounds
   without them. A sample is the mean of as many calls as take ``MIN_SAMPLE_SECONDS``, at most ``MAX_CALLS``.
3. ``forward`` runs without gradients. ``both`` runs forward and gradients. ``backward`` is the time of ``both`` minus
   the time of ``forward`` in the same round, which is fair to ops that compute their gradients in the forward. Medians
   and quartiles are over rounds.
4. Peak memory is what one call takes beyond the memory in use before and beyond the tensors that it returns (outputs
   and gradients). On a GPU it is the allocator's peak. On a CPU it is the peak of the process's resident memory, which
   includes native code: the heap is trimmed, the operating system's high-water mark is reset through
   ``/proc/self/clear_refs`` and read as ``VmHWM`` after the call. It is null on systems without these. Scratch memory
   that a peer's library keeps from an earlier call is not counted. Our own scratch memory is released before the call,
   so it is counted.
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
from torch import Tensor

from balcaprl.kernels.head.native_logits_room import release_scratch
from ops.inputs import Case, Inputs
from ops.providers import Op, Provider
from ops.registry import applicable, measure_inputs

Pass = Literal["forward", "backward", "both"]
Call = Callable[[], tuple[Tensor, ...]]
MIN_SAMPLE_SECONDS = 5e-3
MAX_CALLS = 200
MIN_ROUNDS, MAX_ROUNDS = 3, 31
ENOUGH_ROUNDS, SLOW_FACTOR = 15, 2
"""Providers that take at most 1 / ``SLOW_FACTOR`` of the slowest one's time get at least ``ENOUGH_ROUNDS`` rounds."""
EXACT_FLOPS = 5e10
"""Operations above which the reference is computed in float32 instead of float64 for half-precision inputs."""


@dataclass(frozen=True)
class Timing:
    """The result of one provider on one case and pass; times are in milliseconds per call."""

    provider: str
    direction: Pass
    median_ms: float
    quartile_low_ms: float
    quartile_high_ms: float
    rounds: int
    calls_per_round: int
    peak_bytes: int | None
    output_error: float | None
    """Largest error relative to the largest exact value; None if the result is not compared."""
    gradient_error: float | None
    """2-norm of the error relative to that of the exact gradient, for the worst gradient; None if not compared."""


@dataclass
class Measurement:
    """The result of ``measure``: timings, the samples that they come from, and the providers that were left out."""

    timings: list[Timing] = field(default_factory=list)
    samples: dict[tuple[str, Pass], list[float]] = field(default_factory=dict)
    """Seconds per call, one value per round, by provider and pass."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason for each provider that was left out."""
    bfloat16_error: float | None = None
    """In a filtered case, the gradient error of the reference in bfloat16 on the same inputs, which bounds the filter's
    error; otherwise None."""


class WrongResult(AssertionError):
    """A provider's result differs from the reference, so the provider is not timed."""


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
    """The reference results, and the errors that providers may have."""

    results: tuple[Tensor, ...]
    """The exact output and gradients."""
    allowed_output: float
    allowed_gradient: float


def passes_of(op: Op) -> tuple[Pass, ...]:
    """The passes that are reported for an op."""
    return ("forward", "backward", "both") if op.differentiable else ("forward",)


def measure(op: Op, case: Case, device: torch.device, seconds: float = 30.0) -> Measurement:
    """Checks and times every provider of ``op`` on one case.

    Args:
        op: an op of the registry.
        case: one of the op's cases.
        device: the device to run on.
        seconds: approximate time limit of the timed rounds; there are always at least ``MIN_ROUNDS`` rounds.

    Raises:
        WrongResult: one of our implementations is wrong.
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
    """The providers that can run and give right results; the reasons of the others go to ``result.skipped``."""
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
    """The passes as functions without arguments; each returns all tensors that it computes."""
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
    """The dtype of the reference: float64, or float32 for half-precision inputs of a large case."""
    large = op.floor_flops(case)[1] > EXACT_FLOPS
    return torch.float32 if large and case.dtype != torch.float32 else torch.float64


def _reference(op: Op, case: Case, made: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Output and gradients of the reference, computed in ``dtype``."""
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
    """Largest allowed errors of output and gradients.

    In half precision, gradients may also have up to twice the error of the reference in the case's own dtype, because a
    ratio that rounding moves across a clip bound changes a token's whole gradient. If ``bfloat16_error`` is given, it
    is the bound of the gradients' error.
    """
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
    """The errors of output and gradients. Runs every call once, which also warms it up.

    Raises:
        WrongResult: an error exceeds the allowed error.
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
    # A loss is a mean of terms of both signs and may be near 0 by chance, so its error is relative to at least 0.1.
    largest = max(float(exact.abs().max()), 1e-30 if exact.dim() else 0.1)
    return float((actual.detach().to(exact.dtype) - exact).abs().max()) / largest


def _gradient_error(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float | None:
    """The worst relative error of the gradients, which are all results after the first; None if there are none."""
    return max((_norm_error(a, e) for a, e in zip(actual[1:], exact[1:], strict=True)), default=None)


def _norm_error(actual: Tensor, exact: Tensor) -> float:
    """The 2-norm of the error over that of ``exact``. It works in slices, because the gradient of the head's weight in
    float64 would be the largest tensor here."""
    actual, exact = actual.reshape(exact.shape).flatten(), exact.flatten()
    difference = total = 0.0
    for a, e in zip(actual.split(1 << 24), exact.split(1 << 24), strict=True):
        difference += float((a.to(e.dtype) - e).double().square().sum())
        total += float(e.double().square().sum())
    return (difference / max(total, 1e-60)) ** 0.5


def _measure_memory(op: Op, entries: dict[str, _Entry], device: torch.device, result: Measurement) -> Measurement:
    """Measures the peak memory of one forward with gradients. Its results are not checked, because other cases check
    the same code against the reference.

    Before the measured call, a call on the op's first case loads what a process loads only once, such as 150 MiB of
    code and tables.
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
    """Runs rounds of all providers until the time is spent, within the bounds on rounds; providers that are not slow
    then continue up to ``ENOUGH_ROUNDS``."""
    result.samples = {(name, direction): [] for name in entries for direction in measured}
    begin, done = time.perf_counter(), 0
    while entries and done < MAX_ROUNDS and (done < MIN_ROUNDS or time.perf_counter() - begin < seconds):
        _run_round(entries, list(entries), measured, device, done, result)
        done += 1
    # A few rounds are not enough to compare medians that are close.
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
    """Samples each of ``names`` once; each round starts with another provider."""
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
    """The mean seconds per call over ``count`` calls."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - begin) / count


def _calls_needed(call: Call, device: torch.device) -> int:
    """The number of calls per sample, estimated from two calls, or from one call if it is long."""
    seconds = _sample(call, 1, device)
    if seconds < 0.5:
        seconds = min(seconds, _sample(call, 1, device))
    return max(1, min(MAX_CALLS, round(MIN_SAMPLE_SECONDS / max(seconds, 1e-9))))


def copy_bandwidth(device: torch.device, megabytes: int = 64, rounds: int = 9) -> float:
    """Bytes per second, read and written, of a large copy on the device: the measured ceiling of memory-bound ops."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = [_sample(lambda: (target.copy_(source),), 1, device) for _ in range(rounds)]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int = 768) -> float:
    """Operations per second of a square matrix product, used to estimate the time of a case."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [_sample(lambda: (a @ b,), 1, device) for _ in range(5)]
    return 2 * size**3 / statistics.median(seconds)


def _peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak bytes that one call takes beyond the tensors that it returns; None if the system cannot tell."""
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
    """Returns free memory to the system, then resets the peak of resident memory to its present value. The result is
    False on systems that cannot do this."""
    release_scratch()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _resident(field_name: str) -> int:
    """The value in bytes of a field of ``/proc/self/status``."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field_name}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
