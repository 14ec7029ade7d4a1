"""RMSNorm, rotary positions and SwiGLU's ``silu(gate) * up`` as Triton kernels, forward and backward, without autograd.

Each function launches one kernel; ``rms_norm_backward`` also launches the sum of its programs' shares of the weight's
gradient. The functions are for fused layers that save by themselves what their backward needs. Tensors are float32,
bfloat16 or float16, on a CUDA device, or on the CPU under Triton's interpreter. Rows may have any stride, but the
elements of a row must be contiguous; ``weight`` is contiguous. Arithmetic is in float32, and each result is rounded
once, when it is stored. If there are no rows, no kernel is launched. The host reads no tensor's values, so it never
waits for the device.

This module is imported only where Triton kernels run; ``triton_specs.py`` describes them to the compile suite.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from balcaprl.kernels.layers.triton_kernels import (
    _rms_norm_backward_kernel,
    _rms_norm_kernel,
    _rotate_kernel,
    _silu_mul_backward_kernel,
    _silu_mul_kernel,
)
from balcaprl.kernels.support.launch import launch, on_device

MOST_COLUMNS = 8192
"""Largest number of columns of an RMSNorm, which holds whole rows in registers, and of half a rotated head."""
_PROGRAMS_ON_CPU = 2
"""Value of ``most_programs`` under the interpreter: so small that a program takes several tiles, as on a GPU."""


class _Plan(NamedTuple):
    """How a kernel is launched over rows of one width on one device."""

    options: dict[str, int | bool]
    """Keyword arguments of the launch that follow from width, device and dtype."""
    tile: int
    """Size of a program's tile: the number of rows, or of columns for a kernel that splits rows into tiles."""
    most_programs: int
    """Number of programs that fill the device; 0 for a kernel that splits rows, which does not use it."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm: out = x * rstd * weight, with rstd = 1 / sqrt(mean(x^2) + eps) of each row.

    Args:
        x: (T, D) input, D at most ``MOST_COLUMNS``.
        weight: (D,) scale.
        eps: number that is added to the mean of squares.

    Returns:
        (T, D) out in x's dtype, contiguous, and (T,) float32 rstd.

    Raises:
        ValueError: D is too large, or the columns of ``x`` are not contiguous.
    """
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return _normed(x, weight, rstd, eps, again=False), rstd


def rms_norm_again(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Computes the ``out`` of ``rms_norm`` again from ``rstd``, with the same bits, for a backward that lacks it."""
    return _normed(x, weight, rstd, 0.0, again=True)


def _normed(x: Tensor, weight: Tensor, rstd: Tensor, eps: float, *, again: bool) -> Tensor:
    num_rows, size = x.shape
    plan = _row_plan("_rms_norm_kernel", x.device, x.dtype, size)
    stride = _row_stride("x", x)
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if num_rows:
        pack = _pack(x.dtype, size, stride)
        with on_device(x.device):
            _rms_norm_kernel[(triton.cdiv(num_rows, plan.tile),)](
                x, weight, out, rstd, num_rows, stride // pack, eps, D=size, PACK=pack, AGAIN=again, **plan.options
            )
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None, weight_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``rms_norm``.

    Args:
        grad: (T, D) gradient of out.
        x: (T, D) input of the forward.
        weight: (D,) scale.
        rstd: (T,) float32, from the forward.
        add: (T, D) gradient that reaches ``x`` around the norm, such as by a residual connection; None means 0.
        weight_gradient: whether the weight's gradient is wanted.

    Returns:
        (T, D) gradient of x, ``add`` included, contiguous, in the dtype of x; and (D,) gradient of the weight in the
        weight's dtype, or None. The weight's gradient is summed in float32 in a fixed order, so repetitions give the
        same bits.

    Raises:
        ValueError: as ``rms_norm``.
    """
    num_rows, size = x.shape
    plan = _row_plan("_rms_norm_backward_kernel", x.device, x.dtype, size)
    strides = [_row_stride("grad", grad), _row_stride("x", x), 0 if add is None else _row_stride("add", add)]
    grad_x = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if not num_rows:
        return grad_x, torch.zeros_like(weight) if weight_gradient else None
    programs, sums = triton.cdiv(num_rows, plan.tile), None
    if weight_gradient:
        programs = min(programs, plan.most_programs)
        sums = torch.empty((programs, size), dtype=torch.float32, device=x.device)
    pack = _pack(x.dtype, size, *strides)
    packs = [stride // pack for stride in strides]
    with on_device(x.device):
        _rms_norm_backward_kernel[(programs,)](
            grad, x, weight, rstd, add, grad_x, sums, num_rows, *packs, D=size, PACK=pack, **plan.options
        )
    return grad_x, None if sums is None else sums.sum(0).to(weight.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """Applies rotary positions in place: x * cos + [-x2, x1] * sin for every head [x1, x2] of x.

    Args:
        x: (T, H, head_dim) heads, with any strides of tokens and heads, and head_dim even. No two elements may share
            memory.
        cos: (T, head_dim) cosines, float32 or in x's dtype.
        sin: (T, head_dim) sines, as ``cos``.
        inverse: whether to apply the transpose instead, which turns the gradient of the result into that of x.

    Raises:
        ValueError: head_dim is odd or above 2 ``MOST_COLUMNS``, or columns are not contiguous.
    """
    num_tokens, num_heads, head_dim = x.shape
    half, odd = divmod(head_dim, 2)
    if odd:
        raise ValueError(f"x: rotary positions need an even head_dim, not {head_dim}")
    plan = _row_plan("_rotate_kernel", x.device, x.dtype, half)
    strides = [x.stride(0), _row_stride("x", x), _row_stride("cos", cos), _row_stride("sin", sin)]
    num_rows = num_tokens * num_heads
    if not num_rows:
        return
    pack = _pack(x.dtype, half, *strides)
    packs = [stride // pack for stride in strides]
    with on_device(x.device):
        _rotate_kernel[(triton.cdiv(num_rows, plan.tile),)](
            x, cos, sin, num_rows, *packs, HEADS=num_heads, HALF=half, PACK=pack, INVERSE=inverse, **plan.options
        )


def silu_mul(gate_up: Tensor) -> Tensor:
    """Computes silu(gate) * up.

    Args:
        gate_up: (T, 2 I): gate in the first I columns, up in the others.

    Returns:
        (T, I), contiguous.

    Raises:
        ValueError: the number of columns is odd, or they are not contiguous.
    """
    num_rows, size, stride = _halves(gate_up)
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        plan = _column_plan("_silu_mul_kernel", gate_up.device, gate_up.dtype)
        pack = _pack(gate_up.dtype, size, stride)
        with on_device(gate_up.device):
            _silu_mul_kernel[(num_rows, triton.cdiv(size, plan.tile))](
                gate_up, out, stride // pack, SIZE=size, PACK=pack, **plan.options
            )
    return out


def silu_mul_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the result of ``silu_mul`` again, because the forward need not save it, and the gradient.

    Args:
        grad: (T, I) gradient of the result.
        gate_up: (T, 2 I) input of the forward.

    Returns:
        (T, I) result and (T, 2 I) gradient of ``gate_up``, both contiguous.

    Raises:
        ValueError: as ``silu_mul``.
    """
    num_rows, size, stride = _halves(gate_up)
    grad_stride = _row_stride("grad", grad)
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    grad_gate_up = torch.empty((num_rows, 2 * size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        plan = _column_plan("_silu_mul_backward_kernel", gate_up.device, gate_up.dtype)
        pack = _pack(gate_up.dtype, size, grad_stride, stride)
        with on_device(gate_up.device):
            _silu_mul_backward_kernel[(num_rows, triton.cdiv(size, plan.tile))](
                grad, gate_up, out, grad_gate_up, grad_stride // pack, stride // pack, SIZE=size, PACK=pack,
                **plan.options,
            )  # fmt: skip
    return out, grad_gate_up


def _halves(gate_up: Tensor) -> tuple[int, int, int]:
    """Returns the number of rows, the number of columns of gate and of up, and the row stride."""
    num_rows, columns = gate_up.shape
    if columns % 2:
        raise ValueError(f"gate_up: needs an even number of columns, gate and up beside each other, not {columns}")
    return num_rows, columns // 2, _row_stride("gate_up", gate_up)


def _row_stride(name: str, x: Tensor) -> int:
    """Returns the stride of the last axis but one; checks that columns are contiguous."""
    stride, column_stride = x.stride()[-2:]
    if column_stride != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: needs contiguous columns, not columns {column_stride} elements apart")
    return stride


def _pack(dtype: torch.dtype, *distances: int) -> int:
    """The largest number of elements, at most 16 bytes of them, that divides all distances between rows or their parts.

    One of the distances is the width of a row or part. This makes the kernel load all its inputs in the same pieces, so
    that no thread has to pass values to another.
    """
    return math.gcd(16 // dtype.itemsize, *distances)


@functools.cache
def _row_plan(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> _Plan:
    """The plan of a kernel whose programs take whole rows of ``size`` columns."""
    if not 1 <= size <= MOST_COLUMNS:
        raise ValueError(f"x: the Triton kernels take rows of 1 to {MOST_COLUMNS} columns, not {size}")
    row = launch(kernel, device, dtype)
    block = triton.next_power_of_2(size)
    programs = _PROGRAMS_ON_CPU
    if device.type == "cuda":
        programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return _Plan({"BLOCK_D": block, **row.kwargs()}, max(1, row.blocks["BLOCK_VALUES"] // block), programs)


@functools.cache
def _column_plan(kernel: str, device: torch.device, dtype: torch.dtype) -> _Plan:
    """The plan of a kernel whose programs take tiles of a row's columns."""
    row = launch(kernel, device, dtype)
    return _Plan({**row.kwargs()}, row.blocks["BLOCK_VALUES"], 0)
