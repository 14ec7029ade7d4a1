"""Products of 16-bit operands beside memory that nobody wrote: none is read, in any op, on any processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from product_watch import ProductWatch, poisoned, what_is_beside
from torch import Tensor

from balcaprl.kernels import SharedPrefixLayout, linear_logprobs, linear_policy_loss, shared_prefix_attention
from balcaprl.kernels.head import native as native_head
from balcaprl.kernels.head import native_logits_room, native_weight_sum
from balcaprl.kernels.support import native
from balcaprl.kernels.support.products import gapless, reads_gaps, with_gapless_gradient

SIZES = (15, 31, 33, 34, 49, 63, 79, 80, 97, 129, 1001)
"""At which AMX products were seen to read beside rows, and their neighbours."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.is_available(), reason="no native library"))
IMPLS = ("reference", NATIVE, pytest.param("triton", marks=pytest.mark.interpreter))


def beside_nan(values: Tensor, wider: int = 7) -> Tensor:
    """The same numbers between columns of NaN, and with NaN behind the last row."""
    wide = values.new_full((*values.shape[:-1], values.shape[-1] + wider), torch.nan)
    strided = wide[..., : values.shape[-1]]
    return strided.copy_(values)


@pytest.fixture(autouse=True)
def nan_in_kept_scratch() -> Iterator[None]:
    """What an earlier call left behind in the head's room for logits."""
    native_logits_room._keep_scratch(torch.full((1 << 20,), torch.nan))
    yield
    native_logits_room.release_scratch()


@pytest.fixture(params=["whole", "in parts"])
def parts(request: pytest.FixtureRequest, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, or in so small parts that every path of the native head is taken."""
    if request.param == "in parts":
        monkeypatch.setattr(native_head, "_CHUNK_TOKENS", 5)
        monkeypatch.setattr(native_head, "FILTER_BLOCK", 3)
        monkeypatch.setattr(native_head, "_GATHERED_BYTES", 64 * size)
        monkeypatch.setattr(native_weight_sum, "_TILE_BYTES", 64 * size)
        monkeypatch.setattr(native_weight_sum, "_POOL_BYTES", 64 * size)


# The helper.


@pytest.mark.parametrize("columns", [*SIZES, 1, 7, 16, 32, 64])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_gapless_keeps_values_and_leaves_nothing_beside(columns: int, rows: int, transposed: bool) -> None:
    values = torch.randn(rows, columns).bfloat16()
    strided = beside_nan(values)
    assert bool(what_is_beside(strided)) == (columns % 32 != 0)
    if transposed:
        strided, values = strided.T, values.T
    made = gapless(strided)
    assert torch.equal(made, values)
    assert not what_is_beside(made)
    assert gapless(values).data_ptr() == values.data_ptr(), "what is dense is not copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_gapless_leaves_other_dtypes_alone(dtype: torch.dtype) -> None:
    strided = torch.ones(3, 9, dtype=dtype)[:, :5]
    assert gapless(strided) is strided


def test_gapless_of_odd_layouts() -> None:
    wide = torch.randn(4, 6, 9).bfloat16()
    for view in (wide[:, :, :5], wide[:, 1], wide.mT[:, :5], wide[..., ::2], wide[:1, 0].expand(4, 9), wide[0, 0, :5]):
        made = gapless(view)
        assert torch.equal(made, view)
        assert made.dim() == 1 or not what_is_beside(made)


def test_gradients_pass_through() -> None:
    x = torch.randn(3, 9, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(5, 3).bfloat16().T
    gradients = torch.autograd.grad(with_gapless_gradient(gapless(x[:, :5])), x, upstream)[0]
    assert torch.equal(gradients[:, :5], upstream)
    assert not gradients[:, 5:].any()
    seen: list[Tensor] = []
    y = x * 1.0
    y.register_hook(seen.append)
    with_gapless_gradient(y).backward(beside_nan(torch.ones(3, 9).bfloat16()))
    assert not what_is_beside(seen[0])


def test_the_watch_sees_gaps_and_what_lies_behind_the_last_row() -> None:
    finite = torch.zeros(3, 40).bfloat16()
    other = torch.zeros(40, 2).bfloat16()
    with ProductWatch() as watch:
        finite[:2, :15] @ other[:15]  # a block ends within the third row
        assert watch.seen
        assert not watch.faults
        finite[:, :33] @ other[:33]
        beside_nan(finite[:, :15])[:2] @ other[:15]
        torch.addmm(torch.zeros(3, 2).bfloat16(), beside_nan(finite), other)
        torch.bmm(beside_nan(finite)[None], other[None])
        torch.mm(beside_nan(finite).T, finite, out=torch.empty(40, 40).bfloat16())
    assert len(watch.seen) == 6
    assert len(watch.faults) == 5


def test_detection_and_protection_agree() -> None:
    assert not reads_gaps(protected=True)
    assert reads_gaps() in (False, True)


# The ops.


def head_problem(size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The size is that of hidden states and of the vocabulary: both are columns of a first operand."""
    generator = torch.Generator().manual_seed(size)
    num_tokens = 13
    hidden = torch.randn(num_tokens, size, generator=generator).to(dtype)
    weight = (torch.randn(size, size, generator=generator) / math.sqrt(size)).to(dtype)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.randint(0, size, (num_tokens,), generator=generator),
        "advantages": torch.randn(3, generator=generator),
        "cu_seqlens": torch.tensor([0, 4, 5, num_tokens], dtype=torch.int32),
    }


def run_logprobs(data: dict[str, Any], impl: str, **_: Any) -> tuple[Tensor, ...]:
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    result = linear_logprobs(*leaves, data["targets"], impl=impl)
    upstream = torch.linspace(-1.0, 2.0, len(data["targets"])).clamp(min=0.0)
    return *(x.detach() for x in result), *torch.autograd.grad((result.logprobs * upstream).sum(), leaves)


def run_policy_loss(data: dict[str, Any], impl: str, **options: Any) -> tuple[Tensor, ...]:
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    rest = (data["targets"], None, data["advantages"], data["cu_seqlens"])
    loss = linear_policy_loss(*leaves, *rest, impl=impl, **options).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def check_head(run: Callable[..., tuple[Tensor, ...]], data: dict[str, Any], impl: str, **options: Any) -> None:
    """Strided inputs beside NaN, in poisoned memory, give what dense ones give in float64, and no product saw a gap."""
    strided = {**data, **{name: beside_nan(data[name]) for name in ("hidden", "weight")}}
    exact = {**data, **{name: data[name].double() for name in ("hidden", "weight")}}
    expected = run(exact, "reference", **options)
    with poisoned(), ProductWatch() as watch:
        actual = run(strided, impl, **options)
    assert not watch.faults
    if impl != "triton" and data["hidden"].element_size() == 2:
        assert watch.seen
    bound = 40 * torch.finfo(data["hidden"].dtype).eps
    for mine, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=bound, atol=bound * max(1.0, float(wanted.abs().max())))


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_head_beside_nan(size: int, dtype: torch.dtype, impl: str) -> None:
    if impl == "triton" and size > 129:
        pytest.skip("takes a minute under the interpreter")
    data = head_problem(size, dtype)
    check_head(run_logprobs, data, impl)
    check_head(run_policy_loss, data, impl)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("impl", IMPLS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, 300])
def test_filtered_head_beside_nan(size: int, dtype: torch.dtype, impl: str) -> None:
    """Peaked, so that columns are gathered, in several pieces, and wait in the pool."""
    data = head_problem(size, dtype)
    data["hidden"] = (data["hidden"] + 12.0 * data["weight"][data["targets"]]).to(dtype)
    check_head(run_policy_loss, data, impl, filter_eps=1e-6)


@pytest.mark.skipif(not native.is_available(), reason="no native library")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_that_are_kept_apart(dtype: torch.dtype) -> None:
    """A vocabulary whose rows of logits are whole pages."""
    generator = torch.Generator().manual_seed(0)
    data = head_problem(33, dtype)
    data["weight"] = torch.randn(2048, 33, generator=generator).to(dtype)
    check_head(run_policy_loss, data, "native")
    room = native_logits_room.logits_view(3, data["weight"], torch.full((1 << 14,), torch.nan, dtype=dtype))
    assert room.stride(0) > 2048
    assert not room.as_strided((2, room.stride(0) - 2048), (room.stride(0), 1), 2048).any()


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [15, 16, 33, 34, 64, 72, 80])
def test_attention_beside_nan(head_dim: int, dtype: torch.dtype, impl: str) -> None:
    """Segments on their own, several at once, and prompts."""
    layout = SharedPrefixLayout.from_lengths([70, 5], [[9, 4], [3, 8, 2]])
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(layout.num_tokens, heads, head_dim) for heads in (4, 2, 2)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)

    def run(inputs: list[Tensor], upstream: Tensor, impl: str) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in inputs]
        out = shared_prefix_attention(*leaves, layout, impl=impl)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    exact = run([x.double() for x in values], upstream.double(), "reference")
    with poisoned(), ProductWatch() as watch:
        actual = run([beside_nan(x) for x in values], beside_nan(upstream), impl)
    assert not watch.faults
    assert watch.seen or dtype == torch.float32
    bound = 20 * torch.finfo(dtype).eps
    for mine, wanted in zip(actual, exact, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=bound, atol=bound * float(wanted.abs().max()))
