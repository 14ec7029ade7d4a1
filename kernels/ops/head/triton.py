"""The language-model head in Triton: log-probabilities without stored logits, and the gradients of hidden and weight.

``triton_kernels`` has the kernels; this module launches them and does the rest with torch.

Forward: each program computes the logits of a tile of tokens and a share of the vocabulary, and keeps only a few
numbers per row. The shares' numbers are joined afterwards. No tensor of size (T, V) exists.

Backward: tokens without a gradient are left out first; the host waits for their number, and for nothing else. The
vocabulary is then processed in slices (``_SLICE_BYTES``). For each slice, the logits are computed again and their
gradient is stored in the storage dtype. Two matrix products turn it into the gradient of hidden, which is summed over
slices in float32, and the gradient of the slice's weight. Torch computes these two products: on an H200 torch takes
13 ms for each, while our kernels took 15 and 24 ms (T 8192, D 3584, V 152,064, bfloat16). With ``filter_eps``, the
kernel that computes the gradient of the logits also marks the tiles that matter, and our own product kernels skip the
others.

Programs are numbered so that those that run at the same time share most rows of the hidden states and of the weight,
which then stay in the L2 cache (``_TOKEN_TILES``).

This module is imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from balcaprl.kernels.head.records import Head, HeadGradients
from balcaprl.kernels.head.triton_kernels import (
    _head_grad_hidden_kernel,
    _head_grad_logits_kernel,
    _head_grad_weight_kernel,
    _head_scale_kernel,
    _head_stats_kernel,
)
from balcaprl.kernels.support.launch import Launch, launch, on_device
from balcaprl.kernels.support.native_softmax import SoftmaxRows
from balcaprl.kernels.support.products import gapless
from balcaprl.kernels.support.triton_products import float32_product

_SLICE_BYTES = 128 << 20
"""Bytes for the gradient of the logits of a slice of the vocabulary."""
_TOKEN_TILES = 8
"""Number of token tiles that are worked on at the same time."""
_WANTED_PROGRAMS = 128
"""Number of programs that the forward aims for on a CPU, which has no streaming multiprocessors to count."""


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
        """The gradient (N, num_columns) of the logits from column ``first`` on, and a flag for each of its tiles: with
        ``filter_eps`` whether it is active, otherwise uninitialised."""
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
        """Adds the share of columns [first, last) to ``total`` (None means 0) and returns the sum, which is float32
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


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiplies contiguous ``values`` of any shape in place by ``factor``, one element on their device; returns them.

    The product is computed in float32. With a factor of 1 the values are neither read nor written.
    """
    num_values = values.numel()
    row = launch("_head_scale_kernel", values.device, values.dtype)
    if num_values:
        with on_device(values.device):
            _head_scale_kernel[(triton.cdiv(num_values, row.blocks["BLOCK"]),)](
                values, factor, num_values, **row.kwargs()
            )
    return values


def _wanted_programs(device: torch.device) -> int:
    """Number of programs to aim for: one per streaming multiprocessor, because with the launch tables' tiles no second
    one fits."""
    if device.type != "cuda":
        return _WANTED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows_contiguous(matrix: Tensor) -> Tensor:
    """``matrix``, or a contiguous copy if the elements of its rows are not contiguous."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
