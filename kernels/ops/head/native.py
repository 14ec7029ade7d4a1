"""The language-model head on the CPU: torch's matrix products, with the library's softmax epilogues between them.

Tokens are processed in chunks whose logits fit a buffer (``chunk_size``). For each chunk, logits = hidden @ weight.T is
computed and one read of the logits gives the softmax statistics. If a gradient is needed, it is written over the logits
and multiplied with ``weight`` and ``hidden``: three matrix products in all. Two kinds of work are skipped:

- Tokens whose gradient is exactly zero: their rows are left out of the last two products. The result stays exact.
- With ``filter_eps``: columns whose softmax stays below it for all tokens of a block (``FILTER_BLOCK`` tokens) and
  that are not the target of any of them. The other columns are gathered for the products; the result is approximate.

A float32 batch of up to about twice as many tokens as fit the buffer is processed at once, in two halves of the
vocabulary (``_gradients_by_halves``). ``_WeightSum`` describes how the gradient of the weight is summed over chunks.
Memory beyond inputs and results does not grow with the number of tokens, except for a few numbers per token. The
memory for logits is kept for the next call until ``release_scratch`` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.support.native_softmax import (
    SoftmaxRows,
    Tokens,
    gathered_gradient,
    marked_columns,
    write_gradient,
    write_stats,
)
from balcaprl.kernels.support.products import gapless

FILTER_BLOCK = 128
"""Number of tokens in a block; ``filter_eps`` keeps or drops a column for all tokens of a block together."""

_LOGITS_BYTES = 40 << 20
# The logits of a chunk, plus the gradients that wait for their products.
_BUFFER_BYTES = 56 << 20
# Fewer tokens would make slow products and more passes over the gradient of the weight. More tokens would gain nothing,
# and their logits would leave the cache between the product and the epilogue.
_CHUNK_TOKENS = 512
_TILE_BYTES = 12 << 20
_TILE_COLUMNS = 4096
_POOL_BYTES = 8 << 20
_MAX_HALF_SUMS = 2
_PAGE_BYTES = 4096
_MOST_SCRATCH_BYTES = 64 << 20
# If a larger share of the columns is kept, gathering them costs more than it saves.
_MAX_KEPT_SHARE = 0.4


class Head(NamedTuple):
    """Inputs of the head: logits = hidden @ weight.T / temperature, and the target of each token."""

    hidden: Tensor
    """(T, D) hidden states, laid out as ``gapless`` returns them."""
    weight: Tensor
    """(V, D) weight of the head."""
    targets: Tensor
    """(T,) int64 target ids, contiguous."""
    temperature: float

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Head:
        """Makes a head from tensors of any layout."""
        return cls(gapless(hidden), weight, targets.contiguous(), temperature)

    @property
    def scale(self) -> float:
        """The factor 1 / temperature of the logits."""
        return 1.0 / self.temperature


class HeadGradients(NamedTuple):
    """Gradients of hidden and weight in their dtype, contiguous; None for a gradient that is not needed."""

    hidden: Tensor | None
    weight: Tensor | None


def chunk_size(num_tokens: int, vocabulary: int, itemsize: int) -> int:
    """Number of tokens whose logits are computed at once.

    Chunks have about equal sizes; a chunk longer than ``FILTER_BLOCK`` consists of whole filter blocks.
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


def logprobs_and_entropy(head: Head) -> tuple[SoftmaxRows, Tensor]:
    """Runs only the forward; returns the softmax rows and the (T,) float32 entropies."""
    num_tokens = head.hidden.shape[0]
    rows, entropy = SoftmaxRows.empty(num_tokens), torch.empty(num_tokens)
    with closing(_Buffer(head)) as buffer:
        for chunk, logits in _logits_of_chunks(head, buffer):
            write_stats(logits, head.targets[chunk], head.scale, rows.take(chunk), entropy[chunk])
    return rows, entropy


def logprobs_and_gradients(
    head: Head,
    gradient_of: Callable[[Tensor, int, int], Tensor],
    needs: tuple[bool, bool],
    filter_eps: float | None = None,
) -> tuple[SoftmaxRows, HeadGradients]:
    """Forward and backward in one sweep, for a loss that can be evaluated chunk by chunk.

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
            _write_stats_of_halves(halves, head, rows)
            grad_logprobs.copy_(gradient_of(rows.logprobs, 0, num_tokens))

        return rows, _gradients_by_halves(head, every, needs[0], look)
    sums = _Sums(head, needs, filter_eps)
    for chunk, logits in _logits_of_chunks(head, sums.buffer):
        tokens = Tokens(head.hidden[chunk], head.targets[chunk], rows.take(chunk), grad_logprobs[chunk])
        write_stats(logits, tokens.targets, head.scale, tokens.rows, None)
        tokens.grad_logprobs.copy_(gradient_of(tokens.rows.logprobs, chunk.start, chunk.stop))
        if any(needs):
            sums.add(chunk, logits, tokens)
        del logits  # a reference would keep the buffer's memory alive while finish() needs it for the weight
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
        return _gradients_by_halves(head, tokens, needs[0], lambda halves: None)
    sums = _Sums(head, needs, filter_eps)
    for chunk, logits in _logits_of_chunks(head, sums.buffer):
        sums.add(chunk, logits, tokens.take(chunk))
        del logits
    return sums.finish(tokens)


def _fits_by_halves(head: Head, needs: tuple[bool, bool], filter_eps: float | None) -> bool:
    """Whether a batch that needs more than one chunk can use ``_gradients_by_halves``.

    Only float32 can: in half precision the sum over the two halves would be rounded.
    """
    num_tokens, hidden_size = head.hidden.shape
    vocabulary, itemsize = head.weight.shape[0], head.weight.element_size()
    return (
        (needs[1] and filter_eps is None and itemsize == 4)
        and chunk_size(num_tokens, vocabulary, itemsize) < num_tokens <= min(_CHUNK_TOKENS, hidden_size)
        and num_tokens * (vocabulary - vocabulary // 2) * itemsize <= _LOGITS_BYTES
    )


def _gradients_by_halves(
    head: Head, tokens: Tokens, needs_hidden: bool, look: Callable[[tuple[Tensor, Tensor]], None]
) -> HeadGradients:
    """Computes the gradients of all tokens at once, with extra memory for only half of their logits.

    The products are larger than those of chunks, and nothing is summed over chunks. The logits of the first half of the
    vocabulary are stored in the memory of the second half of the weight's gradient, which is written last. They fit
    because there are no more tokens than columns of ``weight``.

    Args:
        head: inputs of the head.
        tokens: all tokens of ``head``; softmax rows and gradients may be empty until ``look`` has returned.
        needs_hidden: whether hidden needs a gradient.
        look: function that gets both halves of the logits before their gradient overwrites them; it must fill in
            what is missing in ``tokens``.
    """
    num_tokens, middle = head.hidden.shape[0], head.weight.shape[0] // 2
    grad_weight = torch.empty_like(head.weight)
    spare = _room_for_logits(num_tokens, grad_weight[:middle], grad_weight[middle:].view(-1))
    scratch = _take_scratch(head.weight, _numbers_of_logits(num_tokens, head.weight[middle:]))
    first = torch.mm(head.hidden, head.weight[:middle].T, out=spare)
    second = torch.mm(
        head.hidden, head.weight[middle:].T, out=_room_for_logits(num_tokens, head.weight[middle:], scratch)
    )
    look((first, second))
    active = tokens.grad_logprobs.nonzero()[:, 0]
    write_gradient(first, 0, active, tokens, head.scale)
    write_gradient(second, middle, active, tokens, head.scale)
    first, second = first[: active.shape[0]], second[: active.shape[0]]
    every = active.shape[0] == num_tokens
    hidden, grad_hidden = head.hidden if every else head.hidden[active], None
    if needs_hidden:
        grad_hidden = torch.mm(first, head.weight[:middle]).addmm_(second, head.weight[middle:])
        if not every:
            grad_hidden = torch.zeros_like(head.hidden).index_copy_(0, active, grad_hidden)
    torch.mm(first.T, hidden, out=grad_weight[:middle])
    torch.mm(second.T, hidden, out=grad_weight[middle:])
    _keep_scratch(scratch)
    return HeadGradients(grad_hidden, grad_weight)


def _write_stats_of_halves(halves: tuple[Tensor, Tensor], head: Head, rows: SoftmaxRows) -> None:
    """Writes the softmax rows of the whole vocabulary from the statistics of its two halves."""
    vocabulary, middle = head.weight.shape[0], halves[0].shape[1]
    if ((head.targets < 0) | (head.targets >= vocabulary)).any():
        raise ValueError(f"targets: expected token ids in [0, {vocabulary})")
    own_targets = head.targets.clamp(max=middle - 1), (head.targets - middle).clamp(min=0)
    parts = [SoftmaxRows.empty(head.targets.shape[0]) for _ in halves]
    for logits, targets, part in zip(halves, own_targets, parts, strict=True):
        write_stats(logits, targets, head.scale, part, None)
    torch.maximum(parts[0].max, parts[1].max, out=rows.max)
    sums = [part.sum * ((part.max.double() - rows.max) * head.scale).exp() for part in parts]
    total = sums[0] + sums[1]
    rows.sum.copy_(total)
    # A probability within a half becomes one within the vocabulary when multiplied by the half's share of the sum.
    logprobs = [part.logprobs + (each / total).log() for part, each in zip(parts, sums, strict=True)]
    rows.logprobs.copy_(torch.where(head.targets < middle, logprobs[0], logprobs[1]))


def _numbers_of_logits(num_tokens: int, weight: Tensor) -> int:
    """How many numbers ``_room_for_logits`` needs."""
    return num_tokens * _row_distance(weight)


def _row_distance(weight: Tensor) -> int:
    """Distance between the rows of logits, in numbers: V, plus a small gap if a row fills whole pages.

    Without the gap, products of such a matrix take a twentieth longer, because the numbers of a column compete for the
    same few cache lines.
    """
    vocabulary, itemsize = weight.shape[0], weight.element_size()
    return vocabulary + (_PAGE_BYTES // (16 * itemsize) if vocabulary * itemsize % _PAGE_BYTES == 0 else 0)


def _room_for_logits(num_tokens: int, weight: Tensor, spare: Tensor) -> Tensor:
    """An uninitialised (num_tokens, V) view of ``spare`` for the logits of ``weight`` (V, D).

    ``spare`` is one-dimensional with at least num_tokens * V numbers; if it is too small for the gaps of
    ``_row_distance``, the rows are adjacent. Gaps between 16-bit rows are zeroed, because products may read them (see
    ``products``).
    """
    vocabulary, distance = weight.shape[0], _row_distance(weight)
    if num_tokens * distance > spare.shape[0]:
        distance = vocabulary
    rows = spare[: num_tokens * distance].view(num_tokens, distance)
    if weight.element_size() == 2:
        rows[:, vocabulary:].zero_()
    return rows[:, :vocabulary]


_kept_scratch: list[Tensor] = []


def release_scratch() -> None:
    """Frees the kept memory for logits; the next call allocates new memory."""
    _kept_scratch.clear()


def _take_scratch(like: Tensor, count: int) -> Tensor:
    """An uninitialised (count,) tensor of the dtype of ``like``, in memory that an earlier call kept if it suffices.

    Touching new pages takes as long as the softmax of all numbers that the pages hold.
    """
    num_bytes = count * like.element_size()
    try:
        scratch = _kept_scratch.pop()  # removed from the list, so that another thread cannot use the same memory
    except IndexError:
        scratch = None
    if scratch is None or scratch.untyped_storage().nbytes() < num_bytes:
        return like.new_empty(count)
    return like.new_empty(0).set_(scratch.untyped_storage(), 0, (count,), (1,))


def _keep_scratch(scratch: Tensor) -> None:
    """Keeps memory for the next call, unless it is too large; only one piece of memory is kept."""
    if scratch.untyped_storage().nbytes() <= _MOST_SCRATCH_BYTES:
        _kept_scratch[:] = [scratch]


class _Buffer:
    """Memory for the logits of a chunk, placed after gradients of earlier chunks that wait for their products.

    The buffer holds up to one and three quarter chunks. A batch with half of its gradients zero can then be computed
    and multiplied in whole chunks, whether its zeros are spread evenly or not. Unneeded pages are never touched.
    """

    def __init__(self, head: Head) -> None:
        num_tokens, vocabulary, itemsize = head.hidden.shape[0], head.weight.shape[0], head.weight.element_size()
        self.chunk = chunk_size(num_tokens, vocabulary, itemsize)
        room = min(self.chunk + 3 * self.chunk // 4, _BUFFER_BYTES // max(1, vocabulary * itemsize), num_tokens)
        most = max(self.chunk, room)
        self._scratch = _take_scratch(head.weight, _numbers_of_logits(most, head.weight))
        self.rows = _room_for_logits(most, head.weight, self._scratch)
        self.waiting = 0
        """Number of rows at the front that hold waiting gradients."""

    @property
    def room(self) -> int:
        """Number of free rows."""
        return self.rows.shape[0] - self.waiting

    def close(self) -> None:
        """Keeps the memory for the next call; no row may be used afterwards."""
        _keep_scratch(self._scratch)


def _logits_of_chunks(head: Head, buffer: _Buffer) -> Iterator[tuple[slice, Tensor]]:
    """Yields the token range of each chunk and its logits in ``buffer``.

    Before the next chunk, the consumer must make enough rows of ``buffer`` free for it.
    """
    num_tokens = head.hidden.shape[0]
    for begin in range(0, num_tokens, buffer.chunk):
        end = min(begin + buffer.chunk, num_tokens)
        out = buffer.rows[buffer.waiting : buffer.waiting + end - begin]
        yield slice(begin, end), torch.mm(head.hidden[begin:end], head.weight.T, out=out)


class _Sums:
    """Computes the gradients of hidden and weight from the logits of one chunk after another."""

    def __init__(self, head: Head, needs: tuple[bool, bool], filter_eps: float | None) -> None:
        self.head = head
        self.filter_eps = filter_eps
        self.hidden = head.hidden.new_empty(head.hidden.shape) if needs[0] else None
        self.buffer = _Buffer(head)
        block = self.buffer.chunk if filter_eps is None else min(self.buffer.chunk, FILTER_BLOCK)
        self.weight = _WeightSum(head, -(-head.hidden.shape[0] // block)) if needs[1] else None
        self.waiting: list[Tensor] = []
        """Indices of the tokens whose gradients wait in the buffer, one tensor per chunk."""

    def add(self, chunk: slice, logits: Tensor, tokens: Tokens) -> None:
        """Adds the gradients of the tokens of a chunk, and overwrites their logits in the buffer."""
        if self.filter_eps is None:
            self._add_waiting(chunk, logits, tokens)
            return
        for begin in range(0, logits.shape[0], FILTER_BLOCK):
            part = slice(begin, begin + FILTER_BLOCK)
            grad_hidden = None if self.hidden is None else self.hidden[chunk][part]
            self._add_block(logits[part], tokens.take(part), grad_hidden)

    def _add_waiting(self, chunk: slice, logits: Tensor, tokens: Tokens) -> None:
        """Puts a chunk's non-zero gradients in the buffer, where they wait for their products.

        All waiting gradients are multiplied when the buffer has no room for the next chunk, or after the last chunk.
        Waiting keeps the products large and the passes over the weight few even if many tokens have a zero gradient.
        """
        active = tokens.grad_logprobs.nonzero()[:, 0]
        write_gradient(logits, 0, active, tokens, self.head.scale)
        if self.hidden is not None and active.shape[0] < logits.shape[0]:
            self.hidden[chunk].zero_()
        self.waiting.append(active + chunk.start)
        self.buffer.waiting += active.shape[0]
        left = self.head.hidden.shape[0] - chunk.stop
        if left == 0 or self.buffer.room < min(left, self.buffer.chunk):
            self._multiply_waiting()

    def _multiply_waiting(self) -> None:
        index, grad_logits = torch.cat(self.waiting), self.buffer.rows[: self.buffer.waiting]
        self.waiting.clear()
        self.buffer.waiting = 0
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
        if self.weight is None or not self.weight.by_tiles:  # the pass by tiles needs the memory, so it is not kept
            self.buffer.close()
        del self.buffer
        return HeadGradients(self.hidden, None if self.weight is None else self.weight.finish(tokens))


def _mm_columns(grad_logits: Tensor, weight: Tensor, columns: Tensor, out: Tensor) -> None:
    """Computes out = grad_logits @ weight[columns] in pieces of bounded size."""
    pieces = columns.split(max(1, _TILE_BYTES // (weight.shape[1] * weight.element_size())))
    if len(pieces) == 1:
        torch.mm(grad_logits, weight.index_select(0, columns), out=out)
        return
    total, begin = torch.zeros(out.shape), 0
    for piece in pieces:
        first = gapless(grad_logits[:, begin : begin + piece.shape[0]])
        total += torch.mm(first, weight.index_select(0, piece))
        begin += piece.shape[0]
    out.copy_(total)


class _Pooled(NamedTuple):
    """Gradients of a block's logits that have not been added to the gradient of the weight."""

    grad_logits: Tensor
    columns: Tensor
    hidden: Tensor


class _WeightSum:
    """Computes grad_weight, the sum of grad_logits.T @ hidden over blocks of tokens.

    In float32 each block is added to the result. In half precision every such addition would be rounded. If there are
    more than ``_MAX_HALF_SUMS`` half-precision blocks, the sum is computed differently:

    - Blocks with few columns (``filter_eps``) wait in a pool, and are summed in float32 before the sum is added to the
      result.
    - A block with all columns is not added. Instead, ``finish`` recomputes the logits of all tokens with a gradient,
      one tile of the vocabulary at a time, and sums each tile over these tokens in float32.
    """

    def __init__(self, head: Head, num_blocks: int) -> None:
        self.head = head
        self.result = head.weight.new_empty(head.weight.shape)
        self.started = False
        self.rounds = head.weight.element_size() < 4 and num_blocks > _MAX_HALF_SUMS
        self.by_tiles = False
        self.pool: list[_Pooled] = []
        self.pool_bytes = 0

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Adds a block with all columns; ``grad_logits`` is (n, V), ``hidden`` (n, D)."""
        if self.rounds:
            self.by_tiles = True
            self.pool.clear()
        elif self.started:
            self.result.addmm_(grad_logits.T, hidden)
        else:
            torch.mm(grad_logits.T, hidden, out=self.result)
            self.started = True

    def add_columns(self, grad_logits: Tensor, columns: Tensor, hidden: Tensor) -> None:
        """Adds a block with some columns; ``grad_logits`` is (n, columns), ``hidden`` (n, D)."""
        if self.by_tiles:
            return
        self.pool.append(_Pooled(grad_logits, columns, hidden))
        self.pool_bytes += grad_logits.nbytes + columns.nbytes + hidden.nbytes
        if not self.rounds or self.pool_bytes > _POOL_BYTES:
            self._empty_pool()

    def _empty_pool(self) -> None:
        if not self.started:
            self.result.zero_()
            self.started = True
        width = max(1, _TILE_BYTES // (3 * 4 * self.result.shape[1]))
        if len(self.pool) == 1:
            for begin in range(0, self.pool[0].columns.shape[0], width):
                part = slice(begin, begin + width)
                grad_logits, columns, hidden = self.pool[0]
                old = self.result.index_select(0, columns[part])
                self.result.index_copy_(0, columns[part], old.addmm_(gapless(grad_logits[:, part]).T, hidden))
        elif self.pool:
            columns = torch.cat([block.columns for block in self.pool]).unique()
            for part in columns.split(width):
                self._add_pooled(part)
        self.pool.clear()
        self.pool_bytes = 0

    def _add_pooled(self, columns: Tensor) -> None:
        """Adds the pooled gradients of some columns to the result.

        Args:
            columns: rising; all pooled columns between the first and the last of them are included.
        """
        total = self.result.index_select(0, columns).float()
        for block in self.pool:
            first, last = torch.searchsorted(block.columns, columns[[0, -1]])
            part = slice(int(first), int(last) + 1)
            found = block.columns[part]
            found = found[found <= columns[-1]]
            product = gapless(block.grad_logits[:, part][:, : found.shape[0]]).T @ block.hidden
            total.index_add_(0, torch.searchsorted(columns, found), product.float())
        self.result.index_copy_(0, columns, total.to(self.result.dtype))

    def finish(self, tokens: Tokens) -> Tensor:
        """Returns the sum after the last block; ``tokens`` are the tokens of all blocks."""
        if self.by_tiles:
            self._sum_by_tiles(tokens)
        else:
            self._empty_pool()
        return self.result

    def _sum_by_tiles(self, tokens: Tokens) -> None:
        vocabulary, hidden_size = self.result.shape
        itemsize = self.result.element_size()
        active = tokens.grad_logprobs.nonzero()[:, 0]
        # Both sizes bound memory: a tile needs a float32 sum and one product, a chunk needs hidden states and logits.
        width = max(1, min(_TILE_COLUMNS, _TILE_BYTES // ((4 + itemsize) * hidden_size)))
        chunk = max(1, _TILE_BYTES // (itemsize * (hidden_size + width)))
        for first in range(0, vocabulary, width):
            weight = self.head.weight[first : first + width]
            total, product = torch.zeros(weight.shape), torch.empty_like(weight)
            for index in active.split(chunk):
                part = tokens.take(index)
                logits = torch.mm(part.hidden, weight.T)
                write_gradient(logits, first, torch.arange(logits.shape[0]), part, self.head.scale)
                total += torch.mm(logits.T, part.hidden, out=product)
            self.result[first : first + width] = total
