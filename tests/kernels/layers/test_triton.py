"""The Triton kernels of RMSNorm, rotary positions and silu(gate) * up, interpreted: against float64 and PyTorch's plain
operations, over odd numbers of rows, widths of models and rows in wider buffers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

pytest.importorskip("triton", reason="the Triton kernels need triton")

from balcaprl.kernels.layers import triton as layers
from balcaprl.kernels.layers import triton_specs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
NORM_SHAPES = [(1, 1), (3, 2), (5, 31), (37, 100), (40, 128), (7, 1280), (5, 2048), (1, 8192)]
# (tokens, heads, head_dim)
ROTATED = [(1, 1, 2), (5, 3, 6), (9, 2, 64), (7, 16, 72), (13, 3, 80), (6, 4, 128), (2, 1, 256)]
SILU_SHAPES = [(1, 1), (3, 5), (7, 64), (5, 100), (3, 1024), (2, 1500), (3, 3420)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values that all dtypes hold exactly."""
    generator = torch.Generator().manual_seed(sum(shape) + 100_000 * seed)
    return torch.randn(shape, generator=generator).bfloat16().half().to(dtype)


def within(x: Tensor, before: int, after: int) -> Tensor:
    """``x`` as columns of a wider buffer, whose other columns are NaN."""
    buffer = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), float("nan"))
    view = buffer[..., before : before + x.shape[-1]]
    return view.copy_(x)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def plain_silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain(function, inputs: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of a plain function, computed in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def compare(names: str, actual: list[Tensor], working: list[Tensor], exact: list[Tensor]) -> Iterator[Compared]:
    for name, *each in zip(names.split(), actual, working, exact, strict=True):
        yield Compared(name, *each, "gradient" if name.startswith("grad") else "forward")


# RMSNorm.


def norm_problem(shape: tuple[int, int], dtype: torch.dtype, seed: int, before: int = 0, after: int = 0):
    x, grad = draw(shape, dtype, seed), draw(shape, dtype, 1000 + seed)
    weight = (1.0 + 0.1 * draw(shape[1:], torch.float32, 2000 + seed)).to(dtype)
    return [within(x, before, after), weight], within(grad, after, before)


def check_norm(shape: tuple[int, int], dtype: torch.dtype, before: int = 0, after: int = 0) -> None:
    def problem(seed: int) -> Iterator[Compared]:
        (x, weight), grad = norm_problem(shape, dtype, seed, before, after)
        out, rstd = layers.rms_norm(x, weight, EPS)
        grad_x, grad_weight = layers.rms_norm_backward(grad, x, weight, rstd, None, True)
        assert grad_weight is not None
        assert (out.dtype, grad_x.dtype, grad_weight.dtype, rstd.dtype) == (dtype, dtype, dtype, torch.float32)
        assert out.is_contiguous()
        assert grad_x.is_contiguous()
        working = plain(plain_rms_norm, [x, weight], grad, dtype)
        exact = plain(plain_rms_norm, [x, weight], grad, torch.float64)
        yield from compare("out grad_x grad_weight", [out, grad_x, grad_weight], working, exact)
        squares = [(each.pow(2).mean(-1) + EPS).rsqrt() for each in (x.float(), x.double())]
        yield Compared("rstd", rstd, *squares)

    assert_as_accurate_over(problem, num_problems=2, most=32)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_norm(shape, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize(("before", "after"), [(0, 8), (16, 16), (3, 0), (1, 2)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rms_norm_of_rows_in_a_wider_buffer(before: int, after: int, dtype: torch.dtype) -> None:
    check_norm((37, 128), dtype, before, after)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 100), (40, 128), (5, 2048)], ids=str)
def test_gradient_that_is_added_and_output_again(shape: tuple[int, int], dtype: torch.dtype) -> None:
    def problem(seed: int) -> Iterator[Compared]:
        (x, weight), grad = norm_problem(shape, dtype, seed)
        add = within(draw(shape, dtype, 3000 + seed), 4, 0)
        out, rstd = layers.rms_norm(x, weight, EPS)
        assert torch.equal(layers.rms_norm_again(x, weight, rstd), out)
        grad_x, grad_weight = layers.rms_norm_backward(grad, x, weight, rstd, add, True)
        frozen, none = layers.rms_norm_backward(grad, x, weight, rstd, add, False)
        assert none is None
        without = layers.rms_norm_backward(grad, x, weight, rstd, None, True)[1]
        torch.testing.assert_close(grad_weight, without)
        working, exact = (add.to(d) + plain(plain_rms_norm, [x, weight], grad, d)[1] for d in (dtype, torch.float64))
        yield Compared("grad_x", grad_x, working, exact, "gradient")
        yield Compared("grad_x of a frozen weight", frozen, working, exact, "gradient")

    assert_as_accurate_over(problem, num_problems=2, most=32)


@pytest.mark.interpreter
def test_gradient_of_a_weight_in_float32() -> None:
    """Of activations in bfloat16: nothing is rounded on the way to it."""
    (x, weight), grad = norm_problem((37, 100), torch.bfloat16, 0)
    out, rstd = layers.rms_norm(x, weight.float(), EPS)
    grad_x, grad_weight = layers.rms_norm_backward(grad, x, weight.float(), rstd, None, True)
    assert (out.dtype, grad_x.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = plain(plain_rms_norm, [x, weight], grad, torch.float64)[2]
    torch.testing.assert_close(grad_weight, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_more_programs_add_up_to_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all tiles, more programs than tiles, and between: each share of the weight's gradient is counted."""
    (x, weight), grad = norm_problem((100, 128), torch.float32, 0)
    exact = plain(plain_rms_norm, [x, weight], grad, torch.float64)[2]
    _, rstd = layers.rms_norm(x, weight, EPS)
    for programs in (1, 3, 7, 50):
        monkeypatch.setattr(layers, "_PROGRAMS_ON_CPU", programs)
        layers._row_plan.cache_clear()
        first = layers.rms_norm_backward(grad, x, weight, rstd, None, True)[1]
        assert torch.equal(first, layers.rms_norm_backward(grad, x, weight, rstd, None, True)[1])
        torch.testing.assert_close(first, exact.float(), rtol=1e-5, atol=1e-5)
    layers._row_plan.cache_clear()


# Rotary positions.


def angles(num_tokens: int, head_dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines in bfloat16, whose two halves differ."""
    angle = 3.0 * draw((num_tokens, head_dim), torch.float32, 4000 + seed)
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "in a wider buffer":  # as query and key are beside the value
        buffer = x.new_full((x.shape[0], x.shape[1] + 3, x.shape[2]), float("nan"))
        return buffer[:, 1:-2].copy_(x)
    return within(x, 1, 2) if layout == "apart" else x.clone()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "table"), [*((each, torch.float32) for each in DTYPES), (torch.bfloat16,) * 2], ids=str
)
@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_rotate(case: tuple[int, int, int], dtype: torch.dtype, table: torch.dtype) -> None:
    def problem(seed: int) -> Iterator[Compared]:
        x, grad = draw(case, dtype, seed), draw(case, dtype, 1000 + seed)
        cos, sin = angles(case[0], case[2], seed)
        out, grad_x = x.clone(), grad.clone()
        layers.rotate_(out, cos.to(table), sin.to(table))
        layers.rotate_(grad_x, cos.to(table), sin.to(table), inverse=True)

        def rotate(x: Tensor) -> Tensor:
            return plain_rotate(x, cos, sin)

        working, exact = (plain(rotate, [x], grad, each) for each in (dtype, torch.float64))
        yield from compare("out grad_x", [out, grad_x], working, exact)

    assert_as_accurate_over(problem, num_problems=2, most=32)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["heads first", "in a wider buffer", "apart"])
@pytest.mark.parametrize("case", [(7, 16, 72), (13, 3, 80), (5, 2, 128)], ids=str)
def test_rotate_where_heads_lie(case: tuple[int, int, int], layout: str) -> None:
    """As contiguous heads, and nothing between them is touched."""
    x = draw(case, torch.bfloat16, 0)
    cos, sin = angles(case[0], case[2], 0)
    moved = laid_out(x, layout)
    layers.rotate_(moved, within(cos, 3, 1), within(sin, 1, 4))
    layers.rotate_(x, cos, sin)
    torch.testing.assert_close(moved, x)
    num_values = torch.empty(0, dtype=x.dtype).set_(moved.untyped_storage()).isfinite().sum()
    assert num_values == x.numel()


@pytest.mark.interpreter
def test_rotating_back_undoes_it() -> None:
    x = draw((9, 2, 64), torch.float32, 0)
    angle = draw((9, 32), torch.float32, 1).repeat(1, 2)
    turned = x.clone()
    layers.rotate_(turned, angle.cos(), angle.sin())
    assert not torch.allclose(turned, x, atol=0.1)
    layers.rotate_(turned, angle.cos(), angle.sin(), inverse=True)
    torch.testing.assert_close(turned, x)


# silu(gate) * up.


def check_silu(shape: tuple[int, int], dtype: torch.dtype, scale: float = 1.0, before: int = 0, after: int = 0) -> None:
    def problem(seed: int) -> Iterator[Compared]:
        gate, up, grad = (draw(shape, dtype, 1000 * i + seed) for i in range(3))
        gate_up, grad = within(torch.cat((scale * gate, up), dim=1), before, after), within(grad, after, before)
        out = layers.silu_mul(gate_up)
        again, grad_gate_up = layers.silu_mul_backward(grad, gate_up)
        assert (out.dtype, again.dtype, grad_gate_up.dtype) == (dtype, dtype, dtype)
        assert out.is_contiguous()
        assert grad_gate_up.is_contiguous()
        working, exact = (plain(plain_silu_mul, [gate_up], grad, each) for each in (dtype, torch.float64))
        yield from compare("out grad_gate_up", [out, grad_gate_up], working, exact)
        yield Compared("again", again, working[0], exact[0])

    assert_as_accurate_over(problem, num_problems=2, most=32)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SILU_SHAPES, ids=str)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_silu(shape, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_silu_mul_of_gates_that_saturate(dtype: torch.dtype) -> None:
    check_silu((5, 100), dtype, scale=100.0)


@pytest.mark.interpreter
@pytest.mark.parametrize(("before", "after"), [(0, 8), (3, 0), (1, 2)])
def test_silu_mul_of_rows_in_a_wider_buffer(before: int, after: int) -> None:
    check_silu((5, 1100), torch.bfloat16, before=before, after=after)


# All of them.


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype: torch.dtype) -> None:
    x, weight = torch.empty(0, 128, dtype=dtype), torch.ones(128, dtype=dtype)
    out, rstd = layers.rms_norm(x, weight, EPS)
    assert (out.shape, rstd.shape) == ((0, 128), (0,))
    assert layers.rms_norm_again(x, weight, rstd).shape == (0, 128)
    grad_x, grad_weight = layers.rms_norm_backward(x, x, weight, rstd, x, True)
    assert grad_x.shape == (0, 128)
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    layers.rotate_(x[:, None], x.float(), x.float())
    assert layers.silu_mul(x).shape == (0, 64)
    assert [each.shape for each in layers.silu_mul_backward(x[:, :64], x)] == [(0, 64), (0, 128)]


@pytest.mark.interpreter
def test_what_the_kernels_do_not_take_is_refused() -> None:
    wide, narrow = torch.zeros(1, 8193), torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"^x: the Triton kernels take rows of 1 to 8192 columns, not 8193"):
        layers.rms_norm(wide, wide[0], EPS)
    with pytest.raises(ValueError, match=r"^x: needs contiguous columns, not columns 4 elements apart"):
        layers.rms_norm(torch.zeros(6, 4).t(), narrow[0], EPS)
    with pytest.raises(ValueError, match=r"^grad: needs contiguous columns"):
        layers.rms_norm_backward(torch.zeros(6, 4).t(), narrow, narrow[0], narrow[:, 0], None, False)
    with pytest.raises(ValueError, match=r"^x: rotary positions need an even head_dim, not 3"):
        layers.rotate_(torch.zeros(2, 1, 3), narrow[:2, :3], narrow[:2, :3])
    with pytest.raises(ValueError, match=r"^gate_up: needs an even number of columns.*, not 5"):
        layers.silu_mul(narrow[:, :5])
    with pytest.raises(ValueError, match=r"^kernel: no launch table row for _silu_mul_kernel .* torch.float64"):
        layers.silu_mul(narrow.double())


def test_a_batch_of_another_size_compiles_nothing() -> None:
    """Triton compiles anew for a number that becomes a multiple of 16 or 1, unless it is told not to."""
    for spec in triton_specs.KERNEL_SPECS:
        counts = {name for name, kind in spec.arguments.items() if kind == "i32"}
        assert counts
        assert {p.name for p in spec.kernel.params if p.do_not_specialize} == counts, spec.name  # type: ignore[attr-defined]
