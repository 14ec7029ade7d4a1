"""The last decoder layer at the tokens that are read alone.

Of its output a loss reads the tokens that predict; all others of a prompt serve as keys and values only. Their queries, their
part of the output projection and their MLP change nothing, in value or in gradient, and are left out. The model's
code stays as it is: hooks on these parts take the rows that are read, and put zeros in the place of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

_TOKEN_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a decoder layer that take each token by itself, and whose result for a token only that token's output shows."""


class ReadTokens(NamedTuple):
    """Those of a packed row (1, T, ...) whose last hidden state is read."""

    tokens: slice | Tensor
    """A slice up to the row's end, or a LongTensor (U,), ascending."""
    num_tokens: int
    """T."""

    def take(self, x: Tensor) -> Tensor:
        """(1, T, ...) to (1, U, ...)."""
        return x[:, self.tokens] if isinstance(self.tokens, slice) else x.index_select(1, self.tokens)

    def put(self, x: Tensor) -> Tensor:
        """(1, U, D) to (1, T, D), zeros elsewhere."""
        if isinstance(self.tokens, slice):
            return F.pad(x, (0, 0, self.tokens.start, 0))
        return x.new_zeros(1, self.num_tokens, x.shape[2]).index_copy(1, self.tokens, x)


_active: ContextVar[tuple[nn.Module, ReadTokens] | None] = ContextVar("reading_only", default=None)


@contextmanager
def reading_only(layer: nn.Module, read: ReadTokens | None) -> Iterator[None]:
    """Within, ``layer`` computes these tokens' output alone, and zeros in its parts elsewhere; all of it for None.

    A compiled layer stays whole: what was compiled does not see hooks come and go.
    """
    if read is None or layer._compiled_call_impl is not None:
        yield
        return
    token = _active.set((layer, read))
    with ExitStack() as hooks:
        for part in _parts_of(layer):
            hooks.callback(part.register_forward_pre_hook(_taking(read)).remove)
            hooks.callback(part.register_forward_hook(lambda _module, _args, output: read.put(output)).remove)
        try:
            yield
        finally:
            _active.reset(token)


def as_now() -> AbstractContextManager[None]:
    """``reading_only`` as it holds at this moment, for a forward that is computed again when it no longer does."""
    active = _active.get()
    return nullcontext() if active is None else reading_only(*active)


def _taking(read: ReadTokens) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, args: (read.take(args[0]), *args[1:])


def _parts_of(layer: nn.Module) -> list[nn.Module]:
    modules = dict(layer.named_modules())
    return [modules[name] for name in _TOKEN_WISE if name in modules]
