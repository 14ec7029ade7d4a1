"""The language-model head on a GPU, forward and backward in one sweep: torch's matrix products, Triton's epilogues.

Tokens are processed in chunks whose logits and gradient of the logits together fit ``_CHUNK_BYTES``. The steps for one
chunk are:

1. A matrix product computes the float32 logits = hidden @ weight.T.
2. One read of the logits gives each token's maximum, sum of exponentials and log-probability (``SoftmaxRows``).
3. The loss gives the gradient of each token's log-probability.
4. One read and one write give the gradient of the logits in the storage dtype, for the tokens that have a gradient.
5. Two matrix products turn it into the gradients of hidden and weight.

A chunk takes three matrix products. ``triton.py`` needs a fourth because it computes the logits twice, but takes less
memory. The two products of step 5 are launched only after step 3 of the next chunk, so that the GPU always has work
while the host waits for the number of that chunk's tokens with a gradient. With ``listed=False`` no token is left out
and the host does not wait.

The gradient of the weight is added up over chunks in the storage dtype and rounded once per chunk, so ``_MAX_CHUNKS``
limits the number of chunks. This module is imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from balcaprl.kernels.head.records import Head, HeadGradients
from balcaprl.kernels.loss import triton_logits
from balcaprl.kernels.support.native_softmax import SoftmaxRows
from balcaprl.kernels.support.products import gapless
from balcaprl.kernels.support.triton_products import float32_product

_CHUNK_BYTES = 1 << 30
"""Bytes for a chunk's float32 logits and their gradient."""
_MAX_CHUNKS = 16
"""Each chunk rounds the gradient of the weight once; with at most 16 roundings its error stays within the tests' bounds
relative to the reference."""
_TILE_TOKENS = 128
"""Chunks above this number of tokens are multiples of it, because torch's matrix products use tiles of that size."""


def chunk_size(num_tokens: int, vocabulary: int, itemsize: int) -> int | None:
    """Number of tokens per chunk; None if the tokens would need more than ``_MAX_CHUNKS`` chunks."""
    most = _CHUNK_BYTES // (max(1, vocabulary) * (4 + itemsize))
    most = max(1, most - most % _TILE_TOKENS if most > _TILE_TOKENS else most)
    num_chunks = max(1, -(-num_tokens // most))
    if num_chunks > _MAX_CHUNKS:
        return None
    size = -(-num_tokens // num_chunks)
    return min(most, -(-size // _TILE_TOKENS) * _TILE_TOKENS)


def logprobs_and_gradients(
    head: Head,
    gradient_of: Callable[[Tensor, int, int], Tensor],
    needs: tuple[bool, bool],
    size: int,
    *,
    listed: bool = True,
) -> tuple[SoftmaxRows, HeadGradients]:
    """Runs forward and backward in one sweep, for a function of the log-probabilities whose gradient can be computed
    chunk by chunk.

    Args:
        head: the head. A target outside of [0, V) gives a log-probability of NaN.
        gradient_of: function that takes the (n,) log-probabilities of tokens [begin, end) and the numbers ``begin`` and
            ``end``, and returns their gradient, (n,) float32. It is called once per chunk, in order.
        needs: whether hidden needs a gradient, and whether weight does.
        size: number of tokens per chunk.
        listed: whether to leave tokens without a gradient out of steps 4 and 5; the host then waits once per chunk for
            their number.
    """
    sums = _Sums(head, needs)
    one = head.hidden.new_ones((), dtype=torch.float32)
    parts, waiting = [], None
    for begin in range(0, head.hidden.shape[0], size):
        chunk = slice(begin, min(begin + size, head.hidden.shape[0]))
        targets, logits = head.targets[chunk], float32_product(head.hidden[chunk], head.weight.T)
        parts.append(triton_logits.stats(logits, targets, head.scale))
        grad_logprobs = gradient_of(parts[-1].logprobs, chunk.start, chunk.stop)
        found = _Listed(grad_logprobs) if listed else None
        # The previous chunk's products keep the GPU busy until the host knows how many tokens of this chunk are listed.
        if waiting is not None:
            sums.add(*waiting)
            waiting = None  # frees the previous gradient, so that this chunk's gradient can reuse its memory
        tokens = None if found is None else found.tokens()
        grad_logits = _empty_rows(head.hidden, len(logits if tokens is None else tokens), logits.shape[1])
        triton_logits.gradient(logits, targets, parts[-1], grad_logprobs, one, head.scale, grad_logits, tokens)
        waiting = (chunk, tokens, gapless(grad_logits))
        del logits, grad_logits  # so that the next chunk can reuse their memory
    if waiting is not None:
        sums.add(*waiting)
    return SoftmaxRows(*(torch.cat(each) for each in zip(*parts, strict=True))), sums.finish()


class _Listed:
    """The tokens of a chunk that have a gradient. The device finds them while the host continues."""

    def __init__(self, grad_logprobs: Tensor) -> None:
        is_zero = grad_logprobs == 0.0
        # A stable sort puts tokens that have a gradient first and keeps them in order.
        self._order = is_zero.byte().argsort(stable=True)
        count = is_zero.numel() - is_zero.sum()
        self._count, self._copied = count, None
        if count.is_cuda:
            self._count = torch.empty((), dtype=count.dtype, pin_memory=True)
            self._count.copy_(count, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tokens(self) -> Tensor | None:
        """The tokens, (n,) int64 ascending, or None if every token has a gradient. Waits until the device has counted
        them, but not for work that was launched after that."""
        if self._copied is not None:
            self._copied.synchronize()
        count = int(self._count)
        return None if count == len(self._order) else self._order[:count]


class _Sums:
    """Collects the gradients of hidden (T, D) and weight (V, D) over the chunks, if they are needed."""

    def __init__(self, head: Head, needs: tuple[bool, bool]) -> None:
        self.head = head
        self.hidden, self.weight = (
            torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
            for x, needed in zip((head.hidden, head.weight), needs, strict=True)
        )
        self.weight_is_empty = True

    def add(self, chunk: slice, tokens: Tensor | None, grad_logits: Tensor) -> None:
        """Adds a chunk's share, given the gradients (n, V) of the logits of its listed ``tokens``, which are indices
        within the chunk."""
        hidden = self.head.hidden[chunk]
        if self.hidden is not None:
            self._write_hidden(self.hidden[chunk], tokens, grad_logits)
        if self.weight is not None and grad_logits.shape[0]:
            hidden = hidden if tokens is None else hidden.index_select(0, tokens)
            if self.weight_is_empty:
                torch.mm(grad_logits.T, hidden, out=self.weight)
            else:
                self.weight.addmm_(grad_logits.T, hidden)
            self.weight_is_empty = False

    def _write_hidden(self, out: Tensor, tokens: Tensor | None, grad_logits: Tensor) -> None:
        if tokens is None:
            torch.mm(grad_logits, self.head.weight, out=out)
        else:
            out.zero_().index_copy_(0, tokens, grad_logits @ self.head.weight)

    def finish(self) -> HeadGradients:
        """The finished gradients; call it after the last chunk."""
        if self.weight is not None and self.weight_is_empty:
            self.weight.zero_()
        return HeadGradients(self.hidden, self.weight)


def _empty_rows(like: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """An uninitialised (num_rows, num_columns) tensor with rows aligned for threads that write 16 bytes at a time."""
    return like.new_empty(num_rows, -(-num_columns // 16) * 16)[:, :num_columns]
