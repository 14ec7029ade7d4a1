"""Memory for the head's logits on the CPU, which is kept from one call to the next.

Touching new pages takes as long as the softmax of all numbers that they hold. A ``LogitsRoom`` therefore reuses the
memory of the room before it, if that memory is large enough. ``release_scratch`` frees the kept memory.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

_MOST_SCRATCH_BYTES = 64 << 20
"""Larger memory is not kept, so that one unusual call does not occupy memory for ever."""
_PAGE_BYTES = 4096
_Room = TypeVar("_Room", bound="LogitsRoom")


class LogitsRoom:
    """Room for the logits of ``weight`` (V, D), one row for each of ``num_rows`` tokens; a context manager.

    At the end of the context the memory is kept for the next room, so no row may be used after it.
    """

    def __init__(self, num_rows: int, weight: Tensor) -> None:
        self._scratch: Tensor | None = _take_scratch(weight, num_rows * _row_distance(weight))
        self.rows = logits_view(num_rows, weight, self._scratch)
        """(num_rows, V), uninitialised."""

    def __enter__(self: _Room) -> _Room:
        return self

    def __exit__(self, *error: object) -> None:
        if self._scratch is not None:
            _keep_scratch(self._scratch)

    def free(self) -> None:
        """Frees the memory instead of keeping it, for a caller that goes on to need memory elsewhere.

        No row may be used afterwards, and the caller must hold no view of one, because a view keeps the memory alive.
        """
        self._scratch, self.rows = None, self.rows.new_empty(0, self.rows.shape[1])


def logits_view(num_tokens: int, weight: Tensor, spare: Tensor) -> Tensor:
    """An uninitialised (num_tokens, V) view of ``spare`` for the logits of ``weight`` (V, D).

    ``spare`` is one-dimensional with at least num_tokens * V numbers. If it has no room for the gaps of
    ``_row_distance``, the rows are adjacent. Gaps between 16-bit rows are zeroed, because products may read them (see
    ``support/products.py``).
    """
    vocabulary, distance = weight.shape[0], _row_distance(weight)
    if num_tokens * distance > spare.shape[0]:
        distance = vocabulary
    rows = spare[: num_tokens * distance].view(num_tokens, distance)
    if weight.element_size() == 2:
        rows[:, vocabulary:].zero_()
    return rows[:, :vocabulary]


def _row_distance(weight: Tensor) -> int:
    """Distance between the rows of logits, in numbers: V, plus a small gap if a row fills whole pages.

    Without the gap, products of such a matrix take a twentieth longer, because the numbers of a column compete for the
    same few cache lines.
    """
    vocabulary, itemsize = weight.shape[0], weight.element_size()
    return vocabulary + (_PAGE_BYTES // (16 * itemsize) if vocabulary * itemsize % _PAGE_BYTES == 0 else 0)


_kept_scratch: list[Tensor] = []


def release_scratch() -> None:
    """Frees the kept memory for logits; the next call allocates new memory."""
    _kept_scratch.clear()


def _take_scratch(like: Tensor, count: int) -> Tensor:
    """An uninitialised (count,) tensor of the dtype of ``like``, in the kept memory if it suffices."""
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
