"""RMSNorm, SwiGLU's ``silu(gate) * up`` and rotary positions in one pass each, forward and backward (``csrc/layers.cpp``).

Float32 on the CPU.

PyTorch takes them as four to eight operations over the whole tensor, and keeps what lies between for the backward. Between
the matrix products of a small model these cost as much as a tenth of an update. No new mathematics, hence no op
of its own in the public list: models call them through ``balcaprl.policy.layers``, which is also where other
devices' kernels are chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from balcaprl.kernels import native


def takes(x: Tensor) -> bool:
    """Whether the functions here can run on such tensors: float32 on the CPU, and the library is there."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.is_available()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Args:
        x: (..., D) float32.
        weight: (D,) float32.
        eps: added to the mean of squares.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up; both (...) float32 of one shape."""
    return _SiluMul.apply(gate, up)  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x * cos + [-x2, x1] * sin for every head [x1, x2] of x.

    Args:
        x: (..., H, head_dim) float32, head_dim even.
        cos: (..., head_dim) float32, without gradient.
        sin: as ``cos``.
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
