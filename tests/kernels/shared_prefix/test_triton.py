"""The Triton kernels of shared_prefix_attention, interpreted: against the float64 specification, over ragged groups,
head sizes, strides and splits of the heads."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from tile_sizes import overridden
from torch import Tensor

from balcaprl.kernels import SharedPrefixLayout, shared_prefix_attention
from balcaprl.kernels.shared_prefix.reference import shared_prefix_attention_reference
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

pytest.importorskip("triton", reason="the Triton kernels need triton")

# (prompt lengths, completion lengths of each group, query heads, key heads, head size)
HAND_PICKED = [
    ([1], [[1]], 1, 1, 64),
    ([5], [[3, 4]], 2, 1, 16),
    ([7], [[]], 2, 1, 64),
    ([16], [[0, 0]], 2, 2, 80),
    ([40, 17, 32], [[9, 0, 37], [], [1, 1, 1, 16, 5]], 2, 1, 64),
    ([33, 1], [[20, 13], [0, 0]], 3, 1, 80),
    ([32], [[7, 9, 16]], 2, 2, 96),
    ([35], [[33, 31]], 2, 1, 128),
    ([9], [[5]], 2, 2, 40),
    ([6], [[20]], 1, 1, 3),
    ([4], [[3]], 1, 1, 112),
]
KERNELS = ("fwd", "dq", "dkdv")


def random_case(seed: int) -> tuple:
    rng = random.Random(seed)
    num_groups, (num_heads, num_kv_heads) = rng.randint(1, 3), rng.choice([(1, 1), (2, 1), (3, 1), (2, 2)])
    prompts = [rng.choice([1, 2, 16, 19, 33]) for _ in range(num_groups)]
    completions = [[rng.choice([0, 1, 2, 9, 17]) for _ in range(rng.randint(0, 3))] for _ in range(num_groups)]
    return prompts, completions, num_heads, num_kv_heads, rng.choice([8, 20, 64, 80, 96])


CASES = [*HAND_PICKED, *(random_case(seed) for seed in range(30))]


@contextlib.contextmanager
def small_tiles(block_m: int = 16, block_n: int = 32) -> Iterator[None]:
    """So that few tokens take many tiles."""
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(overridden(f"_shared_prefix_{name}_kernel", BLOCK_M=block_m, BLOCK_N=block_n))
        yield


def make_inputs(case: tuple, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor, SharedPrefixLayout]:
    """(query, key, value), gradient of the output, layout. Values are exact in half precision, so that all see them."""
    prompts, completions, num_heads, num_kv_heads, head_dim = case
    layout = SharedPrefixLayout.from_lengths(prompts, completions)
    generator = torch.Generator().manual_seed(layout.num_tokens + 10_000 * seed)
    shapes = [(layout.num_tokens, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    values = [torch.randn(shape, generator=generator).bfloat16().half().to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in values[:3]], values[3], layout


def run(function, inputs: list[Tensor], grad_out: Tensor, layout: SharedPrefixLayout, **options) -> list[Tensor]:
    out = function(*inputs, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def assert_accurate(case: tuple, dtype: torch.dtype, moved: Callable[[Tensor], Tensor] = torch.detach) -> None:
    """By the rule of ``testing``, with inputs ``moved`` to where they are to lie.

    The interpreter is slow: one problem, and more where luck may have decided.
    """

    def compared(seed: int) -> Iterator[Compared]:
        inputs, grad_out, layout = make_inputs(case, dtype, seed)
        leaves = [moved(x.detach()).requires_grad_() for x in inputs]
        actual = run(shared_prefix_attention, leaves, grad_out, layout, impl="triton")
        exact = run(shared_prefix_attention_reference, *make_inputs(case, torch.float64, seed))
        working = run(shared_prefix_attention_reference, *make_inputs(case, dtype, seed))
        assert all(a.dtype == dtype for a in actual)
        yield Compared(f"out of {case}", actual[0], working[0], exact[0])
        # The three gradients at once: where one is nearly 0 by cancellation, its own rounding alone says nothing.
        gradients = (torch.cat([g.flatten() for g in each[1:]]) for each in (actual, working, exact))
        yield Compared(f"gradients of {case}", *gradients, "gradient")

    assert_as_accurate_over(compared, num_problems=1, most=32)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_the_specification(case: tuple, dtype: torch.dtype) -> None:
    with small_tiles():
        assert_accurate(case, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", [HAND_PICKED[1], *HAND_PICKED[5:8]], ids=str)
def test_half_precision_with_five_bits_of_exponent(case: tuple) -> None:
    with small_tiles():
        assert_accurate(case, torch.float16)


@pytest.mark.interpreter
@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 16), (64, 32)])
def test_other_tiles(block_m: int, block_n: int) -> None:
    case = HAND_PICKED[4]
    with small_tiles(block_m, block_n):
        assert_accurate(case, torch.float32)


@pytest.mark.interpreter
def test_tiles_of_the_table() -> None:
    """As launched on sm_80: tiles of 128 and 64, longer than some segments and shorter than others."""
    case = ([70, 3], [[66, 1, 0, 65], [10]], 2, 1, 64)
    assert_accurate(case, torch.bfloat16)


@pytest.mark.interpreter
@pytest.mark.parametrize("heads_per_part", [1, 2])
def test_query_heads_split_over_programs(heads_per_part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three query heads for a key head, by ones and as two and one: the parts are added up."""
    from balcaprl.kernels.shared_prefix import triton as shared_prefix_triton

    monkeypatch.setattr(shared_prefix_triton, "_heads_per_part", lambda *_: heads_per_part)
    case = ([20, 3], [[9, 12], [4]], 3, 1, 80)
    for dtype in (torch.float32, torch.bfloat16):
        with small_tiles():
            assert_accurate(case, dtype)


@pytest.mark.interpreter
def test_repetition_strides_and_poisoned_memory() -> None:
    """Heads first, columns apart, an expanded gradient, memory full of NaN: the same bits as of contiguous tensors."""
    inputs, grad_out, layout = make_inputs(([20, 3], [[9, 12, 0], [4]], 2, 1, 24), torch.float32)
    grad_out = grad_out[:1].expand_as(grad_out)
    heads_first = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    columns_apart = [x.detach().repeat_interleave(2, dim=-1)[..., ::2] for x in inputs]
    with small_tiles():
        first = run(shared_prefix_attention, inputs, grad_out.contiguous(), layout, impl="triton")
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            for other in (heads_first, columns_apart):
                given = [x.requires_grad_() for x in other]
                again = run(shared_prefix_attention, given, grad_out, layout, impl="triton")
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.interpreter
def test_offsets_beyond_31_bits() -> None:
    """The second head lies 2^31 elements after the first; the memory between is never touched."""
    case = ([6], [[3, 4]], 2, 2, 16)

    def far_apart(x: Tensor) -> Tensor:
        num_tokens, _, head_dim = x.shape
        far = torch.empty(2**31 + num_tokens * head_dim, dtype=torch.bfloat16)
        return far.as_strided(x.shape, (head_dim, 2**31, 1)).copy_(x)

    assert_accurate(case, torch.bfloat16, far_apart)


@pytest.mark.interpreter
def test_completions_do_not_see_each_other() -> None:
    inputs, _, layout = make_inputs(([20], [[9, 12]], 2, 2, 16), torch.float32)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[20:29] = 7.0
    with small_tiles():
        out, other = (shared_prefix_attention(*x, layout, impl="triton") for x in (inputs, changed))
    assert torch.equal(out[:20], other[:20])
    assert torch.equal(out[29:], other[29:])


@pytest.mark.interpreter
def test_opcheck_and_full_graph_compilation() -> None:
    inputs, grad_out, layout = make_inputs(([5, 3], [[2, 0], [4]], 4, 2, 8), torch.float32)
    torch.library.opcheck(
        torch.ops.balcaprl.shared_prefix_attention.default, (*inputs, layout.tensors(), 0.3, "triton")
    )

    def attention(query: Tensor, key: Tensor, value: Tensor, each: SharedPrefixLayout) -> Tensor:
        return shared_prefix_attention(query, key, value, each, impl="triton")

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = run(attention, inputs, grad_out, layout)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, inputs, grad_out, layout), eager, strict=True))


@pytest.mark.interpreter
def test_what_the_kernels_do_not_take_is_refused() -> None:
    layout = SharedPrefixLayout.from_lengths([2], [[1, 1]])
    wide = torch.zeros(4, 2, 129)
    with pytest.raises(ValueError, match=r"^query: impl 'triton' has head sizes from 1 to 128, not 129"):
        shared_prefix_attention(wide, wide, wide, layout, impl="triton")
    double = torch.zeros(4, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no torch.float64"):
        shared_prefix_attention(double, double, double, layout, impl="triton")


def test_how_a_head_is_split_and_how_many_programs_there_are() -> None:
    from balcaprl.kernels.shared_prefix import triton as shared_prefix_triton

    parts = {d: tuple(shared_prefix_triton._split(d).values()) for d in (3, 16, 40, 64, 72, 80, 96, 112, 127, 128)}
    assert parts == {
        3: (16, 0),
        16: (16, 0),
        40: (32, 16),
        64: (64, 0),
        72: (64, 16),
        80: (64, 16),
        96: (64, 32),
        112: (64, 64),
        127: (64, 64),
        128: (128, 0),
    }
    layout = SharedPrefixLayout.from_lengths([17, 1], [[16, 16], [0, 1]])
    assert layout.most_tiles(16) == 4
    cpu = torch.device("cpu")
    assert [shared_prefix_triton._heads_per_part(n, 7, cpu) for n in (1, 2, 500)] == [3, 7, 7]
