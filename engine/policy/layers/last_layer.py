"""Runs the last decoder layer only for tokens that the loss reads.

The loss reads this layer's output only at tokens that predict a completion token. All other prompt tokens serve only as
keys and values. Their queries, output projection and MLP affect neither values nor gradients and are skipped. The
model's code stays unchanged: hooks on these parts select the rows that are read, and put zeros in place of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class ReadTokens(NamedTuple):
    """The tokens of a packed row (1, T, ...) whose last hidden states are read, U in number."""

    tokens: slice | Tensor
    """Places of the tokens: a slice up to the row's end, or an ascending LongTensor (U,)."""
    num_tokens: int
    """Number of tokens in the row, T."""

    def take(self, x: Tensor) -> Tensor:
        """Select the tokens that are read: (1, T, ...) to (1, U, ...)."""
        return x[:, self.tokens] if isinstance(self.tokens, slice) else x.index_select(1, self.tokens)

    def put(self, x: Tensor) -> Tensor:
        """Put the tokens back into their places, with zeros elsewhere: (1, U, D) to (1, T, D)."""
        if isinstance(self.tokens, slice):
            return F.pad(x, (0, 0, self.tokens.start, 0))
        return x.new_zeros(1, self.num_tokens, x.shape[2]).index_copy(1, self.tokens, x)


class _Reading(NamedTuple):
    """What ``reading_only`` was asked for."""

    layer: nn.Module
    parts: Sequence[str]
    read: ReadTokens


_active: ContextVar[_Reading | None] = ContextVar("reading_only", default=None)


@contextmanager
def reading_only(layer: nn.Module, parts: Sequence[str], read: ReadTokens | None) -> Iterator[None]:
    """Within the context, parts of ``layer`` compute only the tokens of ``read``, and give zeros for all other tokens.

    Args:
        layer: The last decoder layer. A compiled layer computes all tokens, because compiled code does not notice added
            or removed hooks.
        parts: Names of the modules within ``layer`` that treat each token separately, and whose result affects only
            that token's output (``Family.token_wise_parts``).
        read: The tokens that are read; None computes all.

    Raises:
        AttributeError: The layer has no module of one of the names.
    """
    if read is None or layer._compiled_call_impl is not None:
        yield
        return
    modules = [layer.get_submodule(name) for name in parts]
    token = _active.set(_Reading(layer, parts, read))
    with ExitStack() as hooks:
        for part in modules:
            hooks.callback(part.register_forward_pre_hook(_taking(read)).remove)
            hooks.callback(part.register_forward_hook(lambda _module, _args, output: read.put(output)).remove)
        try:
            yield
        finally:
            _active.reset(token)


def as_now() -> AbstractContextManager[None]:
    """Return a context that restores the present ``reading_only``, for a forward that is recomputed later."""
    active = _active.get()
    return nullcontext() if active is None else reading_only(*active)


def rows_read_of(layer: nn.Module) -> slice | Tensor | None:
    """Return the tokens that ``reading_only`` now asks of ``layer``, for a layer that selects them itself; None for all."""
    active = _active.get()
    return active.read.tokens if active is not None and active.layer is layer else None


def _taking(read: ReadTokens) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, args: (read.take(args[0]), *args[1:])
