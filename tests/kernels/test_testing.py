"""The comparison rule accepts what it should and nothing else."""

from __future__ import annotations

import pytest
import torch

from balcaprl.kernels.testing import assert_as_accurate

EXACT = torch.tensor([1.0, -2.0], dtype=torch.float64)
WORKING = (EXACT + 1e-3).float()


@pytest.mark.parametrize(("kind", "factor"), [("forward", 2.0), ("gradient", 3.0)])
def test_factor(kind, factor: float) -> None:
    assert_as_accurate((EXACT + 0.99e-3 * factor).float(), WORKING, EXACT, kind=kind)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate((EXACT + 1.01e-3 * factor).float(), WORKING, EXACT, kind=kind)


def test_an_exact_reference_leaves_room_for_one_rounding() -> None:
    working = EXACT.float()
    assert_as_accurate(torch.nextafter(working, torch.zeros(2)), working, EXACT)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(working * (1 + 1e-6), working, EXACT)


def test_shape_and_non_finite_values() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(WORKING[:1], WORKING, EXACT)
    with pytest.raises(AssertionError, match="finite"):
        assert_as_accurate(torch.tensor([1.0, torch.nan]), WORKING, EXACT)
    with pytest.raises(AssertionError, match="float64"):
        assert_as_accurate(WORKING, WORKING, WORKING)
