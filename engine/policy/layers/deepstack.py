"""Adds the image features of Qwen3-VL's inner tower layers to hidden states, at places that are known.

transformers takes the places from a mask, by which tensors are indexed: on a GPU, the host waits for the number of
places, twice per layer and direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_METHOD = "_deepstack_process"
"""The text model's method (hidden states, mask, features), since transformers 5.0."""


@contextmanager
def adding_at(text_model: Any, places: Tensor) -> Iterator[None]:
    """Within the context, a text model that adds features to hidden states (N, L, D) adds them at ``places``.

    Args:
        text_model: The decoder; one without such features is left alone.
        places: LongTensor (I,): the places in the flattened rows (N * L), each once.
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
