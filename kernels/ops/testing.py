"""The one rule by which an implementation is compared with its reference.

An implementation may err by as much as low precision makes the plain version err, and a little more: its largest error
against the float64 reference is at most 2x (forward) or 3x (gradients) the largest error of the reference run in the
working dtype, plus one rounding of the largest value, since the plain version is sometimes exact by luck. The
rule says nothing about float64 itself, which is the yardstick: compare that with ``torch.testing.assert_close``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FACTORS = {"forward": 2.0, "gradient": 3.0}


def assert_as_accurate(
    actual: Tensor, working: Tensor, exact: Tensor, *, kind: Literal["forward", "gradient"] = "forward", name: str = ""
) -> None:
    """Holds ``actual`` to the rule.

    Args:
        actual: what the implementation under test gave, in its working dtype.
        working: what the reference gave on the same inputs in that dtype.
        exact: what the reference gave on the same inputs in float64.
        kind: ``forward`` or ``gradient``.
        name: of the quantity, for the message.

    Raises:
        AssertionError: wrong shape, a non-finite value where the exact one is finite, or too large an error.
    """
    label = name or kind
    if actual.shape != exact.shape:
        raise AssertionError(f"{label}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if exact.dtype != torch.float64:
        raise AssertionError(f"{label}: the exact values must be float64, not {exact.dtype}")
    if not torch.equal(actual.isfinite(), exact.isfinite()):
        raise AssertionError(f"{label}: finite and non-finite values are not in the same places")
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps * float(exact.nan_to_num(0.0, 0.0, 0.0).abs().max())
    allowed = FACTORS[kind] * max_error(working, exact) + rounding
    error = max_error(actual, exact)
    if error > allowed:
        raise AssertionError(
            f"{label}: error {error:.3e} exceeds {allowed:.3e}, {FACTORS[kind]:g}x that of the reference"
        )


def max_error(values: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the finite entries of ``exact``; 0 without any."""
    difference = (values.double() - exact)[exact.isfinite()].abs()
    return float(difference.max()) if difference.numel() else 0.0
