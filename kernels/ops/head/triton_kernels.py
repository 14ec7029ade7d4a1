"""Triton kernels of the language-model head, forward and backward; ``triton.py`` launches them.

*Forward* (``_head_stats_kernel``): a program takes a tile of tokens and a share of the vocabulary. It computes the logits
tile by tile and keeps only each row's maximum, sum, entropy sum and target logit.

*Backward*: ``_head_grad_logits_kernel`` computes the logits of one slice of the vocabulary again and stores their
gradient. With ``filter_eps`` it also marks the tiles that matter, and ``_head_grad_hidden_kernel`` and
``_head_grad_weight_kernel`` multiply only these; without it torch computes both products. ``_head_scale_kernel`` applies
the gradient of the loss to finished gradients.

Sums over rows do not depend on the order in which programs run, so the same input gives the same bits. This module is
imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from balcaprl.kernels.support.triton_math import expm1_float32
from balcaprl.kernels.support.triton_products import narrowed, product

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _row_pointers(matrix, first_row, num_rows, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) pointers to the first BLOCK_D columns of the rows from ``first_row`` on.

    Rows past the end point to the last row, so that loads need no row mask. Offsets within a tile have 32 bits, which
    takes fewer registers.
    """
    local = tl.minimum(first_row + tl.arange(0, BLOCK), num_rows - 1) - first_row
    base = matrix + tl.cast(first_row, tl.int64) * stride
    return base + (local[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _logits_tile(
    hidden,
    weight,
    hidden_size,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """A tile of logits, (BLOCK_T, BLOCK_V) float32. ``hidden`` and ``weight`` point to the first BLOCK_D columns of the
    tile's rows."""
    total = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for begin in range(0, hidden_size, BLOCK_D):
        if EVEN_D:
            x = tl.load(hidden + begin)
            w = tl.load(weight + begin)
        else:
            inside = (begin + tl.arange(0, BLOCK_D) < hidden_size)[None, :]
            x = tl.load(hidden + begin, mask=inside, other=0.0)
            w = tl.load(weight + begin, mask=inside, other=0.0)
        total = product(x, tl.trans(w), total)
    return total


@triton.jit(do_not_specialize=["num_tokens", "share"])
def _head_stats_kernel(
    hidden_TD, weight_VD, targets_T, max_ST, sum_ST, weighted_ST, chosen_T,
    hidden_stride, weight_stride,
    num_tokens, hidden_size, vocabulary, share, scale,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens and share of the vocabulary: writes that share's online softmax statistics."""
    # All shares of one group of token tiles come before those of the next group, so few tokens are read at a time.
    token_tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    first_row = token_tile * BLOCK_T
    rows = first_row + tl.arange(0, BLOCK_T)
    in_rows = rows < num_tokens
    hidden = _row_pointers(hidden_TD, first_row, num_tokens, hidden_stride, BLOCK_T, BLOCK_D)
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    first = tl.program_id(1) * share
    for begin in range(first, tl.minimum(first + share, vocabulary), BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        in_columns = columns < vocabulary
        weight = _row_pointers(weight_VD, begin, vocabulary, weight_stride, BLOCK_V, BLOCK_D)
        logits = _logits_tile(hidden, weight, hidden_size, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
        logits = tl.where(in_columns[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        moved = (highest - higher) * scale
        differences = (logits - higher[:, None]) * scale
        exps = tl.exp2(differences * _LOG2E)
        shrink = tl.exp2(moved * _LOG2E)
        if WITH_ENTROPY:
            # ``before`` is the sum of exp(d) d over earlier tiles, corrected for the new maximum. exp(d) is 0 for d
            # below -200, so with d clamped there, a logit of -inf adds 0 instead of NaN.
            before = tl.where(sums > 0.0, shrink * (weighted + moved * sums), 0.0)
            weighted = before + tl.sum(exps * tl.maximum(differences, -200.0), axis=1)
        sums = sums * shrink + tl.sum(exps, axis=1)
        highest = higher
    out = tl.program_id(1).to(tl.int64) * num_tokens + rows
    tl.store(max_ST + out, highest, mask=in_rows)
    tl.store(sum_ST + out, sums, mask=in_rows)
    if WITH_ENTROPY:
        tl.store(weighted_ST + out, weighted, mask=in_rows)
    if tl.program_id(1) == 0:
        # Separate products for the targets' logits are cheaper than a search for the target in every tile. They use the
        # same instructions as above and give the same bits, so the difference from the log-sum-exp stays accurate where
        # a target is nearly certain.
        chosen = tl.zeros((BLOCK_T,), tl.float32)
        for begin in range(0, BLOCK_T, BLOCK_V):
            column_rows = first_row + begin + tl.arange(0, BLOCK_V)
            # Targets out of range are clamped here; ``triton._joined`` sets their log-probabilities to NaN.
            targets = tl.load(targets_T + column_rows, mask=column_rows < num_tokens, other=0)
            targets = tl.minimum(tl.maximum(targets, 0), vocabulary - 1)
            weight = weight_VD + (targets[:, None] * weight_stride + tl.arange(0, BLOCK_D)[None, :])
            logits = _logits_tile(hidden, weight, hidden_size, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
            chosen += tl.sum(tl.where(rows[:, None] == column_rows[None, :], logits, 0.0), axis=1)
        tl.store(chosen_T + rows, chosen, mask=in_rows)


@triton.jit
def _head_grad_logits_kernel(
    hidden_ND, weight_VD, targets_N, max_N, sum_N, logprobs_N, grad_logprobs_N, grad_logits_NV, active_tiles,
    hidden_stride, weight_stride,
    num_rows, hidden_size, first_column, num_columns, out_stride, scale, filter_eps,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, GROUP: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the logits for one tile of tokens and of the slice's columns. Programs are numbered so
    that all columns of ``GROUP`` tiles of tokens come before the next tokens."""
    number = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_T), tl.cdiv(num_columns, BLOCK_V)
    first_tile = number // (GROUP * column_tiles) * GROUP
    group_tiles = tl.minimum(row_tiles - first_tile, GROUP)
    row_tile = first_tile + number % (GROUP * column_tiles) % group_tiles
    column_tile = number % (GROUP * column_tiles) // group_tiles
    rows = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < num_rows
    local = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns = local < num_columns
    columns = first_column + local
    hidden = _row_pointers(hidden_ND, row_tile * BLOCK_T, num_rows, hidden_stride, BLOCK_T, BLOCK_D)
    first = first_column + column_tile * BLOCK_V
    weight = _row_pointers(weight_VD, first, first_column + num_columns, weight_stride, BLOCK_V, BLOCK_D)
    logits = _logits_tile(hidden, weight, hidden_size, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
    highest = tl.load(max_N + rows, mask=in_rows, other=0.0)
    sums = tl.load(sum_N + rows, mask=in_rows, other=1.0)
    gradient = tl.load(grad_logprobs_N + rows, mask=in_rows, other=0.0) * scale
    softmax = tl.exp2((logits - highest[:, None]) * scale * _LOG2E) * (1.0 / sums)[:, None]
    # 1 - p is computed as -expm1(log p), which stays accurate when p is near 1.
    at_target = -gradient * expm1_float32(tl.load(logprobs_N + rows, mask=in_rows, other=0.0))
    is_target = columns[None, :] == tl.load(targets_N + rows, mask=in_rows, other=-1)[:, None]
    values = tl.where(is_target, at_target[:, None], -gradient[:, None] * softmax)
    inside = in_rows[:, None] & in_columns[None, :]
    out = grad_logits_NV + rows.to(tl.int64)[:, None] * out_stride + local[None, :]
    if FILTER:
        kept = inside & (is_target | (softmax >= filter_eps))
        active = tl.max(tl.max(kept.to(tl.int32), axis=1), axis=0)
        tl.store(active_tiles + row_tile.to(tl.int64) * column_tiles + column_tile, active)
        if active != 0:
            tl.store(out, narrowed(values, grad_logits_NV.dtype.element_ty), mask=inside)
    else:
        tl.store(out, narrowed(values, grad_logits_NV.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _head_grad_hidden_kernel(
    grad_logits_NV, weight_VD, grad_hidden_ND, active_tiles,
    grad_stride, weight_stride,
    num_rows, hidden_size, first_column, num_columns, tiles_per_row,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr, TILE_V: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Computes grad_hidden = grad_logits @ weight[slice], or += with ``ADD``, from active tiles only. One program per
    tile of tokens and hidden columns."""
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < num_rows
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dims = dims < hidden_size
    steps = tl.arange(0, BLOCK_V)
    grad_logits = grad_logits_NV + rows.to(tl.int64)[:, None] * grad_stride + steps[None, :]
    tiles = active_tiles + tl.program_id(1) * BLOCK_T // TILE_T * tiles_per_row
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for begin in range(0, num_columns, BLOCK_V):
        if tl.load(tiles + begin // TILE_V) != 0:
            inside = begin + steps < num_columns
            dz = tl.load(grad_logits + begin, mask=in_rows[:, None] & inside[None, :], other=0.0)
            columns = first_column + begin + steps
            weight = weight_VD + columns.to(tl.int64)[:, None] * weight_stride + dims[None, :]
            w = tl.load(weight, mask=inside[:, None] & in_dims[None, :], other=0.0)
            total = product(dz, w, total)
    out = grad_hidden_ND + rows.to(tl.int64)[:, None] * hidden_size + dims[None, :]
    mask = in_rows[:, None] & in_dims[None, :]
    if ADD:
        total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, narrowed(total, grad_hidden_ND.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _head_grad_weight_kernel(
    grad_logits_NV, hidden_ND, grad_weight_VD, active_tiles,
    grad_stride, hidden_stride,
    num_rows, hidden_size, first_column, num_columns, tiles_per_row,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Computes grad_weight[slice] = grad_logits.T @ hidden from active tiles only. One program per tile of vocabulary
    and hidden columns."""
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns = local < num_columns
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dims = dims < hidden_size
    tiles = active_tiles + tl.program_id(1) * BLOCK_V // TILE_V
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for begin in range(0, num_rows, BLOCK_T):
        if tl.load(tiles + begin // TILE_T * tiles_per_row) != 0:
            rows = begin + tl.arange(0, BLOCK_T)
            in_rows = rows < num_rows
            out = grad_logits_NV + rows.to(tl.int64)[:, None] * grad_stride + local[None, :]
            dz = tl.load(out, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
            x = hidden_ND + rows.to(tl.int64)[:, None] * hidden_stride + dims[None, :]
            x = tl.load(x, mask=in_rows[:, None] & in_dims[None, :], other=0.0)
            total = product(tl.trans(dz), x, total)
    out = grad_weight_VD + (first_column + local).to(tl.int64)[:, None] * hidden_size + dims[None, :]
    tl.store(out, narrowed(total, grad_weight_VD.dtype.element_ty), mask=in_columns[:, None] & in_dims[None, :])


@triton.jit
def _head_scale_kernel(values_N, factor, num_values, BLOCK: tl.constexpr):
    """One program per block: multiplies values by the factor, in place, or does nothing if the factor is 1."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < num_values
        values = tl.load(values_N + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(values_N + at, narrowed(values * scale, values_N.dtype.element_ty), mask=mask)
