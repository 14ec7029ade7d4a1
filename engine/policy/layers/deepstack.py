"""Adds the image features of Qwen3-VL's inner tower layers to hidden states, at known places.

transformers indexes the tensors with a mask instead. On a GPU, the host then waits for the number of places, twice per
layer in the forward and twice in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_METHOD = "_deepstack_process"
"""Name of the text model's method that adds the features; it takes hidden states, mask and features."""


@contextmanager
def adding_at(text_model: Any, places: Tensor) -> Iterator[None]:
    """Within the context, a text model that adds features to hidden states (N, L, D) adds them at ``places``.

    Args:
        text_model: The decoder; one without such features is left alone.
        places: LongTensor (I,): places in the flattened rows (N * L), each listed once.
    """

    def add(hidden: Tensor, _mask: Tensor, features: Tensor) -> Tensor:
        return hidden.flatten(0, 1).index_add(0, places, features.to(hidden.dtype)).view_as(hidden)

    if not hasattr(text_model, _METHOD):
        yield
        return
    setattr(text_model, _METHOD, add)
    try:
        yield
    finally:
        delattr(text_model, _METHOD)
