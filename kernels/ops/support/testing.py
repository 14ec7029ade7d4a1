"""The rule by which every implementation is compared with its reference.

The error of an implementation may slightly exceed the error that low precision causes in the reference: its largest
error against the float64 reference may be at most 2x (forward) or 3x (gradients) the largest error of the reference run
in the working dtype, plus one rounding of the largest value. The rule cannot judge float64 results, because float64 is
its yardstick; compare those with ``torch.testing.assert_close``.

In a single small problem the error of the reference in the working dtype depends on chance. It is sometimes almost 0,
and then a correct implementation exceeds 3x that error. ``assert_as_accurate_over`` therefore judges several problems
together. It expresses each problem's largest error in roundings of the problem's largest value, so that all problems
count equally, and takes the quadratic mean over the problems. Cancellation can make a problem's largest value small, so
the unit is never less than the quadratic mean of the roundings of all problems. If the rule does not hold, as many
problems again are drawn, up to ``most``; the check fails only if the rule does not hold for all of them together.

Measured on 250 sets of 32 problems (small heads, whose errors are most uneven): a correct implementation never failed.
An implementation whose errors are 3x those of the reference (gradients: 4x) failed in a third (a quarter) of the sets
with one number per problem, in 91% (79%) of the sets with 9 numbers per problem, and in all sets with hundreds. Errors
of 20x, or sums accumulated in bfloat16, always failed. ``tests/kernels/support/test_testing.py`` tests this behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FACTORS = {"forward": 2.0, "gradient": 3.0}
Kind = Literal["forward", "gradient"]
_SMALLEST = 1e-45
"""The rounding that is assumed if all values are 0: the smallest float32 above 0."""


class Compared(NamedTuple):
    """One quantity of one problem, computed in three ways; all three tensors have the same shape."""

    name: str
    actual: Tensor
    """Result of the implementation under test, in its working dtype."""
    working: Tensor
    """Result of the reference on the same inputs in the working dtype."""
    exact: Tensor
    """Result of the reference on the same inputs in float64."""
    kind: Kind = "forward"
    scale: float = 0.0
    """Size of the terms, for a sum that may be smaller than its terms; a rounding is taken of the largest value or of
    this size, whichever is larger."""


class _Errors(NamedTuple):
    """Largest errors of one problem's ``actual`` and ``working`` results, and one rounding of the largest value."""

    actual: float
    working: float
    rounding: float


def assert_as_accurate(
    actual: Tensor, working: Tensor, exact: Tensor, *, kind: Kind = "forward", name: str = ""
) -> None:
    """Applies the rule to one problem with many numbers; ``assert_as_accurate_over`` is for small problems.

    Args:
        actual: result of the implementation under test, in its working dtype.
        working: result of the reference in the working dtype.
        exact: result of the reference in float64.
        kind: whether the quantity is a forward result or a gradient.
        name: name of the quantity for the message.

    Raises:
        AssertionError: the shape is wrong, finite and non-finite values are in different places, or the error is too
            large.
    """
    compared = Compared(name or kind, actual, working, exact, kind)
    failure = _failure(compared.name, kind, [_errors(compared)])
    if failure:
        raise AssertionError(failure)


def assert_as_accurate_over(
    problem: Callable[[int], Iterable[Compared]], *, num_problems: int = 4, most: int = 128
) -> None:
    """Applies the rule to several problems together.

    Args:
        problem: function from a seed (0, 1, ...) to the compared quantities, whose names are the same for every seed.
        num_problems: number of problems to draw at first.
        most: largest number of problems to draw if the rule does not hold for fewer.

    Raises:
        AssertionError: the errors of ``most`` problems are too large, or one problem has a wrong shape or finite and
            non-finite values in different places; the last two are raised at once.
    """
    errors: dict[tuple[str, Kind], list[_Errors]] = {}
    drawn, wanted = 0, min(num_problems, most)
    while True:
        for seed in range(drawn, wanted):
            for compared in problem(seed):
                errors.setdefault((compared.name, compared.kind), []).append(_errors(compared))
        failures = [text for (name, kind), each in errors.items() if (text := _failure(name, kind, each))]
        if not failures:
            return
        if wanted >= most:
            raise AssertionError("; ".join(failures))
        drawn, wanted = wanted, min(2 * wanted, most)


def _errors(compared: Compared) -> _Errors:
    name, actual, working, exact, _, scale = compared
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if exact.dtype != torch.float64:
        raise AssertionError(f"{name}: the exact values must be float64, not {exact.dtype}")
    if not torch.equal(actual.isfinite(), exact.isfinite()):
        raise AssertionError(f"{name}: finite and non-finite values are not in the same places")
    if exact.numel() == 0:
        return _Errors(0.0, 0.0, _SMALLEST)
    largest = max(scale, float(exact.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    rounding = max(torch.finfo(actual.dtype).eps * largest, _SMALLEST)
    return _Errors(max_error(actual, exact), max_error(working, exact), rounding)


def _failure(name: str, kind: Kind, errors: list[_Errors]) -> str:
    """Describes how a quantity's errors break the rule; returns an empty string if the rule holds."""
    usual = _quadratic_mean(each.rounding for each in errors)
    actual = _quadratic_mean(each.actual / max(each.rounding, usual) for each in errors)
    working = _quadratic_mean(each.working / max(each.rounding, usual) for each in errors)
    allowed = FACTORS[kind] * working + 1.0
    if actual <= allowed:
        return ""
    return (
        f"{name}: error of {actual:.3g} roundings exceeds {allowed:.3g}, "
        f"{FACTORS[kind]:g}x that of the reference and one more ({len(errors)} problems)"
    )


def _quadratic_mean(values: Iterable[float]) -> float:
    """Square root of the mean of squares; 0 without any values."""
    squares = [value * value for value in values]
    return math.sqrt(math.fsum(squares) / max(len(squares), 1))


def max_error(values: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the finite entries of ``exact``; 0 if there are none."""
    difference = (values.double() - exact)[exact.isfinite()].abs()
    return float(difference.max()) if difference.numel() else 0.0
