"""The gradient of the head's weight on the CPU: the sum of grad_logits.T @ hidden over blocks of tokens.

``WeightSum`` takes the blocks and chooses between three ways of summing them. They differ in how often the result is
rounded to the weight's dtype, and in their cost:

- *Added*: each block is added to the result, without further memory or work. Float32 blocks are always summed this way.
  In half precision every addition rounds the result, so only batches of at most ``_MAX_HALF_SUMS`` blocks are.
- *Pooled* (``_Pool``): half-precision blocks with few columns (``filter_eps``) wait, and are summed in float32 before
  the sum is added to the result. This rounds once per pool, and costs the memory of the pool.
- *By tiles* (``_sum_by_tiles``): half-precision blocks with all columns are too large to wait, and a float32 copy of
  the result would be too large as well. Instead, after the last block, the logits of all tokens with a gradient are
  computed again, one tile of the vocabulary at a time, and each tile is summed in float32. This rounds once, and costs
  a fourth matrix product. If a batch has one such block, all of its blocks are summed by tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.head.records import Head
from balcaprl.kernels.support.native_softmax import Tokens, write_gradient
from balcaprl.kernels.support.products import gapless

_MAX_HALF_SUMS = 2
"""Largest number of half-precision blocks that are added one by one: two blocks round once more than a single one."""
_POOL_BYTES = 8 << 20
"""When the pooled blocks take more bytes than this, their sum is added to the result."""
_TILE_BYTES = 12 << 20
"""Bytes for each of these: a tile's sum and product; a chunk's hidden states and logits; rows gathered for columns."""
_TILE_COLUMNS = 4096
"""Largest number of columns of the vocabulary in a tile."""


class WeightSum:
    """Computes the gradient of the weight, (V, D) in its dtype, from one block of tokens after another."""

    def __init__(self, head: Head, num_blocks: int) -> None:
        self.by_tiles = False
        """Whether ``finish`` sums by tiles."""
        self._head = head
        self._result = head.weight.new_empty(head.weight.shape)
        self._started = False
        self._rounds = head.weight.element_size() < 4 and num_blocks > _MAX_HALF_SUMS
        self._pool = _Pool()

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Adds a block with all columns, or leaves it to ``finish``; ``grad_logits`` is (n, V), ``hidden`` (n, D)."""
        if self._rounds:
            self.by_tiles = True
            self._pool.clear()
        elif self._started:
            self._result.addmm_(grad_logits.T, hidden)
        else:
            torch.mm(grad_logits.T, hidden, out=self._result)
            self._started = True

    def add_columns(self, grad_logits: Tensor, columns: Tensor, hidden: Tensor) -> None:
        """Adds a block with some columns; ``grad_logits`` is (n, columns), ``hidden`` (n, D)."""
        block = _Columns(grad_logits, columns, hidden)
        if self.by_tiles:
            return
        if not self._rounds:
            _add_columns(self._started_result(), block)
            return
        self._pool.append(block)
        if self._pool.num_bytes > _POOL_BYTES:
            self._pool.add_to(self._started_result())

    def finish(self, tokens: Tokens) -> Tensor:
        """Returns the sum after the last block; ``tokens`` are the tokens of all blocks."""
        if self.by_tiles:
            _sum_by_tiles(self._result, self._head, tokens)
        else:
            self._pool.add_to(self._started_result())
        return self._result

    def _started_result(self) -> Tensor:
        """The result, which is zero if no block has been added to it."""
        if not self._started:
            self._result.zero_()
            self._started = True
        return self._result


class _Columns(NamedTuple):
    """Gradients (n, columns) of some of a block's logits, the columns' indices, ascending, and (n, D) hidden states."""

    grad_logits: Tensor
    columns: Tensor
    hidden: Tensor


def _add_columns(result: Tensor, block: _Columns) -> None:
    """Adds one block to the rows of its columns."""
    width = _columns_at_once(result)
    for begin in range(0, block.columns.shape[0], width):
        part = slice(begin, begin + width)
        columns = block.columns[part]
        old = result.index_select(0, columns)
        result.index_copy_(0, columns, old.addmm_(gapless(block.grad_logits[:, part]).T, block.hidden))


def _columns_at_once(result: Tensor) -> int:
    """Number of columns for which three float32 copies of their rows of the result fit ``_TILE_BYTES``."""
    return max(1, _TILE_BYTES // (3 * 4 * result.shape[1]))


class _Pool:
    """Blocks with some columns that wait until they are summed in float32."""

    def __init__(self) -> None:
        self._blocks: list[_Columns] = []
        self.num_bytes = 0

    def append(self, block: _Columns) -> None:
        """Adds a block to those that wait."""
        self._blocks.append(block)
        self.num_bytes += sum(values.nbytes for values in block)

    def clear(self) -> None:
        """Forgets all blocks."""
        self._blocks.clear()
        self.num_bytes = 0

    def add_to(self, result: Tensor) -> None:
        """Adds the sum of the blocks to the result, and forgets them."""
        if len(self._blocks) == 1:
            _add_columns(result, self._blocks[0])
        elif self._blocks:
            columns = torch.cat([block.columns for block in self._blocks]).unique()
            for part in columns.split(_columns_at_once(result)):
                self._add_part(result, part)
        self.clear()

    def _add_part(self, result: Tensor, columns: Tensor) -> None:
        """Adds the gradients of some columns.

        Args:
            result: the sum to which they are added.
            columns: ascending; every pooled column between the first and the last of them is among them.
        """
        total = result.index_select(0, columns).float()
        for block in self._blocks:
            first, last = torch.searchsorted(block.columns, columns[[0, -1]])
            part = slice(int(first), int(last) + 1)
            found = block.columns[part]
            found = found[found <= columns[-1]]
            product = gapless(block.grad_logits[:, part][:, : found.shape[0]]).T @ block.hidden
            total.index_add_(0, torch.searchsorted(columns, found), product.float())
        result.index_copy_(0, columns, total.to(result.dtype))


def _sum_by_tiles(result: Tensor, head: Head, tokens: Tokens) -> None:
    """Writes to ``result`` the sum over all tokens that have a gradient, from logits that are computed again."""
    vocabulary, hidden_size = result.shape
    itemsize = result.element_size()
    active = tokens.grad_logprobs.nonzero()[:, 0]
    # Each size bounds memory: a tile needs a float32 sum and one product, a chunk needs hidden states and logits.
    width = max(1, min(_TILE_COLUMNS, _TILE_BYTES // ((4 + itemsize) * hidden_size)))
    chunk = max(1, _TILE_BYTES // (itemsize * (hidden_size + width)))
    for first in range(0, vocabulary, width):
        weight = head.weight[first : first + width]
        total, product = torch.zeros(weight.shape), torch.empty_like(weight)
        for index in active.split(chunk):
            part = tokens.take(index)
            logits = torch.mm(part.hidden, weight.T)
            write_gradient(logits, first, torch.arange(logits.shape[0]), part, head.scale)
            total += torch.mm(logits.T, part.hidden, out=product)
        result[first : first + width] = total
