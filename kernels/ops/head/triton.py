"""The language-model head in Triton: log-probabilities without stored logits, and the gradients of hidden and weight.

Forward: a program takes a tile of tokens and a share of the vocabulary. It computes the logits tile by tile and keeps
only each row's maximum, sum, entropy sum and target logit. The shares are joined afterwards. No tensor of size (T, V)
exists.

Backward: tokens without gradient are left out first; the host waits for their number, and for nothing else. The
vocabulary is then taken in slices (``_SLICE_BYTES``). For each slice, the logits are computed again and their gradient
is stored in the storage dtype. Two matrix products turn it into the gradient of hidden, which is summed over slices in
float32, and the gradient of the slice's weight. Torch computes these two products: on an H200 torch takes 13 ms for
each, while our kernels took 15 and 24 ms (T 8192, D 3584, V 152,064, bfloat16). With ``filter_eps``, the kernel that
computes the gradient of the logits also marks the tiles that matter, and our own product kernels skip the others.

Programs are numbered so that those that run at the same time read few different rows of the hidden states and of the
weight. The rows they share stay in the L2 cache (``_TOKEN_TILES``).

Sums over rows do not depend on the order in which programs run, so the same input gives the same bits. This module is
imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.head.native import Head, HeadGradients
from balcaprl.kernels.support.launch import Launch, launch, on_device
from balcaprl.kernels.support.native_softmax import SoftmaxRows
from balcaprl.kernels.support.products import gapless
from balcaprl.kernels.support.triton_math import expm1_float32
from balcaprl.kernels.support.triton_products import float32_product, narrowed, product

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SLICE_BYTES = 128 << 20
_TOKEN_TILES = 8
"""Number of token tiles that are worked on at the same time."""
_WANTED_PROGRAMS = 128
"""Number of programs that the forward aims for on a CPU, where no GPU tells its number of streaming multiprocessors."""


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
    hidden_TD,
    weight_VD,
    targets_T,
    max_ST,
    sum_ST,
    weighted_ST,
    chosen_T,
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
    EVEN_D: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """One program per tile of tokens and share of the vocabulary: writes that share's online softmax statistics."""
    # Programs take all shares of one group of token tiles before the next group, so few tokens are read at a time.
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
            # ``before`` is the sum of exp(d) d over earlier tiles, corrected for the new maximum. Below -200 exp(d) is
            # 0, so clamping d there makes a logit of -inf add 0 instead of NaN.
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
        # same instructions as above and give the same bits, so the difference from the log-sum-exp keeps its digits
        # where a target is nearly certain.
        chosen = tl.zeros((BLOCK_T,), tl.float32)
        for begin in range(0, BLOCK_T, BLOCK_V):
            column_rows = first_row + begin + tl.arange(0, BLOCK_V)
            # Targets out of range are clamped here; ``_joined`` sets their log-probabilities to NaN.
            targets = tl.load(targets_T + column_rows, mask=column_rows < num_tokens, other=0)
            targets = tl.minimum(tl.maximum(targets, 0), vocabulary - 1)
            weight = weight_VD + (targets[:, None] * weight_stride + tl.arange(0, BLOCK_D)[None, :])
            logits = _logits_tile(hidden, weight, hidden_size, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
            chosen += tl.sum(tl.where(rows[:, None] == column_rows[None, :], logits, 0.0), axis=1)
        tl.store(chosen_T + rows, chosen, mask=in_rows)


@triton.jit
def _head_grad_logits_kernel(
    hidden_ND,
    weight_VD,
    targets_N,
    max_N,
    sum_N,
    logprobs_N,
    grad_logprobs_N,
    grad_logits_NV,
    active_tiles,
    hidden_stride,
    weight_stride,
    num_rows,
    hidden_size,
    first_column,
    num_columns,
    out_stride,
    scale,
    filter_eps,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    GROUP: tl.constexpr,
    FILTER: tl.constexpr,
):
    """Writes the gradient of the logits for one tile of tokens and of the slice's columns. Programs go through the
    columns for ``GROUP`` tiles of tokens at a time."""
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
    # 1 - p is computed with expm1, which keeps its digits near p = 1.
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
    grad_logits_NV,
    weight_VD,
    grad_hidden_ND,
    active_tiles,
    grad_stride,
    weight_stride,
    num_rows,
    hidden_size,
    first_column,
    num_columns,
    tiles_per_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_V: tl.constexpr,
    ADD: tl.constexpr,
):
    """Computes grad_hidden = grad_logits @ weight[slice], or += with ADD, from active tiles only. One program per tile
    of tokens and hidden columns."""
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
    grad_logits_NV,
    hidden_ND,
    grad_weight_VD,
    active_tiles,
    grad_stride,
    hidden_stride,
    num_rows,
    hidden_size,
    first_column,
    num_columns,
    tiles_per_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_V: tl.constexpr,
):
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


def logprobs_and_entropy(head: Head, *, with_entropy: bool = True) -> tuple[SoftmaxRows, Tensor]:
    """Softmax rows and (T,) float32 entropies (zeros without ``with_entropy``).

    A target outside of [0, V) gives a log-probability of NaN.
    """
    hidden, weight = _rows_contiguous(head.hidden), _rows_contiguous(head.weight)
    (num_tokens, hidden_size), vocabulary = hidden.shape, weight.shape[0]
    row = launch("_head_stats_kernel", hidden.device, hidden.dtype)
    token_tiles = triton.cdiv(num_tokens, row.blocks["BLOCK_T"])
    column_tiles = triton.cdiv(vocabulary, row.blocks["BLOCK_V"])
    group_tiles = triton.cdiv(token_tiles, max(1, triton.cdiv(token_tiles, _TOKEN_TILES)))
    shares = max(1, min(column_tiles, _wanted_programs(hidden.device) // max(group_tiles, 1)))
    share = triton.cdiv(column_tiles, shares) * row.blocks["BLOCK_V"]
    shares = triton.cdiv(vocabulary, share)
    parts = hidden.new_zeros(3, shares, num_tokens, dtype=torch.float32)
    chosen = hidden.new_empty(num_tokens, dtype=torch.float32)
    if num_tokens:
        with on_device(hidden.device):
            _head_stats_kernel[(group_tiles, shares, triton.cdiv(token_tiles, group_tiles))](
                hidden,
                weight,
                head.targets,
                *parts,
                chosen,
                hidden.stride(0),
                weight.stride(0),
                num_tokens,
                hidden_size,
                vocabulary,
                share,
                head.scale,
                EVEN_D=hidden_size % row.blocks["BLOCK_D"] == 0,
                WITH_ENTROPY=with_entropy,
                **row.kwargs(),
            )
    return _joined(parts, chosen, head, with_entropy)


def _joined(parts: Tensor, chosen: Tensor, head: Head, with_entropy: bool) -> tuple[SoftmaxRows, Tensor]:
    """Softmax rows and entropies from the shares' statistics (3, shares, T) and the targets' logits (T,)."""
    highest, sums, weighted = parts
    row_max = highest.amax(dim=0)
    moved = (highest - row_max) * head.scale
    shrink = moved.exp()
    row_sum = (sums * shrink).sum(dim=0)
    inside = (head.targets >= 0) & (head.targets < head.weight.shape[0])
    log_sum = row_sum.log()
    logprobs = torch.where(inside, (chosen - row_max) * head.scale - log_sum, torch.nan)
    entropy = torch.zeros_like(log_sum)
    if with_entropy:
        # A share whose ``shrink`` underflows to 0 must add 0, even if its ``moved`` is -inf.
        terms = torch.where(shrink > 0.0, shrink * (weighted + moved * sums), 0.0)
        entropy = (log_sum - terms.sum(dim=0) / row_sum).clamp(min=0.0)
    return SoftmaxRows(row_max, row_sum, logprobs), entropy


def head_gradients(
    head: Head, rows: SoftmaxRows, grad_logprobs: Tensor, needs: tuple[bool, bool], filter_eps: float | None = None
) -> HeadGradients:
    """The gradients of hidden and weight, from the (T,) float32 gradient of the log-probabilities."""
    hidden, weight = _rows_contiguous(head.hidden), _rows_contiguous(head.weight)
    per_token = (head.targets, *rows, grad_logprobs)
    listed = grad_logprobs.nonzero()[:, 0]
    whole = listed.shape[0] == hidden.shape[0]
    if not whole:
        hidden, *per_token = (x.index_select(0, listed) for x in (hidden, *per_token))  # type: ignore[assignment]
    work = _Backward(head.scale, hidden, weight, tuple(per_token), filter_eps)
    with on_device(hidden.device):
        grad_hidden, grad_weight = work.gradients(needs)
    if grad_hidden is not None and not whole:
        grad_hidden = head.hidden.new_zeros(head.hidden.shape).index_copy_(0, listed, grad_hidden)
    return HeadGradients(grad_hidden, grad_weight)


class _Backward:
    """Computes the gradients of hidden and weight from the N tokens whose log-probability has a nonzero gradient."""

    def __init__(
        self, scale: float, hidden: Tensor, weight: Tensor, per_token: tuple[Tensor, ...], filter_eps: float | None
    ) -> None:
        self.scale, self.hidden, self.weight = scale, hidden, weight
        self.per_token = per_token
        """The five (N,) tensors targets, max, sum and logprobs of the softmax rows, and grad_logprobs."""
        self.filter_eps = filter_eps
        self.row = self._row("logits")
        self.tile_t, self.tile_v = (self.row.blocks[name] for name in ("BLOCK_T", "BLOCK_V"))

    def gradients(self, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden (N, D) and weight (V, D); a gradient that is not needed may be None."""
        (num_rows, hidden_size), vocabulary = self.hidden.shape, self.weight.shape[0]
        grad_weight = self.weight.new_empty(vocabulary, hidden_size) if needs[1] else None
        if num_rows == 0:
            return self.hidden.new_empty(0, hidden_size), None if grad_weight is None else grad_weight.zero_()
        grad_hidden = None
        columns = self._slice_columns()
        for first in range(0, vocabulary, columns):
            last = min(first + columns, vocabulary)
            grad_logits, active = self._grad_logits(first, last - first)
            if needs[0]:
                whole = last - first == vocabulary
                grad_hidden = self._grad_hidden(grad_hidden, grad_logits, active, first, last, whole)
            if grad_weight is not None:
                self._grad_weight(grad_weight, grad_logits, active, first, last)
        return None if grad_hidden is None else grad_hidden.to(self.hidden.dtype), grad_weight

    def _slice_columns(self) -> int:
        """Number of columns per slice: whole tiles, whose gradients of the logits take about ``_SLICE_BYTES``."""
        columns = _SLICE_BYTES // (self.hidden.shape[0] * self.hidden.element_size())
        return max(self.tile_v, columns - columns % self.tile_v)

    def _row(self, name: str) -> Launch:
        return launch(f"_head_grad_{name}_kernel", self.hidden.device, self.hidden.dtype)

    def _grad_logits(self, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
        """The gradient of the logits (N, num_columns) from column ``first`` on, and with ``filter_eps`` which of its
        tiles are active."""
        num_rows, hidden_size = self.hidden.shape
        tiles = (triton.cdiv(num_rows, self.tile_t), triton.cdiv(num_columns, self.tile_v))
        # Rows are aligned so that a thread can read 16 bytes at a time.
        stride = triton.cdiv(num_columns, 16) * 16
        grad_logits = self.hidden.new_empty(num_rows, stride)
        filtered = self.filter_eps is not None
        active = torch.empty(tiles if filtered else (1, 1), dtype=torch.int32, device=self.hidden.device)
        _head_grad_logits_kernel[(tiles[0] * tiles[1],)](
            self.hidden,
            self.weight,
            *self.per_token,
            grad_logits,
            active,
            self.hidden.stride(0),
            self.weight.stride(0),
            num_rows,
            hidden_size,
            first,
            num_columns,
            stride,
            self.scale,
            self.filter_eps or 0.0,
            EVEN_D=hidden_size % self.row.blocks["BLOCK_D"] == 0,
            GROUP=_TOKEN_TILES,
            FILTER=filtered,
            **self.row.kwargs(),
        )
        return gapless(grad_logits[:, :num_columns]), active

    def _grad_hidden(
        self, total: Tensor | None, grad_logits: Tensor, active: Tensor, first: int, last: int, whole: bool
    ) -> Tensor:
        """Adds the part of columns [first, last) to ``total`` (None means 0) and returns the sum, which is float32
        unless these columns are the whole vocabulary."""
        weight = self.weight[first:last]
        if self.filter_eps is None:
            return grad_logits @ weight if whole else float32_product(grad_logits, weight, total)
        num_rows, hidden_size = self.hidden.shape
        out = total
        if out is None:
            out = self.hidden.new_empty(num_rows, hidden_size, dtype=self.hidden.dtype if whole else torch.float32)
        row = self._row("hidden")
        grid = (triton.cdiv(hidden_size, row.blocks["BLOCK_D"]), triton.cdiv(num_rows, row.blocks["BLOCK_T"]))
        pointers = (grad_logits, self.weight, out, active, grad_logits.stride(0), self.weight.stride(0))
        sizes = (num_rows, hidden_size, first, last - first, active.shape[1])
        constants = {"TILE_T": self.tile_t, "TILE_V": self.tile_v, "ADD": total is not None}
        _head_grad_hidden_kernel[grid](*pointers, *sizes, **constants, **row.kwargs())
        return out

    def _grad_weight(self, out: Tensor, grad_logits: Tensor, active: Tensor, first: int, last: int) -> None:
        """Writes the gradient of the weight's rows [first, last) to ``out``."""
        if self.filter_eps is None:
            torch.mm(grad_logits.T, self.hidden, out=out[first:last])
            return
        num_rows, hidden_size = self.hidden.shape
        row = self._row("weight")
        grid = (triton.cdiv(hidden_size, row.blocks["BLOCK_D"]), triton.cdiv(last - first, row.blocks["BLOCK_V"]))
        pointers = (grad_logits, self.hidden, out, active, grad_logits.stride(0), self.hidden.stride(0))
        sizes = (num_rows, hidden_size, first, last - first, active.shape[1])
        constants = {"TILE_T": self.tile_t, "TILE_V": self.tile_v}
        _head_grad_weight_kernel[grid](*pointers, *sizes, **constants, **row.kwargs())


def _wanted_programs(device: torch.device) -> int:
    """Number of programs to aim for: one per streaming multiprocessor, because the launch tables' tiles leave no room
    for a second."""
    if device.type != "cuda":
        return _WANTED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows_contiguous(matrix: Tensor) -> Tensor:
    """``matrix``, or a contiguous copy if the elements of its rows are not contiguous."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
