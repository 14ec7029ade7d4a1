"""The language-model head in Triton: log-probabilities without logits, and the gradients of hidden and weight.

Forward: a program takes a tile of tokens and a share of the vocabulary, and keeps maximum, sum, entropy's sum and the target's
logit of its rows while the tiles of logits pass by; the shares are joined afterwards. Nothing of size (T, V) exists.

Backward, for a slice of the vocabulary at a time (``_SLICE_BYTES``): compute its logits again and store their gradient in the
storage dtype; multiply that with the weight (added up over slices in float32) and with the hidden states (complete for
the slice). Tokens without gradient are left out by a list of those that have one. It and its length stay on the device: the
host never waits. With ``filter_eps`` the first kernel also notes which tiles matter, and the other two skip the rest.

Sums over rows do not depend on what ran first: same input, same bits. Imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.launch import launch, on_device
from balcaprl.kernels.native_head import Head, HeadGradients
from balcaprl.kernels.native_softmax import SoftmaxRows
from balcaprl.kernels.triton_math import expm1_float32
from balcaprl.kernels.triton_products import narrowed, product

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SLICE_BYTES = 128 << 20
# Enough programs to fill a large GPU a few times over when there are few tokens.
_WANTED_PROGRAMS = 592


@triton.jit
def _logits_tile(
    hidden_TD,
    weight_VD,
    rows,
    in_rows,
    columns,
    in_columns,
    hidden_stride,
    weight_stride,
    hidden_size,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_T, BLOCK_V) float32: the products of some hidden states with some rows of the weight."""
    steps = tl.arange(0, BLOCK_D)
    hidden = hidden_TD + rows.to(tl.int64)[:, None] * hidden_stride + steps[None, :]
    weight = weight_VD + columns.to(tl.int64)[:, None] * weight_stride + steps[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for begin in range(0, hidden_size, BLOCK_D):
        inside = (begin + steps < hidden_size)[None, :]
        x = tl.load(hidden + begin, mask=in_rows[:, None] & inside, other=0.0)
        w = tl.load(weight + begin, mask=in_columns[:, None] & inside, other=0.0)
        total = product(x, tl.trans(w), total)
    return total


@triton.jit
def _head_stats_kernel(
    hidden_TD,
    weight_VD,
    targets_T,
    max_ST,
    sum_ST,
    weighted_ST,
    chosen_ST,
    hidden_stride,
    weight_stride,
    num_tokens,
    hidden_size,
    vocabulary,
    share,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """One program per tile of tokens and share of the vocabulary: the online softmax of its tiles of logits."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < num_tokens
    targets = tl.load(targets_T + rows, mask=in_rows, other=-1)
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    chosen = tl.zeros((BLOCK_T,), tl.float32)
    first = tl.program_id(1) * share
    for begin in range(first, tl.minimum(first + share, vocabulary), BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        in_columns = columns < vocabulary
        logits = _logits_tile(
            hidden_TD,
            weight_VD,
            rows,
            in_rows,
            columns,
            in_columns,
            hidden_stride,
            weight_stride,
            hidden_size,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        chosen += tl.sum(tl.where(columns[None, :] == targets[:, None], logits, 0.0), axis=1)
        logits = tl.where(in_columns[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        moved = (highest - higher) * scale
        differences = (logits - higher[:, None]) * scale
        exps = tl.exp2(differences * _LOG2E)
        shrink = tl.exp2(moved * _LOG2E)
        if WITH_ENTROPY:
            # exp(d) d over the tiles so far, with their maximum moved. Below -200 exp(d) is 0: -inf adds 0, not NaN.
            before = tl.where(sums > 0.0, shrink * (weighted + moved * sums), 0.0)
            weighted = before + tl.sum(exps * tl.maximum(differences, -200.0), axis=1)
        sums = sums * shrink + tl.sum(exps, axis=1)
        highest = higher
    out = tl.program_id(1).to(tl.int64) * num_tokens + rows
    tl.store(max_ST + out, highest, mask=in_rows)
    tl.store(sum_ST + out, sums, mask=in_rows)
    tl.store(chosen_ST + out, chosen, mask=in_rows)
    if WITH_ENTROPY:
        tl.store(weighted_ST + out, weighted, mask=in_rows)


@triton.jit
def _head_grad_logits_kernel(
    hidden_TD,
    weight_VD,
    targets_T,
    max_T,
    sum_T,
    logprobs_T,
    grad_logprobs_T,
    rows_N,
    num_rows,
    grad_logits_NV,
    active_tiles,
    hidden_stride,
    weight_stride,
    hidden_size,
    first_column,
    num_columns,
    out_stride,
    scale,
    filter_eps,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FILTER: tl.constexpr,
):
    """One program per tile of listed tokens and of the slice's columns; tiles come tokens first: they share the weight."""
    position = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    count = tl.load(num_rows)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    in_rows = position < count
    rows = tl.load(rows_N + position, mask=in_rows, other=0)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns = local < num_columns
    columns = first_column + local
    logits = _logits_tile(
        hidden_TD,
        weight_VD,
        rows,
        in_rows,
        columns,
        in_columns,
        hidden_stride,
        weight_stride,
        hidden_size,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
    )
    highest = tl.load(max_T + rows, mask=in_rows, other=0.0)
    sums = tl.load(sum_T + rows, mask=in_rows, other=1.0)
    gradient = tl.load(grad_logprobs_T + rows, mask=in_rows, other=0.0) * scale
    softmax = tl.exp2((logits - highest[:, None]) * scale * _LOG2E) * (1.0 / sums)[:, None]
    # 1 - p by way of expm1: near p = 1 it keeps its digits.
    at_target = -gradient * expm1_float32(tl.load(logprobs_T + rows, mask=in_rows, other=0.0))
    is_target = columns[None, :] == tl.load(targets_T + rows, mask=in_rows, other=-1)[:, None]
    values = tl.where(is_target, at_target[:, None], -gradient[:, None] * softmax)
    inside = in_rows[:, None] & in_columns[None, :]
    out = grad_logits_NV + position.to(tl.int64)[:, None] * out_stride + local[None, :]
    if FILTER:
        kept = inside & (is_target | (softmax >= filter_eps))
        active = tl.max(tl.max(kept.to(tl.int32), axis=1), axis=0)
        tl.store(active_tiles + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), active)
        if active != 0:
            tl.store(out, narrowed(values, grad_logits_NV.dtype.element_ty), mask=inside)
    else:
        tl.store(out, narrowed(values, grad_logits_NV.dtype.element_ty), mask=inside)


@triton.jit
def _head_grad_hidden_kernel(
    grad_logits_NV,
    weight_VD,
    rows_N,
    num_rows,
    grad_hidden_TD,
    active_tiles,
    grad_stride,
    weight_stride,
    hidden_size,
    first_column,
    num_columns,
    tiles_per_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_V: tl.constexpr,
    FILTER: tl.constexpr,
    ADD: tl.constexpr,
):
    """grad_hidden[rows] = or += grad_logits @ weight[slice]; one program per tile of listed tokens and of the hidden size."""
    position = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    count = tl.load(num_rows)
    if tl.program_id(1) * BLOCK_T >= count:
        return
    in_rows = position < count
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dims = dims < hidden_size
    steps = tl.arange(0, BLOCK_V)
    grad_logits = grad_logits_NV + position.to(tl.int64)[:, None] * grad_stride + steps[None, :]
    tiles = active_tiles + tl.program_id(1) * BLOCK_T // TILE_T * tiles_per_row
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for begin in range(0, num_columns, BLOCK_V):
        inside = begin + steps < num_columns
        active = True
        if FILTER:
            active = tl.load(tiles + begin // TILE_V) != 0
        if active:
            dz = tl.load(grad_logits + begin, mask=in_rows[:, None] & inside[None, :], other=0.0)
            columns = first_column + begin + steps
            weight = weight_VD + columns.to(tl.int64)[:, None] * weight_stride + dims[None, :]
            w = tl.load(weight, mask=inside[:, None] & in_dims[None, :], other=0.0)
            total = product(dz, w, total)
    rows = tl.load(rows_N + position, mask=in_rows, other=0)
    out = grad_hidden_TD + rows.to(tl.int64)[:, None] * hidden_size + dims[None, :]
    mask = in_rows[:, None] & in_dims[None, :]
    if ADD:
        total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, narrowed(total, grad_hidden_TD.dtype.element_ty), mask=mask)


@triton.jit
def _head_grad_weight_kernel(
    grad_logits_NV,
    hidden_TD,
    rows_N,
    num_rows,
    grad_weight_VD,
    active_tiles,
    grad_stride,
    hidden_stride,
    hidden_size,
    first_column,
    num_columns,
    tiles_per_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_V: tl.constexpr,
    FILTER: tl.constexpr,
):
    """grad_weight[slice] = grad_logits.T @ hidden[rows]; one program per tile of columns and of the hidden size."""
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns = local < num_columns
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dims = dims < hidden_size
    count = tl.load(num_rows)
    tiles = active_tiles + tl.program_id(1) * BLOCK_V // TILE_V
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for begin in range(0, count, BLOCK_T):
        position = begin + tl.arange(0, BLOCK_T)
        in_rows = position < count
        active = True
        if FILTER:
            active = tl.load(tiles + begin // TILE_T * tiles_per_row) != 0
        if active:
            rows = tl.load(rows_N + position, mask=in_rows, other=0)
            out = grad_logits_NV + position.to(tl.int64)[:, None] * grad_stride + local[None, :]
            dz = tl.load(out, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
            x = hidden_TD + rows.to(tl.int64)[:, None] * hidden_stride + dims[None, :]
            x = tl.load(x, mask=in_rows[:, None] & in_dims[None, :], other=0.0)
            total = product(tl.trans(dz), x, total)
    out = grad_weight_VD + (first_column + local).to(tl.int64)[:, None] * hidden_size + dims[None, :]
    tl.store(out, narrowed(total, grad_weight_VD.dtype.element_ty), mask=in_columns[:, None] & in_dims[None, :])


def logprobs_and_entropy(head: Head, *, with_entropy: bool = True) -> tuple[SoftmaxRows, Tensor]:
    """Rows and (T,) float32 entropies (zeros without ``with_entropy``). A target outside of [0, V) gives NaN."""
    hidden, weight = _rows_contiguous(head.hidden), _rows_contiguous(head.weight)
    (num_tokens, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    row = launch("_head_stats_kernel", hidden.device, hidden.dtype)
    token_tiles = triton.cdiv(num_tokens, row.blocks["BLOCK_T"])
    column_tiles = triton.cdiv(vocabulary, row.blocks["BLOCK_V"])
    shares = max(1, min(column_tiles, _WANTED_PROGRAMS // max(token_tiles, 1)))
    share = triton.cdiv(column_tiles, shares) * row.blocks["BLOCK_V"]
    shares = triton.cdiv(vocabulary, share)
    parts = hidden.new_zeros(4, shares, num_tokens, dtype=torch.float32)
    if num_tokens:
        with on_device(hidden.device):
            _head_stats_kernel[(token_tiles, shares)](
                hidden,
                weight,
                head.targets,
                *parts,
                hidden.stride(0),
                weight.stride(0),
                num_tokens,
                hidden_size,
                vocabulary,
                share,
                head.scale,
                WITH_ENTROPY=with_entropy,
                **row.kwargs(),
            )
    return _joined(parts, head, with_entropy)


def _joined(parts: Tensor, head: Head, with_entropy: bool) -> tuple[SoftmaxRows, Tensor]:
    """One row of statistics out of the (4, shares, T) of the shares."""
    highest, sums, weighted, chosen = parts
    row_max = highest.amax(dim=0)
    moved = (highest - row_max) * head.scale
    shrink = moved.exp()
    row_sum = (sums * shrink).sum(dim=0)
    inside = (head.targets >= 0) & (head.targets < head.weight.shape[0])
    log_sum = row_sum.log()
    logprobs = torch.where(inside, (chosen.sum(dim=0) - row_max) * head.scale - log_sum, torch.nan)
    entropy = torch.zeros_like(log_sum)
    if with_entropy:
        # A share whose sum underflows moves by so much that its product with 0 must be 0.
        terms = torch.where(shrink > 0.0, shrink * (weighted + moved * sums), 0.0)
        entropy = (log_sum - terms.sum(dim=0) / row_sum).clamp(min=0.0)
    return SoftmaxRows(row_max, row_sum, logprobs), entropy


def head_gradients(
    head: Head, rows: SoftmaxRows, grad_logprobs: Tensor, needs: tuple[bool, bool], filter_eps: float | None = None
) -> HeadGradients:
    """The gradients of hidden and weight, from the (T,) float32 gradient of the log-probabilities; no host sync."""
    hidden, weight = _rows_contiguous(head.hidden), _rows_contiguous(head.weight)
    (num_tokens, _), vocabulary = hidden.shape, weight.shape[0]
    has_gradient = grad_logprobs != 0
    listed = torch.nonzero_static(has_gradient, size=num_tokens, fill_value=0)[:, 0]
    work = _Backward(head, hidden, weight, rows, grad_logprobs, listed, has_gradient.sum(dtype=torch.int32), filter_eps)
    slice_columns = work.slice_columns()
    one_slice = slice_columns >= vocabulary
    grad_weight = weight.new_empty(weight.shape) if needs[1] else None
    grad_hidden = None
    if needs[0]:
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=hidden.dtype if one_slice else torch.float32)
    if num_tokens == 0:
        return HeadGradients(grad_hidden, None if grad_weight is None else grad_weight.zero_())
    with on_device(hidden.device):
        for first in range(0, vocabulary, slice_columns):
            work.run(first, min(slice_columns, vocabulary - first), grad_hidden, grad_weight)
    return HeadGradients(None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight)


class _Backward:
    """The three launches of a slice of the vocabulary."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        weight: Tensor,
        rows: SoftmaxRows,
        grad_logprobs: Tensor,
        listed: Tensor,
        num_listed: Tensor,
        filter_eps: float | None,
    ) -> None:
        self.head, self.hidden, self.weight = head, hidden, weight
        self.per_token = (head.targets, *rows, grad_logprobs)
        self.listed, self.num_listed = listed, num_listed
        self.filter_eps = filter_eps
        names = ("_head_grad_logits_kernel", "_head_grad_hidden_kernel", "_head_grad_weight_kernel")
        self.logits_row, self.hidden_row, self.weight_row = (launch(n, hidden.device, hidden.dtype) for n in names)
        self.tile_t, self.tile_v = (self.logits_row.blocks[name] for name in ("BLOCK_T", "BLOCK_V"))

    def slice_columns(self) -> int:
        """Columns whose gradients take about ``_SLICE_BYTES``: whole tiles."""
        columns = _SLICE_BYTES // (max(1, self.hidden.shape[0]) * self.hidden.element_size())
        return max(self.tile_v, columns - columns % self.tile_v)

    def run(self, first: int, num_columns: int, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> None:
        """Gradients of columns [first, first + num_columns)."""
        num_tokens, hidden_size = self.hidden.shape
        tiles = (triton.cdiv(num_tokens, self.tile_t), triton.cdiv(num_columns, self.tile_v))
        # Rows that a thread may read 16 bytes at a time.
        stride = triton.cdiv(num_columns, 16) * 16
        grad_logits = self.hidden.new_empty(num_tokens, stride)
        active = self.listed.new_empty(tiles if self.filter_eps is not None else 1, dtype=torch.int32)
        listed = (self.listed, self.num_listed)
        filtered = self.filter_eps is not None
        _head_grad_logits_kernel[tiles](
            self.hidden,
            self.weight,
            *self.per_token,
            *listed,
            grad_logits,
            active,
            self.hidden.stride(0),
            self.weight.stride(0),
            hidden_size,
            first,
            num_columns,
            stride,
            self.head.scale,
            self.filter_eps or 0.0,
            FILTER=filtered,
            **self.logits_row.kwargs(),
        )
        constants = {"TILE_T": self.tile_t, "TILE_V": self.tile_v, "FILTER": filtered}
        sizes = (hidden_size, first, num_columns, tiles[1])
        if grad_hidden is not None:
            blocks = self.hidden_row.blocks
            grid = (triton.cdiv(hidden_size, blocks["BLOCK_D"]), triton.cdiv(num_tokens, blocks["BLOCK_T"]))
            pointers = (grad_logits, self.weight, *listed, grad_hidden, active, stride, self.weight.stride(0))
            add = {"ADD": first > 0}
            _head_grad_hidden_kernel[grid](*pointers, *sizes, **constants, **add, **self.hidden_row.kwargs())
        if grad_weight is not None:
            blocks = self.weight_row.blocks
            grid = (triton.cdiv(hidden_size, blocks["BLOCK_D"]), triton.cdiv(num_columns, blocks["BLOCK_V"]))
            pointers = (grad_logits, self.hidden, *listed, grad_weight, active, stride, self.hidden.stride(0))
            _head_grad_weight_kernel[grid](*pointers, *sizes, **constants, **self.weight_row.kwargs())


def _rows_contiguous(matrix: Tensor) -> Tensor:
    """``matrix``, or a copy whose rows are contiguous and do not overlap in a way that strides cannot say."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
