"""Records of the language-model head that all of its implementations use."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from balcaprl.kernels.support.products import gapless

FILTER_BLOCK = 128
"""Tokens per filter block in ``native`` and ``reference``; ``filter_eps`` keeps or drops a column for a whole block."""


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
