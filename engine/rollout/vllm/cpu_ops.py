"""Makes vLLM use its own CPU kernels for operations that it otherwise composes of many torch operations on a CPU.

The number of operations determines the cost of a small model's decode step. Both changes use interfaces that vLLM
offers: one registers a further implementation of an operation, and the other a class that replaces a layer's class.
``engine``, the only module that imports vLLM, passes vLLM's objects in.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

_PROVIDER = "balcaprl_cpu"
_NORMS = ("rms_norm", "fused_add_rms_norm")


def use_norms(ops: Any) -> dict[str, list[str]]:
    """Register vLLM's C++ norm kernels as implementations of its norm operations on the CPU.

    Args:
        ops: the module ``vllm.ir.ops``.

    Returns:
        The value for vLLM's ``ir_op_priority``: for each operation, its implementations in order of preference. Empty
        if this build lacks a kernel.
    """
    if not all(hasattr(torch.ops._C, name) for name in _NORMS):
        return {}
    if _PROVIDER not in ops.rms_norm.impls:
        ops.rms_norm.register_impl(_PROVIDER, supports_args=_fits)(_rms_norm)
        add = ops.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_fits_with_residual, inplace=True)
        add(_add_rms_norm)
    return {name: [_PROVIDER, "native"] for name in _NORMS}


# vLLM checks that these signatures, including names and defaults, match those of its own implementations.


def _fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


def _fits_with_residual(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fits(x, weight, epsilon, variance_size) and x_residual.is_contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def _add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def use_rotation(layer: Any, replaced: Container[str]) -> None:
    """Use vLLM's C++ rotation for every multimodal rotary layer of this process that computes on a CPU.

    The kernel takes one position per token. The three positions of each token are therefore turned into a table of
    cosines and sines with one row per token.

    Args:
        layer: vLLM's class ``MRotaryEmbedding``.
        replaced: names of the layer classes that have already been replaced.
    """
    if layer.__name__ in replaced or not hasattr(torch.ops._C, "rotary_embedding"):
        return

    @layer.register_oot(name=layer.__name__)
    class KernelMRotaryEmbedding(layer):
        def forward_cpu(
            self, positions: Tensor, query: Tensor, key: Tensor | None = None, offsets: Tensor | None = None
        ) -> tuple[Tensor, Tensor | None]:
            if positions.ndim != 2 or self.mrope_interleaved or offsets is not None:
                return super().forward_cpu(positions, query, key, offsets)
            table = _table_of_tokens(self._match_cos_sin_cache_dtype(query), positions, self.mrope_section)
            rows = torch.arange(len(table))
            torch.ops._C.rotary_embedding(rows, query, key, self.head_size, table, self.is_neox_style)
            return query, key


def _table_of_tokens(cos_sin: Tensor, positions: Tensor, sections: list[int]) -> Tensor:
    """Make the table row of each token: every column holds the entry for the token's position on that column's axis.

    Args:
        cos_sin: table ``(max_position, rotary_dim)`` of cosines followed by sines.
        positions: positions ``(3, T)`` along time, height and width.
        sections: number of columns of each axis; these add up to ``rotary_dim / 2``.

    Returns:
        The table ``(T, rotary_dim)``.
    """
    axes = [axis for axis, width in enumerate(sections) for _ in range(width)]
    return cos_sin[positions.t()[:, axes + axes], torch.arange(cos_sin.shape[1])]
