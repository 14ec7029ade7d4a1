"""The language-model head on the CPU: torch's matrix products, with the library's softmax epilogues between them.

Tokens are processed in chunks whose logits fit a buffer (``chunk_size``). For each chunk, logits = hidden @ weight.T is
computed and one read of the logits gives the softmax statistics. If a gradient is needed, it is written over the logits
and multiplied with ``weight`` and ``hidden``: three matrix products in all. Two kinds of work are skipped:

- Tokens whose gradient is exactly zero: their rows are left out of the last two products. The result stays exact.
- With ``filter_eps``: columns whose softmax stays below it for all tokens of a block (``FILTER_BLOCK`` tokens) and
  that are not the target of any of them. The other columns are gathered for the products; the result is approximate.

A float32 batch of up to about twice as many tokens as fit the buffer is processed at once, in two halves of the
vocabulary (``native_halves``). ``native_weight_sum`` describes how the gradient of the weight is summed over chunks.
Memory beyond inputs and results does not grow with the number of tokens, except for a few numbers per token, and for
copies in ``head_gradients`` if some tokens have no gradient. The memory for logits is kept for the next call
(``native_logits_room``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from balcaprl.kernels.head.native_halves import gradients_by_halves, write_stats_of_halves
from balcaprl.kernels.head.native_logits_room import LogitsRoom
from balcaprl.kernels.head.native_weight_sum import WeightSum
from balcaprl.kernels.head.records import FILTER_BLOCK, Head, HeadGradients
from balcaprl.kernels.support.native_softmax import (
    SoftmaxRows,
    Tokens,
    gathered_gradient,
    marked_columns,
    write_gradient,
    write_stats,
)
from balcaprl.kernels.support.products import gapless

_LOGITS_BYTES = 40 << 20
"""Bytes for the logits of a chunk."""
_BUFFER_BYTES = 56 << 20
"""Bytes for the logits of a chunk and the gradients that wait for their products, together."""
_CHUNK_TOKENS = 512
"""Largest number of tokens in a chunk. Smaller chunks would mean slow products and more passes over the gradient of the
weight. Larger ones would gain nothing, and their logits would leave the cache between the product and the epilogue."""
_MAX_KEPT_SHARE = 0.4
"""With ``filter_eps``: if a larger share of the columns is kept, gathering them costs more than it saves."""
_GATHERED_BYTES = 12 << 20
"""Bytes for the rows of the weight that are gathered at a time."""


def logprobs_and_entropy(head: Head) -> tuple[SoftmaxRows, Tensor]:
    """Runs only the forward; returns the softmax rows and the (T,) float32 entropies."""
    num_tokens = head.hidden.shape[0]
    rows, entropy = SoftmaxRows.empty(num_tokens), torch.empty(num_tokens)
    with _ChunkRoom(head) as room:
        for chunk, logits in room.logits_of_chunks(head):
            write_stats(logits, head.targets[chunk], head.scale, rows.take(chunk), entropy[chunk])
    return rows, entropy


def logprobs_and_gradients(
    head: Head,
    gradient_of: Callable[[Tensor, int, int], Tensor],
    needs: tuple[bool, bool],
    filter_eps: float | None = None,
) -> tuple[SoftmaxRows, HeadGradients]:
    """Runs forward and backward in one sweep, for a loss that can be evaluated chunk by chunk.

    Args:
        head: inputs of the head.
        gradient_of: function that takes the (n,) log-probabilities of tokens [begin, end) and the numbers ``begin`` and
            ``end``, and returns the (n,) gradient of these log-probabilities. It is called once per chunk, in order.
        needs: whether hidden needs a gradient, and whether weight does.
        filter_eps: threshold of the filter, or None; see the module's docstring.
    """
    num_tokens = head.hidden.shape[0]
    rows, grad_logprobs = SoftmaxRows.empty(num_tokens), torch.empty(num_tokens)
    if _fits_by_halves(head, needs, filter_eps):
        every = Tokens(head.hidden, head.targets, rows, grad_logprobs)

        def look(halves: tuple[Tensor, Tensor]) -> None:
            write_stats_of_halves(halves, head, rows)
            grad_logprobs.copy_(gradient_of(rows.logprobs, 0, num_tokens))

        return rows, gradients_by_halves(head, every, needs[0], look)
    with _ChunkRoom(head) as room:
        sums = _Sums(head, needs, filter_eps, room)
        for chunk, logits in room.logits_of_chunks(head):
            tokens = Tokens(head.hidden[chunk], head.targets[chunk], rows.take(chunk), grad_logprobs[chunk])
            write_stats(logits, tokens.targets, head.scale, tokens.rows, None)
            tokens.grad_logprobs.copy_(gradient_of(tokens.rows.logprobs, chunk.start, chunk.stop))
            if any(needs):
                sums.add(chunk, logits, tokens)
            del logits  # a reference would keep the room's memory alive, which finish() may free
        return rows, sums.finish(Tokens(head.hidden, head.targets, rows, grad_logprobs))


def head_gradients(
    head: Head, rows: SoftmaxRows, grad_logprobs: Tensor, needs: tuple[bool, bool], filter_eps: float | None = None
) -> HeadGradients:
    """Runs only the backward, from the (T,) float32 gradient of the log-probabilities.

    Recomputes the logits of the tokens whose gradient is not zero; ``rows`` are the softmax rows of the forward.
    """
    every = Tokens(head.hidden, head.targets, rows, grad_logprobs)
    active = grad_logprobs.nonzero()[:, 0]
    tokens = every if active.shape[0] == grad_logprobs.shape[0] else every.take(active)
    result = _gradients_of(
        Head(tokens.hidden, head.weight, tokens.targets, head.temperature), tokens, needs, filter_eps
    )
    if tokens is every or result.hidden is None:
        return result
    grad_hidden = result.hidden.new_zeros(head.hidden.shape)
    return HeadGradients(grad_hidden.index_copy_(0, active, result.hidden), result.weight)


def _gradients_of(head: Head, tokens: Tokens, needs: tuple[bool, bool], filter_eps: float | None) -> HeadGradients:
    """Gradients of hidden and weight; ``tokens`` are those of ``head``, with softmax rows and gradients filled in."""
    if _fits_by_halves(head, needs, filter_eps):
        return gradients_by_halves(head, tokens, needs[0], lambda halves: None)
    with _ChunkRoom(head) as room:
        sums = _Sums(head, needs, filter_eps, room)
        for chunk, logits in room.logits_of_chunks(head):
            sums.add(chunk, logits, tokens.take(chunk))
            del logits
        return sums.finish(tokens)


def _fits_by_halves(head: Head, needs: tuple[bool, bool], filter_eps: float | None) -> bool:
    """Whether a batch that needs more than one chunk can use ``gradients_by_halves``.

    Only float32 can: in half precision the sum over the two halves would be rounded.
    """
    num_tokens, hidden_size = head.hidden.shape
    vocabulary, itemsize = head.weight.shape[0], head.weight.element_size()
    return (
        (needs[1] and filter_eps is None and itemsize == 4)
        and chunk_size(num_tokens, vocabulary, itemsize) < num_tokens <= min(_CHUNK_TOKENS, hidden_size)
        and num_tokens * (vocabulary - vocabulary // 2) * itemsize <= _LOGITS_BYTES
    )


def chunk_size(num_tokens: int, vocabulary: int, itemsize: int) -> int:
    """Number of tokens whose logits are computed at once.

    Chunks have about equal sizes; all but the last consist of whole filter blocks if they are longer than one.
    """
    most = _capacity(vocabulary, itemsize)
    if most > FILTER_BLOCK:
        most -= most % FILTER_BLOCK
    num_chunks = max(1, -(-num_tokens // most))
    size = -(-num_tokens // num_chunks)
    if most >= FILTER_BLOCK:
        size += -size % FILTER_BLOCK
    return max(1, min(size, num_tokens))


def _capacity(vocabulary: int, itemsize: int) -> int:
    """Number of tokens whose logits fit ``_LOGITS_BYTES``: at least 1 and at most ``_CHUNK_TOKENS``."""
    return max(1, min(_CHUNK_TOKENS, _LOGITS_BYTES // max(1, vocabulary * itemsize)))


class _ChunkRoom(LogitsRoom):
    """Room for the logits of a chunk, placed after gradients of earlier chunks that wait for their products.

    It holds up to one and three quarters of a chunk. If half of a batch's gradients are zero, logits can then be
    computed and gradients multiplied in whole chunks, whether the zeros are spread evenly or not. Unneeded pages stay
    untouched.
    """

    def __init__(self, head: Head) -> None:
        num_tokens, vocabulary, itemsize = head.hidden.shape[0], head.weight.shape[0], head.weight.element_size()
        self.chunk = chunk_size(num_tokens, vocabulary, itemsize)
        """Number of tokens in a chunk."""
        room = min(self.chunk + 3 * self.chunk // 4, _BUFFER_BYTES // max(1, vocabulary * itemsize), num_tokens)
        super().__init__(max(self.chunk, room), head.weight)
        self.waiting = 0
        """Number of rows, counted from the first, that hold waiting gradients."""

    @property
    def free_rows(self) -> int:
        """Number of rows that hold no waiting gradient."""
        return self.rows.shape[0] - self.waiting

    def logits_of_chunks(self, head: Head) -> Iterator[tuple[slice, Tensor]]:
        """Yields the token range of each chunk and its logits, in rows of this room.

        Before the next chunk, the consumer must make enough rows free for it.
        """
        num_tokens = head.hidden.shape[0]
        for begin in range(0, num_tokens, self.chunk):
            end = min(begin + self.chunk, num_tokens)
            out = self.rows[self.waiting : self.waiting + end - begin]
            yield slice(begin, end), torch.mm(head.hidden[begin:end], head.weight.T, out=out)


class _Sums:
    """Computes the gradients of hidden and weight from the logits of one chunk after another."""

    def __init__(self, head: Head, needs: tuple[bool, bool], filter_eps: float | None, room: _ChunkRoom) -> None:
        self.head = head
        self.filter_eps = filter_eps
        self.hidden = head.hidden.new_empty(head.hidden.shape) if needs[0] else None
        self.room = room
        block = room.chunk if filter_eps is None else min(room.chunk, FILTER_BLOCK)
        self.weight = WeightSum(head, -(-head.hidden.shape[0] // block)) if needs[1] else None
        self.waiting: list[Tensor] = []
        """Indices of the tokens whose gradients wait in the room, one tensor per chunk."""

    def add(self, chunk: slice, logits: Tensor, tokens: Tokens) -> None:
        """Adds the gradients of the tokens of a chunk, and overwrites their logits."""
        if self.filter_eps is None:
            self._add_waiting(chunk, logits, tokens)
            return
        for begin in range(0, logits.shape[0], FILTER_BLOCK):
            part = slice(begin, begin + FILTER_BLOCK)
            grad_hidden = None if self.hidden is None else self.hidden[chunk][part]
            self._add_block(logits[part], tokens.take(part), grad_hidden)

    def _add_waiting(self, chunk: slice, logits: Tensor, tokens: Tokens) -> None:
        """Puts a chunk's non-zero gradients in the room, where they wait for their products.

        All waiting gradients are multiplied when too few rows are free for the next chunk, and after the last chunk.
        Waiting keeps products large, and passes over the weight few, even if many tokens have a zero gradient.
        """
        active = tokens.grad_logprobs.nonzero()[:, 0]
        write_gradient(logits, 0, active, tokens, self.head.scale)
        if self.hidden is not None and active.shape[0] < logits.shape[0]:
            self.hidden[chunk].zero_()
        self.waiting.append(active + chunk.start)
        self.room.waiting += active.shape[0]
        left = self.head.hidden.shape[0] - chunk.stop
        if left == 0 or self.room.free_rows < min(left, self.room.chunk):
            self._multiply_waiting()

    def _multiply_waiting(self) -> None:
        index, grad_logits = torch.cat(self.waiting), self.room.rows[: self.room.waiting]
        self.waiting.clear()
        self.room.waiting = 0
        if index.shape[0] == 0:
            return
        first, last = int(index[0]), int(index[-1]) + 1
        if last - first == index.shape[0]:
            rows = slice(first, last)
            self._multiply(grad_logits, self.head.hidden[rows], None if self.hidden is None else self.hidden[rows])
            return
        out = None if self.hidden is None else self.hidden.new_empty(index.shape[0], self.hidden.shape[1])
        self._multiply(grad_logits, self.head.hidden[index], out)
        if self.hidden is not None and out is not None:
            self.hidden.index_copy_(0, index, out)

    def _multiply(self, grad_logits: Tensor, hidden: Tensor, grad_hidden: Tensor | None) -> None:
        if grad_hidden is not None:
            torch.mm(grad_logits, self.head.weight, out=grad_hidden)
        if self.weight is not None:
            self.weight.add(grad_logits, hidden)

    def _add_block(self, logits: Tensor, tokens: Tokens, grad_hidden: Tensor | None) -> None:
        """Adds the gradients of one filter block, and writes those of its hidden states to ``grad_hidden`` (n, D)."""
        active = tokens.grad_logprobs.nonzero()[:, 0]
        if active.shape[0] == logits.shape[0]:
            self._add_active(logits, active, tokens, tokens.hidden, grad_hidden)
            return
        if grad_hidden is not None:
            grad_hidden.zero_()
        if active.shape[0]:
            hidden = tokens.hidden[active]
            out = None if grad_hidden is None else torch.empty_like(hidden)
            self._add_active(logits, active, tokens, hidden, out)
            if grad_hidden is not None and out is not None:
                grad_hidden.index_copy_(0, active, out)

    def _add_active(
        self, logits: Tensor, active: Tensor, tokens: Tokens, hidden: Tensor, grad_hidden: Tensor | None
    ) -> None:
        """Adds the gradients of the active rows; ``hidden`` and ``grad_hidden`` contain only these rows."""
        if self.filter_eps is not None:
            columns = marked_columns(logits, active, tokens, self.head.scale, self.filter_eps)
            if columns.shape[0] <= _MAX_KEPT_SHARE * logits.shape[1]:
                grad_logits = gathered_gradient(logits, active, columns, tokens, self.head.scale)
                if grad_hidden is not None:
                    _mm_columns(grad_logits, self.head.weight, columns, grad_hidden)
                if self.weight is not None:
                    self.weight.add_columns(grad_logits, columns, hidden)
                return
        write_gradient(logits, 0, active, tokens, self.head.scale)
        self._multiply(logits[: active.shape[0]], hidden, grad_hidden)

    def finish(self, tokens: Tokens) -> HeadGradients:
        """Returns the gradients after the last chunk; ``tokens`` are all tokens of the head."""
        if self.weight is not None and self.weight.by_tiles:
            self.room.free()  # because the tiles need memory too
        return HeadGradients(self.hidden, None if self.weight is None else self.weight.finish(tokens))


def _mm_columns(grad_logits: Tensor, weight: Tensor, columns: Tensor, out: Tensor) -> None:
    """Computes out = grad_logits @ weight[columns] in pieces of bounded size."""
    pieces = columns.split(max(1, _GATHERED_BYTES // (weight.shape[1] * weight.element_size())))
    if len(pieces) == 1:
        torch.mm(grad_logits, weight.index_select(0, columns), out=out)
        return
    total, begin = torch.zeros(out.shape), 0
    for piece in pieces:
        first = gapless(grad_logits[:, begin : begin + piece.shape[0]])
        total += torch.mm(first, weight.index_select(0, piece))
        begin += piece.shape[0]
    out.copy_(total)
