"""What every implementation of ``shared_prefix_attention`` takes and returns.

Each is a module with two functions:

``forward(inputs) -> (out (T, H, head_dim), lse (H, T))``, where ``out`` is contiguous and ``lse`` holds natural
logarithms in float32 (float64 for float64 inputs).
``backward(grad_out, inputs, out, lse) -> (grad_query, grad_key, grad_value)``, with what the forward returned.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from balcaprl.kernels.shared_prefix.layout import SharedPrefixLayout

Gradients = tuple[Tensor, Tensor, Tensor]
"""The gradients of query, key and value, each in the shape and dtype of its tensor."""


class AttentionInputs(NamedTuple):
    """The checked arguments of ``shared_prefix_attention``, whose docstring gives their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    layout: SharedPrefixLayout
    scale: float
