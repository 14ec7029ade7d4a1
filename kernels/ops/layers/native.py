"""RMSNorm, SwiGLU's ``silu(gate) * up`` and rotary positions on float32 CPU tensors, with ``csrc/layers.cpp``.

Each layer passes over its tensors once in the forward and once in the backward. PyTorch runs four to eight operations
over the whole tensor for each layer and keeps intermediate results for the backward; in a small model this takes up to
a tenth of an update's time. These layers have no new mathematics and are therefore not in the package's list of public
ops. Models use them through ``balcaprl.policy.layers.fused``; ``balcaprl.policy.layers.kernels`` chooses between these
kernels and those of other devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from balcaprl.kernels.support import native


def takes(x: Tensor) -> bool:
    """Whether the functions of this module can run on ``x``: it is float32 on the CPU, and the library is available."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.is_available()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: (..., D) float32 input.
        weight: (D,) float32 scale.
        eps: number that is added to the mean of squares.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Computes gate * sigmoid(gate) * up; both tensors are float32 and have the same shape."""
    return _SiluMul.apply(gate, up)  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions: x * cos + [-x2, x1] * sin for every head [x1, x2] of x.

    Args:
        x: (..., H, head_dim) float32 heads, head_dim even.
        cos: (..., head_dim) float32 cosines, without gradient.
        sin: (..., head_dim) float32 sines, without gradient.
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        num_rows, size = _rows(x)
        out, rstd = torch.empty_like(x), x.new_empty(num_rows)
        status = native.library().balcaprl_rms_norm(num_rows, size, *_pointers(x, weight), eps, *_pointers(out, rstd))
        assert status == native.OK
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        status = native.library().balcaprl_rms_norm_backward(
            *_rows(x),
            *_pointers(grad, x, weight, rstd, grad_x),
            None if grad_weight is None else grad_weight.data_ptr(),
        )
        if status == native.OUT_OF_MEMORY:
            raise MemoryError("rms_norm: no memory for the sums of its weight's gradient")
        return grad_x, grad_weight, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        native.library().balcaprl_silu_mul(gate.numel(), *_pointers(gate, up, out))
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, grad_gate, grad_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        native.library().balcaprl_silu_mul_backward(gate.numel(), *_pointers(grad, gate, up, grad_gate, grad_up))
        return grad_gate, grad_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, turn_back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, turn_back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, turn_back: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    num_heads, head_dim = x.shape[-2:]
    num_tokens = cos.numel() // head_dim
    assert x.numel() == num_tokens * num_heads * head_dim
    native.library().balcaprl_rotate(
        num_tokens, num_heads, head_dim // 2, *_pointers(x, cos, sin), int(turn_back), out.data_ptr()
    )
    return out


def _rows(x: Tensor) -> tuple[int, int]:
    size = x.shape[-1]
    return (x.numel() // size if size else 0), size


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in tensors)
