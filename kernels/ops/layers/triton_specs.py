"""Specifications of the layers' kernels (``triton_kernels.py``) for the compile suite: variants, work, and requirements
on their machine code.

The widths are those of Qwen2.5-VL's vision tower (1280 columns, heads of 80, SwiGLU of 3420) and of its decoders with
3B and 7B parameters, and the largest width that the norm takes. A batch has 8192 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from balcaprl.kernels.layers.triton import MOST_COLUMNS, _pack
from balcaprl.kernels.layers.triton_kernels import (
    _rms_norm_backward_kernel,
    _rms_norm_kernel,
    _rotate_kernel,
    _silu_mul_backward_kernel,
    _silu_mul_kernel,
)
from balcaprl.kernels.support.launch import TRITON_TYPES, KernelSpec, Work

_TOKENS, _HEADS = 8192, 16
_PROGRAMS = 2 * 108
"""Number of programs of the norm's backward: two for each streaming multiprocessor of an A100."""
_FLOAT32 = ("rstd_T", "sums_PD", "cos_TD", "sin_TD")


def _spec(kernel: Any, dtype: torch.dtype, variant: str, work: Work, width: int, **others: object) -> KernelSpec:
    """A variant whose rows, or parts of rows, are ``width`` elements apart; ``others`` are its other constexprs."""
    pack = _pack(dtype, width)
    constexprs, wide = {**others, "PACK": pack}, pack * dtype.itemsize == 16

    def kind(name: str) -> str:
        if name == "num_rows" or name.endswith("_stride"):
            return "i32"
        return "fp32" if name == "eps" else "*fp32" if name in _FLOAT32 else f"*{TRITON_TYPES[dtype]}"

    return KernelSpec(
        kernel=kernel,
        dtype=dtype,
        arguments={n: kind(n) for n in kernel.arg_names if n not in (*constexprs, "BLOCK_VALUES")},
        constexprs=constexprs,
        work=lambda _: work,
        variant=variant,
        wide_load=wide,
        wide_store=wide,
    )


def _norm_specs(size: int, dtype: torch.dtype, *, all_variants: bool = False) -> Iterator[KernelSpec]:
    values, row = _TOKENS * size, size * dtype.itemsize
    shape, widths = f"T={_TOKENS} D={size}", {"D": size, "BLOCK_D": triton.next_power_of_2(size)}
    once = 2 * values * dtype.itemsize + 4 * _TOKENS + row
    # Operations per value: a square and its addition to the sum, and two products.
    work = Work(shape, once, once + (_TOKENS - 1) * row, 4 * values)
    yield _spec(_rms_norm_kernel, dtype, f"d{size}", work, size, AGAIN=False, **widths)
    if all_variants:
        yield _spec(_rms_norm_kernel, dtype, f"d{size}-again", work, size, AGAIN=True, **widths)
    # Operations per value: four products, two products that are added to a sum (the mean, the weight's gradient), a
    # difference and an addition.
    read = 4 * values * dtype.itemsize + 4 * _TOKENS
    backward = Work(shape, read + 2 * row, read + _PROGRAMS * (row + 4 * size), 10 * values)
    yield _spec(_rms_norm_backward_kernel, dtype, f"d{size}", backward, size, **widths)
    if all_variants:
        frozen = Work(shape, read + row, read + _TOKENS * row, 8 * values)
        yield _spec(_rms_norm_backward_kernel, dtype, f"d{size}-frozen", frozen, size, sums_PD=None, **widths)


def _rotate_spec(head_dim: int, dtype: torch.dtype, *, inverse: bool = False) -> KernelSpec:
    values = _TOKENS * _HEADS * head_dim
    moved, table = 2 * values * dtype.itemsize, 8 * _TOKENS * head_dim
    half = head_dim // 2
    # Operations per value: two products and an addition.
    return _spec(
        _rotate_kernel,
        dtype,
        f"d{head_dim}-inverse" if inverse else f"d{head_dim}",
        Work(f"T={_TOKENS} H={_HEADS} D={head_dim}", moved + table, moved + _HEADS * table, 3 * values),
        half,
        HEADS=_HEADS,
        HALF=half,
        BLOCK_D=triton.next_power_of_2(half),
        INVERSE=inverse,
    )


def _silu_specs(size: int, dtype: torch.dtype) -> Iterator[KernelSpec]:
    values, shape = _TOKENS * size, f"T={_TOKENS} I={size}"
    forward = 3 * values * dtype.itemsize
    # Operations per value: exp, the product with log2(e) before it, an addition, a quotient and a product.
    work = Work(shape, forward, forward, 5 * values)
    yield _spec(_silu_mul_kernel, dtype, f"i{size}", work, size, SIZE=size)
    # The same, and five products, an addition and a difference.
    backward = 6 * values * dtype.itemsize
    work = Work(shape, backward, backward, 12 * values)
    yield _spec(_silu_mul_backward_kernel, dtype, f"i{size}", work, size, SIZE=size)


_HALF, _SINGLE = torch.bfloat16, torch.float32
KERNEL_SPECS = [
    *_norm_specs(1280, _HALF),
    *_norm_specs(2048, _HALF, all_variants=True),
    *_norm_specs(3584, _HALF),
    *_norm_specs(MOST_COLUMNS, _HALF),
    *_norm_specs(MOST_COLUMNS, _SINGLE),
    _rotate_spec(80, _HALF),
    _rotate_spec(128, _HALF),
    _rotate_spec(128, _HALF, inverse=True),
    _rotate_spec(128, _SINGLE),
    *_silu_specs(3420, _HALF),
    *_silu_specs(11008, _HALF),
    *_silu_specs(18944, _HALF),
    *_silu_specs(11008, _SINGLE),
]
