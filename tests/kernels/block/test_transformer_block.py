"""The block on interpreted kernels against its specification in float64; and how weights come to lie side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from balcaprl.kernels import SharedPrefixLayout
from balcaprl.kernels.block.attention import Attention, SegmentAttention, SharedPrefixAttention
from balcaprl.kernels.block.transformer_block import (
    BlockShape,
    BlockWeights,
    Linear,
    Rows,
    adjacent,
    adjoin,
    transformer_block,
    transformer_block_reference,
)
from balcaprl.kernels.shared_prefix.reference import shared_prefix_attention_reference
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

pytest.importorskip("triton", reason="the block's kernels need triton")
LENGTHS = ([9, 4], [[5, 3], [2]])


class Case(NamedTuple):
    """What a block looks like."""

    width: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    biases: str
    """Which of the layers have biases, of ``qkv out gate_up down``."""
    parts: int
    """Number of matrices of query, key and value: 1 or 3."""
    side_by_side: bool
    """Whether matrices of the same input lie one after the other in memory."""
    rows: str
    """Which rows are read: all, the last ones, or some."""
    segments: bool = False
    """Whether rows attend within segments, as in a tower, and not as groups with a shared prompt."""


CASES = [
    Case(32, 48, 4, 2, 16, "qkv", 3, True, "all"),
    Case(32, 48, 4, 2, 16, "qkv", 3, False, "some"),
    Case(40, 24, 2, 1, 20, "", 3, True, "last"),
    Case(32, 20, 2, 2, 16, "qkv out gate_up down", 1, True, "all", segments=True),
    Case(48, 20, 3, 3, 16, "qkv out gate_up down", 1, False, "all", segments=True),
]


def make_linear(sizes: list[int], width: int, bias: bool, side_by_side: bool, generator: torch.Generator) -> Linear:
    weights = [torch.randn(size, width, generator=generator) / width**0.5 for size in sizes]
    biases = [torch.randn(size, generator=generator) for size in sizes if bias]
    if side_by_side:
        for each in (weights, biases):
            if each:
                adjoin(each)
    return Linear(tuple(weights), tuple(biases))


def make_weights(case: Case, seed: int) -> BlockWeights:
    generator = torch.Generator().manual_seed(seed)
    heads = [case.num_heads, case.num_kv_heads, case.num_kv_heads]
    sizes = [n * case.head_dim for n in heads]
    qkv = sizes if case.parts == 3 else [sum(sizes)]

    def linear(name: str, out: list[int], width: int) -> Linear:
        return make_linear(out, width, name in case.biases.split(), case.side_by_side, generator)

    return BlockWeights(
        1 + 0.1 * torch.randn(case.width, generator=generator),
        linear("qkv", qkv, case.width),
        linear("out", [case.width], case.num_heads * case.head_dim),
        1 + 0.1 * torch.randn(case.width, generator=generator),
        linear("gate_up", [case.inner, case.inner], case.width),
        linear("down", [case.width], case.inner),
    )


def leaves_of(weights: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """Copies with a gradient; matrices that lie side by side do so again."""

    def linear(each: Linear) -> Linear:
        copies = [[x.to(dtype, copy=True) for x in part] for part in each]
        for copied, part in zip(copies, each, strict=True):
            if part and len(part) > 1 and adjacent(part) is not None:
                adjoin(copied)
        return Linear(*(tuple(x.requires_grad_() for x in part) for part in copies))

    return BlockWeights(
        *(linear(x) if isinstance(x, Linear) else x.to(dtype, copy=True).requires_grad_() for x in weights)
    )


def tensors_of(weights: BlockWeights) -> list[Tensor]:
    return [x for each in weights for part in (each if isinstance(each, Linear) else [[each]]) for x in part]


def attentions(case: Case, scale: float) -> tuple[Attention, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The block's attention, and a differentiable one for the specification."""
    if case.segments:
        segments = SegmentAttention(torch.tensor([0, 8, 16, 23], dtype=torch.int32), 8, scale)
        return segments, segments._plain
    layout = SharedPrefixLayout.from_lengths(*LENGTHS)
    return SharedPrefixAttention(layout, scale), lambda q, k, v: shared_prefix_attention_reference(
        q, k, v, layout, scale=scale
    )


def rows_of(case: Case) -> Rows | None:
    return {"all": None, "last": slice(8, 23), "some": torch.tensor([8, 9, 12, 20, 22])}[case.rows]


def results(case: Case, seed: int, dtype: torch.dtype, *, fused: bool) -> list[Tensor]:
    """Output, gradient of the rows, and those of all weights."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(23, case.width, generator=generator).bfloat16().to(dtype).requires_grad_()
    above = torch.randn(23, case.width, generator=generator).bfloat16().to(dtype)
    angles = torch.randn(23, case.head_dim // 2, generator=generator).repeat(1, 2)
    cos, sin = (each.bfloat16().to(dtype) for each in (angles.cos(), angles.sin()))
    weights = leaves_of(
        BlockWeights(*(
            Linear(*(tuple(x.bfloat16().float() for x in part) for part in each)) if isinstance(each, Linear)
            else each.bfloat16().float()
            for each in make_weights(case, seed)
        )),
        dtype,
    )  # fmt: skip
    if case.side_by_side:
        for linear in (weights.qkv, weights.gate_up):
            for part in linear:
                if part:
                    adjoin(part)
    shape = BlockShape(case.num_heads, case.num_kv_heads, 1e-6, 1e-5)
    own, plain = attentions(case, case.head_dim**-0.5)
    if fused:
        out = transformer_block(x, weights, shape, cos, sin, own, rows_of(case))
    else:
        out = transformer_block_reference(x, weights, shape, cos, sin, plain, rows_of(case))
    return [out.detach(), *torch.autograd.grad(out, [x, *tensors_of(weights)], above)]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_the_specification(case: Case, dtype: torch.dtype) -> None:
    def compared(seed: int) -> Iterator[Compared]:
        actual = results(case, seed, dtype, fused=True)
        working = results(case, seed, dtype, fused=False)
        exact = results(case, seed, torch.float64, fused=False)
        assert all(each.dtype == dtype for each in actual)
        for index, values in enumerate(zip(actual, working, exact, strict=True)):
            yield Compared(f"{index}", *values, "forward" if index == 0 else "gradient")

    assert_as_accurate_over(compared, num_problems=2, most=16)


@pytest.mark.interpreter
@pytest.mark.parametrize("frozen", [["norm1", "norm2"], ["qkv"], ["out", "down"], ["gate_up", "norm2"]], ids=str)
def test_frozen_weights_get_no_gradient_and_change_no_other(frozen: list[str]) -> None:
    case = CASES[0]
    weights, again = (leaves_of(make_weights(case, 0), torch.float32) for _ in range(2))
    for name in frozen:
        value = getattr(again, name)
        for each in value.weights + value.biases if isinstance(value, Linear) else (value,):
            each.requires_grad_(False)
    x = torch.randn(23, case.width, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(23, case.head_dim)
    shape, (own, _) = BlockShape(4, 2, 1e-6, 1e-6), attentions(case, 0.25)
    for each in (weights, again):
        transformer_block(x, each, shape, angles.cos(), angles.sin(), own).square().sum().backward()
    for free, other in zip(tensors_of(weights), tensors_of(again), strict=True):
        assert (other.grad is None) if not other.requires_grad else torch.equal(free.grad, other.grad)


@pytest.mark.interpreter
def test_gradients_of_weights_side_by_side_lie_so_too() -> None:
    case = CASES[0]
    weights = make_weights(case, 0)
    for each in tensors_of(weights):
        each.requires_grad_()
    x = torch.randn(23, case.width)
    transformer_block(
        x, weights, BlockShape(4, 2, 1e-6, 1e-6), x[:, :16], x[:, :16], attentions(case, 1.0)[0]
    ).sum().backward()
    for linear in (weights.qkv, weights.gate_up):
        for part in linear:
            assert not part or adjacent([each.grad for each in part]) is not None


def test_adjoined_parameters_keep_their_values_and_lie_side_by_side() -> None:
    parameters = [torch.nn.Parameter(torch.randn(size, 4)) for size in (3, 1, 2)]
    before = torch.cat([each.detach() for each in parameters])
    assert adjacent([each.detach() for each in parameters]) is None
    adjoin(parameters)
    joined = adjacent([each.detach() for each in parameters])
    assert joined is not None
    assert torch.equal(joined, before)
    address = parameters[0].data_ptr()
    adjoin(parameters)
    assert parameters[0].data_ptr() == address  # they lay so already
    with torch.no_grad():
        parameters[1].zero_()
    assert torch.equal(joined[3], torch.zeros(4))


@pytest.mark.parametrize("order", [(1, 0), (0, 2)], ids=str)
def test_what_lies_otherwise_is_not_taken_for_one(order: tuple[int, int]) -> None:
    parts = torch.randn(6, 4).split(2)
    assert adjacent([parts[each] for each in order]) is None
    assert adjacent([torch.randn(2, 4), torch.randn(2, 4)]) is None
