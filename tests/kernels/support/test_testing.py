"""The comparison rule accepts what it should and nothing else, whatever the draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from balcaprl.kernels.support.testing import Compared, assert_as_accurate, assert_as_accurate_over

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


def test_a_rounding_may_be_that_of_the_terms_of_a_sum() -> None:
    exact = torch.tensor(1e-9, dtype=torch.float64)
    off = (exact + 1e-7).float()
    assert_as_accurate_over(lambda _: [Compared("sum", off, exact.float(), exact, scale=1.0)])
    with pytest.raises(AssertionError, match="sum: error"):
        assert_as_accurate_over(lambda _: [Compared("sum", off, exact.float(), exact)])


def test_zeros() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    assert_as_accurate(zeros.float(), zeros.float(), zeros)
    assert_as_accurate(zeros.float() + 1e-9, zeros.float() + 1e-9, zeros)
    for working in (zeros, zeros + 1e-9):
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(zeros.float() + 1e-8, working.float(), zeros)
    assert_as_accurate(torch.empty(0), torch.empty(0), zeros[:0])


def test_shape_and_non_finite_values() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(WORKING[:1], WORKING, EXACT)
    with pytest.raises(AssertionError, match="finite"):
        assert_as_accurate(torch.tensor([1.0, torch.nan]), WORKING, EXACT)
    with pytest.raises(AssertionError, match="float64"):
        assert_as_accurate(WORKING, WORKING, WORKING)


# Several problems.


def test_more_are_drawn_only_where_the_rule_does_not_hold() -> None:
    drawn: list[int] = []

    def problem(seed: int, bad: Callable[[int], bool]) -> Iterator[Compared]:
        drawn.append(seed)
        yield Compared("x", (EXACT + (5e-3 if bad(seed) else 0.0)).float(), WORKING, EXACT)

    assert_as_accurate_over(partial(problem, bad=lambda _: False), num_problems=3)
    assert drawn == [0, 1, 2]
    drawn.clear()
    assert_as_accurate_over(partial(problem, bad=lambda seed: seed == 1), num_problems=3)
    assert drawn == list(range(12)), "one unlucky problem among enough"
    drawn.clear()
    with pytest.raises(AssertionError, match=r"x: .*\(20 problems\)"):
        assert_as_accurate_over(partial(problem, bad=lambda _: True), num_problems=3, most=20)
    assert drawn == list(range(20))


def test_a_value_that_is_not_finite_fails_at_once() -> None:
    def problem(seed: int) -> Iterator[Compared]:
        assert seed < 3
        yield Compared("x", WORKING * (torch.nan if seed == 2 else 1.0), WORKING, EXACT)

    with pytest.raises(AssertionError, match="x: finite"):
        assert_as_accurate_over(problem)


def test_every_quantity_counts_by_itself() -> None:
    def problem(_: int) -> Iterator[Compared]:
        yield Compared("good", WORKING, WORKING, EXACT)
        yield Compared("bad", (EXACT + 9e-3).float(), WORKING, EXACT)

    with pytest.raises(AssertionError, match=r"^bad: error") as caught:
        assert_as_accurate_over(problem)
    assert "good" not in str(caught.value)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Rows' products, term by term in their dtype."""
    total = x.new_zeros(x.shape[0])
    for column in range(x.shape[1]):
        total = total + x[:, column] * y[:, column]
    return total


def backwards(x: Tensor, y: Tensor) -> Tensor:
    """As sound as ``dot``, in another order: other roundings."""
    return dot(x.flip(1), y.flip(1))


def in_bfloat16(x: Tensor, y: Tensor) -> Tensor:
    """What a kernel that accumulates in bfloat16 gives."""
    return dot(x.bfloat16(), y.bfloat16()).to(x.dtype)


def dots(seed: int, function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, num_rows: int) -> Compared:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, num_rows, 40, generator=generator).to(dtype)
    exact = (x.double() * y.double()).sum(1)
    return Compared("dot", function(x, y), dot(x, y), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_a_sound_implementation_never_fails(dtype: torch.dtype, num_rows: int) -> None:
    """Where one problem alone now and then fails it."""
    failed_alone = 0
    for draw in range(200):
        assert_as_accurate_over(lambda seed, draw=draw: [dots(1000 * draw + seed, backwards, dtype, num_rows)])
        each = dots(1000 * draw, backwards, dtype, num_rows)
        try:
            assert_as_accurate(each.actual, each.working, each.exact)
        except AssertionError:
            failed_alone += 1
    if num_rows == 1:
        assert failed_alone > 0


@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_accumulating_in_bfloat16_always_fails(num_rows: int) -> None:
    for draw in range(50):
        with pytest.raises(AssertionError, match="dot: error"):
            assert_as_accurate_over(
                lambda seed, draw=draw: [dots(1000 * draw + seed, in_bfloat16, torch.float32, num_rows)], most=16
            )


@pytest.mark.parametrize(
    ("num_rows", "kind", "times"), [(400, "forward", 3.0), (400, "gradient", 4.0), (2, "forward", 20.0)]
)
def test_errors_above_the_factor_always_fail(num_rows: int, kind, times: float) -> None:
    """Of a plain version that errs by two roundings."""
    generator = torch.Generator().manual_seed(0)

    def problem(_: int) -> Iterator[Compared]:
        exact = torch.randn(num_rows, generator=generator, dtype=torch.float64)
        errors = torch.randn(2, num_rows, generator=generator, dtype=torch.float64)
        errors *= 2.0 * torch.finfo(torch.float32).eps * exact.abs().max()
        yield Compared("x", (exact + times * errors[0]).float(), (exact + errors[1]).float(), exact, kind)

    for _ in range(50):
        with pytest.raises(AssertionError, match="x: error"):
            assert_as_accurate_over(problem, most=16)
