"""Specifications of the head's kernels (``triton_kernels``) for the compile suite: variants, work, and what their machine
code must show.

The shape is the head of Qwen2.5-VL-3B over 8192 completion tokens. The backward covers one slice of the vocabulary.
"""

from __future__ import annotations

import torch

from balcaprl.kernels.head.triton import _TOKEN_TILES
from balcaprl.kernels.head.triton_kernels import (
    _head_grad_hidden_kernel,
    _head_grad_logits_kernel,
    _head_grad_weight_kernel,
    _head_scale_kernel,
    _head_stats_kernel,
)
from balcaprl.kernels.support.launch import TRITON_TYPES, KernelSpec, Launch, Work, launch

_TOKENS, _HIDDEN, _VOCABULARY, _SLICE = 8192, 2048, 151936, 8192
_SHAPE = f"T={_TOKENS} D={_HIDDEN} V="
_PER_TOKEN = {
    "targets_N": "*i64",
    "max_N": "*fp32",
    "sum_N": "*fp32",
    "logprobs_N": "*fp32",
    "grad_logprobs_N": "*fp32",
}


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _product_work(dtype: torch.dtype, columns: int, read: int, written: int, moved: int) -> Work:
    """The work of a kernel that computes one product of T x D x ``columns``; the last three are ``dtype`` elements."""
    floor, all_moved = ((count + written) * dtype.itemsize for count in (read, moved))
    operations = 2 * _TOKENS * _HIDDEN * columns
    unit = "fp32" if dtype == torch.float32 else "tensor"
    return Work(f"{_SHAPE}{columns}", floor, all_moved, operations, unit)  # type: ignore[arg-type]


def _stats_spec(dtype: torch.dtype, with_entropy: bool) -> KernelSpec:
    def work(row: Launch) -> Work:
        weight, hidden = _VOCABULARY * _HIDDEN, _TOKENS * _HIDDEN
        moved = weight * _tiles(_TOKENS, row.blocks["BLOCK_T"]) + hidden * _tiles(_VOCABULARY, row.blocks["BLOCK_V"])
        return _product_work(dtype, _VOCABULARY, weight + hidden, 0, moved)

    storage = f"*{TRITON_TYPES[dtype]}"
    parts = dict.fromkeys(("max_ST", "sum_ST", "weighted_ST", "chosen_T"), "*fp32")
    sizes = ("hidden_stride", "weight_stride", "num_tokens", "hidden_size", "vocabulary", "share")
    return KernelSpec(
        kernel=_head_stats_kernel,
        dtype=dtype,
        arguments={
            "hidden_TD": storage,
            "weight_VD": storage,
            "targets_T": "*i64",
            **parts,
            **dict.fromkeys(sizes, "i32"),
            "scale": "fp32",
        },
        constexprs={"EVEN_D": True, "WITH_ENTROPY": with_entropy},
        work=work,
        variant="entropy" if with_entropy else "",
        divisible=frozenset({"hidden_stride", "weight_stride", "hidden_size", "vocabulary"}),
        tensor_core=dtype != torch.float32,
    )


def _grad_logits_spec(dtype: torch.dtype, filtered: bool) -> KernelSpec:
    def work(row: Launch) -> Work:
        weight, hidden = _SLICE * _HIDDEN, _TOKENS * _HIDDEN
        moved = weight * _tiles(_TOKENS, row.blocks["BLOCK_T"]) + hidden * _tiles(_SLICE, row.blocks["BLOCK_V"])
        return _product_work(dtype, _SLICE, weight + hidden, _TOKENS * _SLICE, moved)

    storage = f"*{TRITON_TYPES[dtype]}"
    sizes = ("hidden_stride", "weight_stride", "num_rows", "hidden_size", "first_column", "num_columns", "out_stride")
    return KernelSpec(
        kernel=_head_grad_logits_kernel,
        dtype=dtype,
        arguments={
            "hidden_ND": storage,
            "weight_VD": storage,
            **_PER_TOKEN,
            "grad_logits_NV": storage,
            "active_tiles": "*i32",
            **dict.fromkeys(sizes, "i32"),
            "scale": "fp32",
            "filter_eps": "fp32",
        },
        constexprs={"EVEN_D": True, "GROUP": _TOKEN_TILES, "FILTER": filtered},
        work=work,
        variant="filter" if filtered else "",
        divisible=frozenset(sizes),
        tensor_core=dtype != torch.float32,
    )


_SLICE_SIZES = ("num_rows", "hidden_size", "first_column", "num_columns", "tiles_per_row")


def _slice_spec(dtype: torch.dtype, hidden: bool) -> KernelSpec:
    """The specification of ``_head_grad_hidden_kernel`` if ``hidden``, otherwise of ``_head_grad_weight_kernel``."""

    def work(row: Launch) -> Work:
        logits, other = _TOKENS * _SLICE, (_SLICE if hidden else _TOKENS) * _HIDDEN
        written = (_TOKENS if hidden else _SLICE) * _HIDDEN
        rows = _tiles(_TOKENS, row.blocks["BLOCK_T"]) if hidden else _tiles(_SLICE, row.blocks["BLOCK_V"])
        moved = logits * _tiles(_HIDDEN, row.blocks["BLOCK_D"]) + other * rows
        return _product_work(dtype, _SLICE, logits + other, written, moved)

    storage = f"*{TRITON_TYPES[dtype]}"
    names = (
        ("weight_VD", "grad_hidden_ND", "weight_stride") if hidden else ("hidden_ND", "grad_weight_VD", "hidden_stride")
    )
    tile = launch("_head_grad_logits_kernel", 80, dtype).blocks
    constants: dict[str, object] = {"TILE_T": tile["BLOCK_T"], "TILE_V": tile["BLOCK_V"]}
    return KernelSpec(
        kernel=_head_grad_hidden_kernel if hidden else _head_grad_weight_kernel,
        dtype=dtype,
        arguments={
            "grad_logits_NV": storage,
            names[0]: storage,
            # The gradient of hidden is float32 because several slices are added up in it.
            names[1]: "*fp32" if hidden else storage,
            "active_tiles": "*i32",
            "grad_stride": "i32",
            names[2]: "i32",
            **dict.fromkeys(_SLICE_SIZES, "i32"),
        },
        constexprs={**constants, "ADD": True} if hidden else constants,
        work=work,
        divisible=frozenset({"grad_stride", names[2], *_SLICE_SIZES} - {"tiles_per_row", "num_rows"}),
        wide_store=True,
        tensor_core=dtype != torch.float32,
    )


def _scale_spec(dtype: torch.dtype) -> KernelSpec:
    size = _VOCABULARY * _HIDDEN

    def work(_: Launch) -> Work:
        return Work(f"N={size}", 2 * size * dtype.itemsize, 2 * size * dtype.itemsize, size)

    return KernelSpec(
        kernel=_head_scale_kernel,
        dtype=dtype,
        arguments={"values_N": f"*{TRITON_TYPES[dtype]}", "factor": "*fp32", "num_values": "i32"},
        constexprs={},
        work=work,
        divisible=frozenset({"num_values"}),
        wide_store=True,
    )


KERNEL_SPECS = [
    *(_stats_spec(dtype, with_entropy) for dtype in TRITON_TYPES for with_entropy in (False, True)),
    *(_grad_logits_spec(dtype, filtered) for dtype in TRITON_TYPES for filtered in (False, True)),
    *(_slice_spec(dtype, hidden) for hidden in (True, False) for dtype in TRITON_TYPES),
    *(_scale_spec(dtype) for dtype in TRITON_TYPES),
]
