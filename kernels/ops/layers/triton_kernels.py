"""Triton kernels of RMSNorm, rotary positions and SwiGLU; ``triton.py`` launches them and describes their arguments.

All are bound by memory: each reads its inputs once and writes its outputs once. A thread accesses 16 bytes at a time
where the rows' alignment allows it. Arithmetic is in float32. The sizes of a model (columns, heads) are constexprs. The
number of rows and the strides between them change from batch to batch, so the kernels are not specialised on them. A
kernel takes strides in units of ``PACK`` elements, which lets the compiler prove that accesses are aligned. ``PACK`` is
the largest number of elements, at most 16 bytes of them, that divides all strides and widths.

This module is imported only where Triton kernels run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from balcaprl.kernels.support.triton_products import narrowed


@triton.jit(do_not_specialize=["num_rows", "x_stride"])
def _rms_norm_kernel(
    x_TD,
    weight_D,
    out_TD,
    rstd_T,
    num_rows,
    x_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """One program per tile of whole rows: out = x * rstd * weight. Reads ``rstd_T`` with AGAIN, otherwise writes it."""
    ROWS: tl.constexpr = BLOCK_VALUES // BLOCK_D if BLOCK_VALUES > BLOCK_D else 1
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_rows = rows < num_rows
    here = in_rows[:, None] & (columns < D)[None, :]
    x = tl.load(x_TD + (rows * x_stride)[:, None] * PACK + columns[None, :], mask=here, other=0.0).to(tl.float32)
    weight = tl.load(weight_D + columns, mask=columns < D, other=0.0).to(tl.float32)
    if AGAIN:
        rstd = tl.load(rstd_T + rows, mask=in_rows, other=0.0)
    else:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        tl.store(rstd_T + rows, rstd, mask=in_rows)
    out = x * rstd[:, None] * weight[None, :]
    tl.store(out_TD + rows[:, None] * D + columns[None, :], narrowed(out, out_TD.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_rows", "grad_stride", "x_stride", "add_stride"])
def _rms_norm_backward_kernel(
    grad_TD,
    x_TD,
    weight_D,
    rstd_T,
    add_TD,
    grad_x_TD,
    sums_PD,
    num_rows,
    grad_stride,
    x_stride,
    add_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Program p of P takes the tiles p, p + P, p + 2 P, ... of whole rows, in this order. It writes its share of the
    weight's gradient to row p of ``sums_PD``; if ``sums_PD`` is None, this gradient is not computed."""
    ROWS: tl.constexpr = BLOCK_VALUES // BLOCK_D if BLOCK_VALUES > BLOCK_D else 1
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    in_columns = columns < D
    weight = tl.load(weight_D + columns, mask=in_columns, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for begin in range(0, num_rows, tl.num_programs(0) * ROWS):
        rows = begin + first
        in_rows = rows < num_rows
        here = in_rows[:, None] & in_columns[None, :]
        grad = grad_TD + (rows * grad_stride)[:, None] * PACK + columns[None, :]
        grad = tl.load(grad, mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_TD + (rows * x_stride)[:, None] * PACK + columns[None, :], mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_T + rows, mask=in_rows, other=0.0)[:, None]
        normed = x * rstd
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled * normed, axis=1)[:, None] / D
        grad_x = (scaled - normed * mean) * rstd
        if add_TD is not None:
            add = add_TD + (rows * add_stride)[:, None] * PACK + columns[None, :]
            grad_x += tl.load(add, mask=here, other=0.0).to(tl.float32)
        out = grad_x_TD + rows[:, None] * D + columns[None, :]
        tl.store(out, narrowed(grad_x, grad_x_TD.dtype.element_ty), mask=here)
        if sums_PD is not None:
            sums += grad * normed
    if sums_PD is not None:
        share = sums_PD + tl.program_id(0).to(tl.int64) * D + columns
        tl.store(share, tl.sum(sums, axis=0), mask=in_columns)


@triton.jit(do_not_specialize=["num_rows", "token_stride", "head_stride", "cos_stride", "sin_stride"])
def _rotate_kernel(
    x_THD,
    cos_TD,
    sin_TD,
    num_rows,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """One program per tile of rows, which it rotates in place; a row is one head of one token. The tile has at least as
    many values as the program's threads load at once. Otherwise two threads would load the same value, and one of them
    could read it after the other had overwritten it."""
    ROWS: tl.constexpr = BLOCK_VALUES // BLOCK_D if BLOCK_VALUES > BLOCK_D else 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = (rows // HEADS).to(tl.int64)
    heads = (rows % HEADS).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    here = (rows < num_rows)[:, None] & (columns < HALF)
    x = x_THD + (tokens * token_stride + heads * head_stride)[:, None] * PACK + columns
    cos = cos_TD + (tokens * cos_stride)[:, None] * PACK + columns
    sin = sin_TD + (tokens * sin_stride)[:, None] * PACK + columns
    x1 = tl.load(x, mask=here, other=0.0).to(tl.float32)
    x2 = tl.load(x + HALF, mask=here, other=0.0).to(tl.float32)
    cos1 = tl.load(cos, mask=here, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + HALF, mask=here, other=0.0).to(tl.float32)
    sin1 = tl.load(sin, mask=here, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + HALF, mask=here, other=0.0).to(tl.float32)
    if INVERSE:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    tl.store(x, narrowed(y1, x_THD.dtype.element_ty), mask=here)
    tl.store(x + HALF, narrowed(y2, x_THD.dtype.element_ty), mask=here)


@triton.jit
def _tile_of_row(SIZE: tl.constexpr, BLOCK_VALUES: tl.constexpr):
    """Returns the row and the columns that a program takes, and a mask of the columns before SIZE."""
    columns = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    return tl.program_id(0).to(tl.int64), columns, columns < SIZE


@triton.jit
def _gate_and_up(gate_up_TI, row, row_stride, columns, here, SIZE: tl.constexpr, PACK: tl.constexpr):
    """Loads gate and up of some columns of a row, in float32; ``here`` masks the columns before SIZE."""
    gate = gate_up_TI + row * row_stride * PACK + columns
    up = tl.load(gate + SIZE, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(gate, mask=here, other=0.0).to(tl.float32)
    return gate, up


@triton.jit(do_not_specialize=["row_stride"])
def _silu_mul_kernel(
    gate_up_TI,
    out_TI,
    row_stride,
    SIZE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """One program per tile of a row: writes silu(gate) * up."""
    row, columns, here = _tile_of_row(SIZE, BLOCK_VALUES)
    gate, up = _gate_and_up(gate_up_TI, row, row_stride, columns, here, SIZE, PACK)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_TI + row * SIZE + columns, narrowed(out, out_TI.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["grad_stride", "row_stride"])
def _silu_mul_backward_kernel(
    grad_TI,
    gate_up_TI,
    out_TI,
    grad_gate_up_TI,
    grad_stride,
    row_stride,
    SIZE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """One program per tile of a row: writes silu(gate) * up again, and the gradients of gate and up."""
    row, columns, here = _tile_of_row(SIZE, BLOCK_VALUES)
    grad = tl.load(grad_TI + row * grad_stride * PACK + columns, mask=here, other=0.0).to(tl.float32)
    gate, up = _gate_and_up(gate_up_TI, row, row_stride, columns, here, SIZE, PACK)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(out_TI + row * SIZE + columns, narrowed(silu * up, out_TI.dtype.element_ty), mask=here)
    out = grad_gate_up_TI + row * (2 * SIZE) + columns
    tl.store(out, narrowed(grad_gate, grad_gate_up_TI.dtype.element_ty), mask=here)
    tl.store(out + SIZE, narrowed(grad * silu, grad_gate_up_TI.dtype.element_ty), mask=here)
