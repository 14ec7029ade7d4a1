"""RMSNorm, silu(gate) * up and rotary positions against float64 and PyTorch, with every instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from balcaprl.kernels.layers import native as native_layers
from balcaprl.kernels.support import native
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

SHAPES = [
    (1, 1), (1, 3), (2, 15), (3, 16), (5, 17), (7, 63), (1, 64), (2, 65), (9, 128), (63, 192), (64, 96), (65, 256), (127, 513),
    (3, 2048), (2, 8193), (200, 100), (2, 3, 31), (1, 4, 5, 48),
]  # fmt: skip


pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not there")


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def plain_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def norm_inputs(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + 100_000 * seed)
    x = scale * torch.randn(shape, generator=generator)
    return x, 1.0 + 0.1 * torch.randn(shape[-1], generator=generator)


def silu_inputs(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + 100_000 * seed)
    return scale * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def check(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs_of: Callable[[int], tuple[Tensor, ...]]
) -> None:
    """Output and gradients, by the rule of ``kernels.testing``; ``inputs_of`` takes a seed."""

    def compared(seed: int) -> Iterator[Compared]:
        inputs = inputs_of(seed)
        upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1 + seed))
        exact = run(plain, tuple(x.double() for x in inputs), upstream)
        results = zip(run(ours, inputs, upstream), run(plain, inputs, upstream), exact, strict=True)
        for index, values in enumerate(results):
            yield Compared(f"gradient {index}" if index else "output", *values, "gradient" if index else "forward")

    assert_as_accurate_over(compared)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_is_as_accurate_as_plain(level: str, shape: tuple[int, ...]) -> None:
    for scale in (1.0, 1e-4, 300.0):
        inputs_of = functools.partial(norm_inputs, shape, scale)
        check(lambda x, weight: native_layers.rms_norm(x, weight, 1e-6), plain_rms_norm, inputs_of)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul_is_as_accurate_as_plain(level: str, shape: tuple[int, ...]) -> None:
    for scale in (1.0, 1e-4, 30.0):
        check(native_layers.silu_mul, plain_silu_mul, functools.partial(silu_inputs, shape, scale))


@pytest.mark.parametrize("head_dim", [2, 6, 10, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("shape", [(3, 2), (70, 5), (2, 9, 4)], ids=str)
def test_rotate_is_as_accurate_as_plain(level: str, shape: tuple[int, ...], head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(*shape, head_dim, generator=generator)
    # Both halves of a head may turn by angles of their own.
    angles = 10 * torch.randn(*shape[:-1], head_dim, generator=generator)
    cos, sin = angles.cos(), angles.sin()

    def plain(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        turned = torch.cat([-high, low], dim=-1)
        return x * cos.to(x.dtype).unsqueeze(-2) + turned * sin.to(x.dtype).unsqueeze(-2)

    check(
        lambda x: native_layers.rotate(x, cos, sin),
        plain,
        lambda seed: (torch.randn(*shape, head_dim, generator=torch.Generator().manual_seed(seed)),),
    )
    turned = x.transpose(0, 1).contiguous().transpose(0, 1) if len(shape) > 1 else x
    assert torch.equal(native_layers.rotate(turned, cos, sin), native_layers.rotate(x, cos, sin))


def test_silu_mul_far_from_zero(level: str) -> None:
    gate, up = torch.tensor([-1e30, -200.0, -88.0, 88.0, 200.0, 1e30]), torch.full((6,), 2.0)
    upstream = torch.ones(6)
    for ours, plain in zip(
        run(native_layers.silu_mul, (gate, up), upstream), run(plain_silu_mul, (gate, up), upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain)
    assert native_layers.silu_mul(torch.tensor([torch.nan]), torch.ones(1)).isnan().all()


def test_neither_batch_nor_threads_change_a_bit() -> None:
    x, weight = norm_inputs((300, 200))
    gate, up = silu_inputs((300, 200))
    upstream = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    cos, sin = torch.randn(2, 300, 20, generator=torch.Generator().manual_seed(2))

    def all_three(part: slice) -> tuple[Tensor, ...]:
        norm = run(lambda x, w: native_layers.rms_norm(x, w, 1e-6), (x[part], weight), upstream[part])
        product = run(native_layers.silu_mul, (gate[part], up[part]), upstream[part])
        heads, above = (each[part].unflatten(1, (10, 20)) for each in (x, upstream))
        return *norm, *product, *run(lambda x: native_layers.rotate(x, cos[part], sin[part]), (heads,), above)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_three(slice(None))
        torch.set_num_threads(2)
        assert all(map(torch.equal, alone, all_three(slice(None))))
    finally:
        torch.set_num_threads(before)
    halves = [all_three(slice(0, 128)), all_three(slice(128, None))]
    for index, (whole, *parts) in enumerate(zip(alone, *halves, strict=True)):
        if index == 2:  # the weight's gradient is a sum over rows
            torch.testing.assert_close(parts[0] + parts[1], whole)
        else:
            assert torch.equal(torch.cat(parts), whole)


def test_what_is_not_contiguous_and_what_needs_no_gradient() -> None:
    x, weight = norm_inputs((6, 10, 32))
    turned = x.transpose(0, 1).requires_grad_()
    out = native_layers.rms_norm(turned, weight, 1e-6)
    torch.testing.assert_close(out, plain_rms_norm(turned, weight))
    out.transpose(0, 1).sum().backward()
    assert turned.grad is not None
    assert weight.grad is None
    gate, up = silu_inputs((6, 10, 32))
    torch.testing.assert_close(
        native_layers.silu_mul(gate.transpose(0, 1), up.transpose(0, 1)), plain_silu_mul(gate, up).transpose(0, 1)
    )
    empty = torch.empty(0, 32, requires_grad=True)
    native_layers.rms_norm(empty, weight, 1e-6).sum().backward()
    assert empty.grad is not None


def test_which_tensors_it_takes() -> None:
    x = torch.ones(3)
    assert native_layers.takes(x)
    assert not native_layers.takes(x.double())
    assert not native_layers.takes(x.bfloat16())
    assert not native_layers.takes(x.to("meta"))
