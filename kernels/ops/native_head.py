"""The language-model head on the CPU: torch's matrix products, and the library's softmax epilogues between them.

Tokens are taken in chunks whose logits fit a buffer (``chunk_size``). Per chunk: logits = hidden @ weight.T, statistics in
one read, and where a gradient is wanted, it is written over the logits and multiplied with ``weight`` and ``hidden``
at once: three matrix products in all. Work that gives nothing is left out:

- Tokens whose gradient is exactly zero: the last two products do not see their rows. Exact.
- With ``filter_eps``: columns whose softmax stays below it for all tokens of a block (``FILTER_BLOCK`` tokens) and
  that are no target. Approximate; the products then see the other columns only, gathered.

A batch of twice as many tokens as fit is taken whole, in two halves of the vocabulary (``_gradients_by_halves``).
``_WeightSum`` says how the gradient of the weight is summed over chunks. Memory beyond inputs and results does not grow
with the number of tokens, but for a few numbers per token. The room for logits is kept for the next call
(``release_scratch``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.native_softmax import (
    SoftmaxRows,
    Tokens,
    gathered_gradient,
    marked_columns,
    write_gradient,
    write_stats,
)
from balcaprl.kernels.products import gapless

FILTER_BLOCK = 128
"""Tokens that ``filter_eps`` looks at together."""

_LOGITS_BYTES = 40 << 20
# With the room in which gradients wait.
_BUFFER_BYTES = 56 << 20
# Fewer tokens make slow products, and more passes over the gradient of the weight. More gain nothing, and their logits
# leave the cache between the product and the epilogue.
_CHUNK_TOKENS = 512
_TILE_BYTES = 12 << 20
_TILE_COLUMNS = 4096
_POOL_BYTES = 8 << 20
_MAX_HALF_SUMS = 2
_PAGE_BYTES = 4096
_MOST_SCRATCH_BYTES = 64 << 20
# Above this share of the columns gathering costs more than it saves.
_MAX_KEPT_SHARE = 0.4


class Head(NamedTuple):
    """What the logits are made of."""

    hidden: Tensor
    """(T, D), ``gapless``."""
    weight: Tensor
    """(V, D)."""
    targets: Tensor
    """(T,) int64, contiguous."""
    temperature: float

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Head:
        """From tensors of any layout."""
        return cls(gapless(hidden), weight, targets.contiguous(), temperature)

    @property
    def scale(self) -> float:
        """What the logits are multiplied by."""
        return 1.0 / self.temperature


class HeadGradients(NamedTuple):
    """In the dtype of hidden and weight, contiguous; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None


def chunk_size(num_tokens: int, vocabulary: int, itemsize: int) -> int:
    """Tokens whose logits are computed at once. Chunks are about equal, and whole filter blocks if longer than one."""
    most = _capacity(vocabulary, itemsize)
    if most > FILTER_BLOCK:
        most -= most % FILTER_BLOCK
    num_chunks = max(1, -(-num_tokens // most))
    size = -(-num_tokens // num_chunks)
    if most >= FILTER_BLOCK:
        size += -size % FILTER_BLOCK
    return max(1, min(size, num_tokens))


def _capacity(vocabulary: int, itemsize: int) -> int:
    """Tokens whose logits the buffer holds: at least one, else within ``_LOGITS_BYTES``."""
    return max(1, min(_CHUNK_TOKENS, _LOGITS_BYTES // max(1, vocabulary * itemsize)))


def logprobs_and_entropy(head: Head) -> tuple[SoftmaxRows, Tensor]:
    """The forward alone: the rows, and the (T,) float32 entropies."""
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
    """Forward and backward in one sweep, for a function of the log-probabilities that is known chunk by chunk.

    Args:
        head: the head.
        gradient_of: takes the (n,) log-probabilities of tokens ``begin`` to ``end`` and returns their gradient, (n,).
            Called once for every chunk, in order.
        needs: which of hidden and weight want a gradient.
        filter_eps: see the module's docstring.
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
        del logits  # so that the buffer is free before the weight's second pass
    return rows, sums.finish(Tokens(head.hidden, head.targets, rows, grad_logprobs))


def head_gradients(
    head: Head, rows: SoftmaxRows, grad_logprobs: Tensor, needs: tuple[bool, bool], filter_eps: float | None = None
) -> HeadGradients:
    """The backward alone, where the (T,) float32 gradient of the log-probabilities arrives later.

    The logits of tokens that have one are computed again, from the ``rows`` of the forward.
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
    """Gradients from known softmax rows; ``tokens`` are the head's."""
    if _fits_by_halves(head, needs, filter_eps):
        return _gradients_by_halves(head, tokens, needs[0], lambda halves: None)
    sums = _Sums(head, needs, filter_eps)
    for chunk, logits in _logits_of_chunks(head, sums.buffer):
        sums.add(chunk, logits, tokens.take(chunk))
        del logits
    return sums.finish(tokens)


def _fits_by_halves(head: Head, needs: tuple[bool, bool], filter_eps: float | None) -> bool:
    """Whether ``_gradients_by_halves`` can do what would take more than one chunk; in half precision its sum would round."""
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
    """All tokens at once, in the memory of half of their logits: the products are larger, and nothing is summed over chunks.

    The logits of the first half of the vocabulary lie where the gradient of the second half of the weight is written, and that
    is written last. They fit as there are no more tokens than columns of ``weight``.

    Args:
        head: the head.
        tokens: its tokens.
        needs_hidden: whether hidden wants a gradient.
        look: sees both halves of the logits before their gradient is written over them; then ``tokens`` has to be filled in.
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
    """Writes the rows of the whole vocabulary's softmax from the statistics of its halves."""
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
    # From a half to the whole: a probability shrinks to the half's share of it.
    logprobs = [part.logprobs + (each / total).log() for part, each in zip(parts, sums, strict=True)]
    rows.logprobs.copy_(torch.where(head.targets < middle, logprobs[0], logprobs[1]))


def _numbers_of_logits(num_tokens: int, weight: Tensor) -> int:
    """How many numbers ``_room_for_logits`` wants."""
    return num_tokens * _row_distance(weight)


def _row_distance(weight: Tensor) -> int:
    """Rows of whole pages are kept a little apart: products of such a matrix take a twentieth longer, as a column's numbers
    then all compete for the same few lines of the cache."""
    vocabulary, itemsize = weight.shape[0], weight.element_size()
    return vocabulary + (_PAGE_BYTES // (16 * itemsize) if vocabulary * itemsize % _PAGE_BYTES == 0 else 0)


def _room_for_logits(num_tokens: int, weight: Tensor, spare: Tensor) -> Tensor:
    """(num_tokens, V), uninitialised, for logits of ``weight`` (V, D); in ``spare``, a row of at least as many.

    Between rows that are kept apart are zeros, as products may read beside 16-bit rows (``products``).
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
    """Gives the room for logits back to the system; the next call takes new."""
    _kept_scratch.clear()


def _take_scratch(like: Tensor, count: int) -> Tensor:
    """(count,) numbers of a tensor's dtype, uninitialised: where an earlier call had its logits, if there is enough.

    To touch new pages costs as much as the softmax of all that they hold.
    """
    num_bytes = count * like.element_size()
    try:
        scratch = _kept_scratch.pop()  # and not just looked at: another thread may be here
    except IndexError:
        scratch = None
    if scratch is None or scratch.untyped_storage().nbytes() < num_bytes:
        return like.new_empty(count)
    return like.new_empty(0).set_(scratch.untyped_storage(), 0, (count,), (1,))


def _keep_scratch(scratch: Tensor) -> None:
    """For the next call; one is kept."""
    if scratch.untyped_storage().nbytes() <= _MOST_SCRATCH_BYTES:
        _kept_scratch[:] = [scratch]


class _Buffer:
    """Room for the logits of a chunk, behind gradients of earlier logits that wait to be multiplied.

    With three quarters of a chunk more than one, a batch with half of its gradients zero passes in whole chunks, and is
    multiplied in whole chunks, be its zeros spread evenly or not; pages that are not needed are never touched.
    """

    def __init__(self, head: Head) -> None:
        num_tokens, vocabulary, itemsize = head.hidden.shape[0], head.weight.shape[0], head.weight.element_size()
        self.chunk = chunk_size(num_tokens, vocabulary, itemsize)
        room = min(self.chunk + 3 * self.chunk // 4, _BUFFER_BYTES // max(1, vocabulary * itemsize), num_tokens)
        most = max(self.chunk, room)
        self._scratch = _take_scratch(head.weight, _numbers_of_logits(most, head.weight))
        self.rows = _room_for_logits(most, head.weight, self._scratch)
        self.waiting = 0
        """Rows at the front that are taken."""

    @property
    def room(self) -> int:
        """Rows that are free."""
        return self.rows.shape[0] - self.waiting

    def close(self) -> None:
        """No row is needed any more."""
        _keep_scratch(self._scratch)


def _logits_of_chunks(head: Head, buffer: _Buffer) -> Iterator[tuple[slice, Tensor]]:
    """Tokens of each chunk, with their logits in ``buffer``, where the consumer must leave room for the next."""
    num_tokens = head.hidden.shape[0]
    for begin in range(0, num_tokens, buffer.chunk):
        end = min(begin + buffer.chunk, num_tokens)
        out = buffer.rows[buffer.waiting : buffer.waiting + end - begin]
        yield slice(begin, end), torch.mm(head.hidden[begin:end], head.weight.T, out=out)


class _Sums:
    """Gradients of hidden and weight, from the logits of one chunk after the other."""

    def __init__(self, head: Head, needs: tuple[bool, bool], filter_eps: float | None) -> None:
        self.head = head
        self.filter_eps = filter_eps
        self.hidden = head.hidden.new_empty(head.hidden.shape) if needs[0] else None
        self.buffer = _Buffer(head)
        block = self.buffer.chunk if filter_eps is None else min(self.buffer.chunk, FILTER_BLOCK)
        self.weight = _WeightSum(head, -(-head.hidden.shape[0] // block)) if needs[1] else None
        self.waiting: list[Tensor] = []
        """Numbers of the tokens whose gradients wait in the buffer."""

    def add(self, chunk: slice, logits: Tensor, tokens: Tokens) -> None:
        """Adds the gradients of the tokens of a chunk; their logits, in the buffer, are used up."""
        if self.filter_eps is None:
            self._add_waiting(chunk, logits, tokens)
            return
        for begin in range(0, logits.shape[0], FILTER_BLOCK):
            part = slice(begin, begin + FILTER_BLOCK)
            grad_hidden = None if self.hidden is None else self.hidden[chunk][part]
            self._add_block(logits[part], tokens.take(part), grad_hidden)

    def _add_waiting(self, chunk: slice, logits: Tensor, tokens: Tokens) -> None:
        """Gradients of the tokens that have one wait in the buffer, until it is too full for another chunk.

        With many tokens without gradient, this makes products as large, and passes over the weight as few, as without.
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
        """A filter block; ``grad_hidden`` (n, D) is written."""
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
        """``hidden`` and ``grad_hidden`` are those of the active rows."""
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
        """The gradients, once all chunks are in; ``tokens`` are all of them."""
        if self.weight is None or not self.weight.by_tiles:  # that pass needs the memory
            self.buffer.close()
        del self.buffer
        return HeadGradients(self.hidden, None if self.weight is None else self.weight.finish(tokens))


def _mm_columns(grad_logits: Tensor, weight: Tensor, columns: Tensor, out: Tensor) -> None:
    """out = grad_logits @ weight[columns], in pieces of bounded size."""
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
    """Gradients of a block that are still to be added to the weight's."""

    grad_logits: Tensor
    columns: Tensor
    hidden: Tensor


class _WeightSum:
    """grad_weight = sum of grad_logits.T @ hidden over blocks of tokens.

    In float32 the sum is kept in the result. In half precision every addition there would round, and so, when there are
    more than ``_MAX_HALF_SUMS`` blocks:

    - Blocks of few columns (``filter_eps``) wait in a pool, and are added up in float32 before the result is touched.
    - A block of all columns is not added: once all tokens are through, ``finish`` computes the logits again, tile by tile
      of the vocabulary, and sums each tile over all tokens in float32.
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
        """A block with all columns; ``grad_logits`` (n, V)."""
        if self.rounds:
            self.by_tiles = True
            self.pool.clear()
        elif self.started:
            self.result.addmm_(grad_logits.T, hidden)
        else:
            torch.mm(grad_logits.T, hidden, out=self.result)
            self.started = True

    def add_columns(self, grad_logits: Tensor, columns: Tensor, hidden: Tensor) -> None:
        """A block with some columns; ``grad_logits`` (n, columns)."""
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
        """Adds what the pool has for some rising columns, all between the first and the last of them."""
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
        """The sum, once all blocks of ``tokens`` are in."""
        if self.by_tiles:
            self._sum_by_tiles(tokens)
        else:
            self._empty_pool()
        return self.result

    def _sum_by_tiles(self, tokens: Tokens) -> None:
        vocabulary, hidden_size = self.result.shape
        itemsize = self.result.element_size()
        active = tokens.grad_logprobs.nonzero()[:, 0]
        # A tile has its sum in float32 and one product; a chunk its hidden states and logits.
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
