"""The Triton kernels of ``adamw_update``; ``triton.py`` says what they do together and launches them.

This module is imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from balcaprl.kernels.adamw.records import CLIP_EPS
from balcaprl.kernels.support.triton_products import narrowed

# Columns of table_T8: five addresses, then two bias corrections as float64; the eighth column pads a row to 64 bytes.
_GRADIENT: tl.constexpr = tl.constexpr(0)
_PARAMETER: tl.constexpr = tl.constexpr(1)
_MASTER: tl.constexpr = tl.constexpr(2)
_EXP_AVG: tl.constexpr = tl.constexpr(3)
_EXP_AVG_SQ: tl.constexpr = tl.constexpr(4)
FIRST: tl.constexpr = tl.constexpr(5)
_SECOND: tl.constexpr = tl.constexpr(6)
COLUMNS: tl.constexpr = tl.constexpr(8)
# Elements of norms_4.
_GRADIENT_NORM: tl.constexpr = tl.constexpr(0)
_WEIGHT_NORM: tl.constexpr = tl.constexpr(1)
_DIRECTION_NORM: tl.constexpr = tl.constexpr(2)
_CLIP: tl.constexpr = tl.constexpr(3)
_CLIP_EPS: tl.constexpr = tl.constexpr(CLIP_EPS)
_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the element ``start`` of a tensor; ``ALIGNED`` promises the compiler a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(pointer, lanes, count, MASKED: tl.constexpr):
    """Values at ``lanes`` in float32; with ``MASKED``, lanes from ``count`` on are 0."""
    if MASKED:
        values = tl.load(pointer + lanes, mask=lanes < count, other=0.0)
    else:
        values = tl.load(pointer + lanes)
    return values.to(tl.float32)


@triton.jit
def _write(pointer, lanes, values, count, MASKED: tl.constexpr):
    """Writes ``values`` at ``lanes``, rounded to the pointer's type; with ``MASKED``, only at lanes below ``count``."""
    rounded = narrowed(values, pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + lanes, rounded, mask=lanes < count)
    else:
        tl.store(pointer + lanes, rounded)


@triton.jit
def _sum_of_squares(pointer, count, BLOCK: tl.constexpr):
    """Sum of the squares of ``count`` values, in float64."""
    sums = tl.zeros((BLOCK,), tl.float32)
    full = count - count % BLOCK
    for begin in range(0, full, BLOCK):
        values = _read(pointer, begin + tl.arange(0, BLOCK), count, False)
        sums += values * values
    values = _read(pointer, full + tl.arange(0, BLOCK), count, True)
    sums += values * values
    return tl.sum(sums.to(tl.float64), axis=0)


@triton.jit
def _norm(sums_C, num_chunks, BLOCK_C: tl.constexpr):
    """Square root of the sum of all chunks' sums; infinite if the sum is beyond the range of float32."""
    sums = tl.zeros((BLOCK_C,), tl.float64)
    for begin in range(0, num_chunks, BLOCK_C):
        chunks = begin + tl.arange(0, BLOCK_C)
        sums += tl.load(sums_C + chunks, mask=chunks < num_chunks, other=0.0)
    total = tl.sum(sums, axis=0)
    return tl.where(total > _LARGEST, float("inf"), tl.sqrt(total))


@triton.jit
def _step(
    gradient,
    exp_avg,
    exp_avg_sq,
    first,
    second,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
):
    """New moments, and what is subtracted from the weights at a learning rate of 1, without decay. ``gradient`` is the
    clipped gradient."""
    if BETA1 > 0.5:  # this form is exact if the moment equals the gradient, the other one also if beta1 is 0
        mean = exp_avg + (1.0 - BETA1) * (gradient - exp_avg)
    else:
        mean = gradient + BETA1 * (exp_avg - gradient)
    square = BETA2 * exp_avg_sq + (1.0 - BETA2) * (gradient * gradient)
    return mean, square, tl.div_rn(mean * first, tl.sqrt_rn(square) * second + EPS)


@triton.jit(do_not_specialize=["begin", "num_chunks"])
def _adamw_squares_kernel(
    table_T8,
    chunks_C3,
    sums_2C,
    begin,
    num_chunks,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i writes the sums of squares of chunk i's gradients and weights to column ``begin`` + i."""
    chunk = tl.program_id(0)
    row = table_T8 + tl.load(chunks_C3 + 3 * chunk) * COLUMNS
    start = tl.load(chunks_C3 + 3 * chunk + 1)
    count = tl.load(chunks_C3 + 3 * chunk + 2).to(tl.int32)
    address = tl.load(row + _GRADIENT)
    squares = tl.full((), 0.0, tl.float64)
    if address != 0:
        squares = _sum_of_squares(_pointer(address, start, GRADIENT, ALIGNED), count, BLOCK)
    tl.store(sums_2C + begin + chunk, squares)
    master = _pointer(tl.load(row + _MASTER), start, tl.float32, ALIGNED)
    tl.store(sums_2C + num_chunks + begin + chunk, _sum_of_squares(master, count, BLOCK))


@triton.jit(do_not_specialize=["num_chunks"])
def _adamw_norms_kernel(sums_2C, norms_4, num_chunks, max_grad_norm, DIRECTION: tl.constexpr, BLOCK_C: tl.constexpr):
    """A single program: writes the norm of row 0 with ``DIRECTION``, else both rows' norms and the clip factor."""
    if DIRECTION:
        tl.store(norms_4 + _DIRECTION_NORM, _norm(sums_2C, num_chunks, BLOCK_C))
    else:
        gradient = _norm(sums_2C, num_chunks, BLOCK_C)
        tl.store(norms_4 + _GRADIENT_NORM, gradient)
        tl.store(norms_4 + _WEIGHT_NORM, _norm(sums_2C + num_chunks, num_chunks, BLOCK_C))
        # A comparison with NaN is false, so NaN stays NaN.
        clip = max_grad_norm / (gradient + _CLIP_EPS)
        tl.store(norms_4 + _CLIP, tl.where(clip > 1.0, 1.0, clip))


@triton.jit
def _clipped_step(
    gradient_pointer,
    exp_avg_pointer,
    exp_avg_sq_pointer,
    lanes,
    count,
    clip,
    first,
    second,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``_step`` for the values at ``lanes``; with ``MASKED``, lanes from ``count`` on subtract 0."""
    gradient = _read(gradient_pointer, lanes, count, MASKED) * clip
    exp_avg = _read(exp_avg_pointer, lanes, count, MASKED)
    exp_avg_sq = _read(exp_avg_sq_pointer, lanes, count, MASKED)
    mean, square, direction = _step(gradient, exp_avg, exp_avg_sq, first, second, BETA1, BETA2, EPS)
    if MASKED:
        direction = tl.where(lanes < count, direction, 0.0)
    return mean, square, direction


@triton.jit(do_not_specialize=["begin"])
def _adamw_direction_kernel(
    table_T8,
    corrections_T8,
    chunks_C3,
    norms_4,
    sums_2C,
    begin,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk: writes the sum of squares of what ``_step`` subtracts from the weights."""
    chunk = tl.program_id(0)
    number = tl.load(chunks_C3 + 3 * chunk) * COLUMNS
    start = tl.load(chunks_C3 + 3 * chunk + 1)
    count = tl.load(chunks_C3 + 3 * chunk + 2).to(tl.int32)
    address = tl.load(table_T8 + number + _GRADIENT)
    total = tl.full((), 0.0, tl.float64)
    if address != 0:
        clip = tl.load(norms_4 + _CLIP).to(tl.float32)
        first = tl.load(corrections_T8 + number + FIRST).to(tl.float32)
        second = tl.load(corrections_T8 + number + _SECOND).to(tl.float32)
        gradient = _pointer(address, start, GRADIENT, ALIGNED)
        exp_avg = _pointer(tl.load(table_T8 + number + _EXP_AVG), start, tl.float32, ALIGNED)
        exp_avg_sq = _pointer(tl.load(table_T8 + number + _EXP_AVG_SQ), start, tl.float32, ALIGNED)
        sums = tl.zeros((BLOCK,), tl.float32)
        full = count - count % BLOCK
        for offset in range(0, full, BLOCK):
            lanes = offset + tl.arange(0, BLOCK)
            _, _, direction = _clipped_step(
                gradient, exp_avg, exp_avg_sq, lanes, count, clip, first, second, BETA1, BETA2, EPS, False
            )
            sums += direction * direction
        lanes = full + tl.arange(0, BLOCK)
        _, _, direction = _clipped_step(
            gradient, exp_avg, exp_avg_sq, lanes, count, clip, first, second, BETA1, BETA2, EPS, True
        )
        sums += direction * direction
        total = tl.sum(sums.to(tl.float64), axis=0)
    tl.store(sums_2C + begin + chunk, total)


@triton.jit
def _apply_at(
    gradient,
    parameter,
    master,
    exp_avg,
    exp_avg_sq,
    lanes,
    count,
    clip,
    first,
    second,
    lr,
    decay,
    HAS_MASTER: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Updates the values at ``lanes``; all other arguments are pointers or scalars."""
    mean, square, direction = _clipped_step(
        gradient, exp_avg, exp_avg_sq, lanes, count, clip, first, second, BETA1, BETA2, EPS, MASKED
    )
    weights = _read(master, lanes, count, MASKED) * decay - lr * direction
    _write(exp_avg, lanes, mean, count, MASKED)
    _write(exp_avg_sq, lanes, square, count, MASKED)
    _write(master, lanes, weights, count, MASKED)
    if HAS_MASTER:
        _write(parameter, lanes, weights, count, MASKED)


@triton.jit
def _adamw_apply_kernel(
    table_T8,
    corrections_T8,
    chunks_C3,
    norms_4,
    lr,
    decay,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk: updates moments, master and parameter in place; does nothing without a gradient."""
    chunk = tl.program_id(0)
    number = tl.load(chunks_C3 + 3 * chunk) * COLUMNS
    start = tl.load(chunks_C3 + 3 * chunk + 1)
    count = tl.load(chunks_C3 + 3 * chunk + 2).to(tl.int32)
    row = table_T8 + number
    address = tl.load(row + _GRADIENT)
    if address != 0:
        gradient = _pointer(address, start, GRADIENT, ALIGNED)
        parameter = _pointer(tl.load(row + _PARAMETER), start, PARAMETER, ALIGNED)
        master = _pointer(tl.load(row + _MASTER), start, tl.float32, ALIGNED)
        exp_avg = _pointer(tl.load(row + _EXP_AVG), start, tl.float32, ALIGNED)
        exp_avg_sq = _pointer(tl.load(row + _EXP_AVG_SQ), start, tl.float32, ALIGNED)
        clip = tl.load(norms_4 + _CLIP).to(tl.float32)
        first = tl.load(corrections_T8 + number + FIRST).to(tl.float32)
        second = tl.load(corrections_T8 + number + _SECOND).to(tl.float32)
        full = count - count % BLOCK
        for offset in range(0, full, BLOCK):
            _apply_at(
                gradient,
                parameter,
                master,
                exp_avg,
                exp_avg_sq,
                offset + tl.arange(0, BLOCK),
                count,
                clip,
                first,
                second,
                lr,
                decay,
                HAS_MASTER,
                BETA1,
                BETA2,
                EPS,
                False,
            )
        _apply_at(
            gradient,
            parameter,
            master,
            exp_avg,
            exp_avg_sq,
            full + tl.arange(0, BLOCK),
            count,
            clip,
            first,
            second,
            lr,
            decay,
            HAS_MASTER,
            BETA1,
            BETA2,
            EPS,
            True,
        )
