"""Operations that vLLM composes of many of torch's on a CPU, though its CPU build has kernels for them.

A decode step of a small model costs what its number of operations costs. Both ways in are vLLM's own: a further implementation
of an operation, and a class that takes the place of a layer's. ``vllm_engine`` brings what is vLLM's: it alone imports it.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

_PROVIDER = "balcaprl_cpu"
_NORMS = ("rms_norm", "fused_add_rms_norm")


def use_norms(ops: Any) -> dict[str, list[str]]:
    """Make vLLM's C++ norms implementations of its operations for the CPU.

    Args:
        ops: ``vllm.ir.ops``.

    Returns:
        By operation, who is asked to serve it first: vLLM's ``ir_op_priority``. Empty where this build lacks a kernel.
    """
    if not all(hasattr(torch.ops._C, name) for name in _NORMS):
        return {}
    if _PROVIDER not in ops.rms_norm.impls:
        ops.rms_norm.register_impl(_PROVIDER, supports_args=_fits)(_rms_norm)
        add = ops.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_fits_with_residual, inplace=True)
        add(_add_rms_norm)
    return {name: [_PROVIDER, "native"] for name in _NORMS}


# vLLM holds these signatures against its own implementations', names and defaults included.


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
    """Let vLLM's C++ rotation serve every multimodal rotary layer of this process that computes on a CPU.

    The kernel takes one position a token; three become a table of cosines and sines with a row a token.

    Args:
        layer: vLLM's ``MRotaryEmbedding``.
        replaced: names of the layers whose place a class has taken already.
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
    """The row of each token: of every column, the entry at the position along the column's own axis.

    Args:
        cos_sin: ``(max_position, rotary_dim)``, cosines and then sines.
        positions: ``(3, T)``, along time, height and width.
        sections: columns of each axis; they add up to ``rotary_dim / 2``.

    Returns:
        ``(T, rotary_dim)``.
    """
    axes = [axis for axis, width in enumerate(sections) for _ in range(width)]
    return cos_sin[positions.t()[:, axes + axes], torch.arange(cos_sin.shape[1])]
