"""``impl="triton"`` of ``shared_prefix_attention``: launches the kernels of ``triton_kernels.py``, and specifies for
the compile suite the requirements on their machine code. This module is imported only where Triton kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from balcaprl.kernels.shared_prefix.layout import TRITON_MAX_HEAD_DIM, SharedPrefixLayout
from balcaprl.kernels.shared_prefix.records import AttentionInputs, Gradients
from balcaprl.kernels.shared_prefix.triton_kernels import (
    _shared_prefix_delta_kernel,
    _shared_prefix_dkdv_kernel,
    _shared_prefix_dq_kernel,
    _shared_prefix_fwd_kernel,
)
from balcaprl.kernels.support.launch import TRITON_TYPES, KernelSpec, Launch, Work, launch, on_device


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Computes (out, lse) as ``records.py`` defines them.

    Raises:
        ValueError: ``head_dim`` is above ``TRITON_MAX_HEAD_DIM``, or the dtype is float64.
    """
    _check(inputs.query)
    strided = [_addressable(x) for x in inputs[:3]]
    num_tokens, num_heads, _ = inputs.query.shape
    out = inputs.query.new_empty(inputs.query.shape)
    lse = inputs.query.new_empty((num_heads, num_tokens), dtype=torch.float32)
    _run_over_queries(_shared_prefix_fwd_kernel, strided, (out, lse), inputs.layout, inputs.scale)
    return out, lse


def backward(grad_out: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> Gradients:
    """Computes the three gradients as ``records.py`` defines them."""
    grad_query, *parts = backward_in_parts(grad_out, inputs, out, lse)
    grad_key, grad_value = (x[0] if x.shape[0] == 1 else x.sum(0).to(inputs.key.dtype) for x in parts)
    return grad_query, grad_key, grad_value


def backward_in_parts(grad_out: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> Gradients:
    """The gradient of the query, and the gradients of key and value as P parts each (P, T, H_kv, head_dim), which the
    caller adds up; parts are float32 if there is more than one."""
    query, key, value, grad_out = (_addressable(x) for x in (*inputs[:3], grad_out))
    saved = _Saved(query, key, value, grad_out, lse.contiguous(), _delta(out.contiguous(), grad_out))
    grad_query = query.new_empty(query.shape)
    others = (saved.lse, saved.delta, grad_query)
    _run_over_queries(_shared_prefix_dq_kernel, saved[:4], others, inputs.layout, inputs.scale)
    return grad_query, *_grad_key_value(saved, inputs.layout, inputs.scale)


class _Saved(NamedTuple):
    """The inputs of both gradient kernels, in the order of their arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor


def _delta(out: Tensor, grad_out: Tensor) -> Tensor:
    """The sum of out * grad_out over columns, (H, T) float32."""
    num_tokens, num_heads, _ = out.shape
    delta = out.new_empty((num_heads, num_tokens), dtype=torch.float32)
    row = launch("_shared_prefix_delta_kernel", out.device, out.dtype)
    grid = (triton.cdiv(num_tokens, row.blocks["BLOCK_T"]) * num_heads,)
    _run(_shared_prefix_delta_kernel, grid, row, out, grad_out, delta, *_strides(grad_out), num_tokens, num_heads)
    return delta


def _run_over_queries(
    kernel: Any, strided: Sequence[Tensor], others: Sequence[Tensor], layout: SharedPrefixLayout, scale: float
) -> None:
    """Launches a kernel whose programs own tiles of queries.

    The kernel's first arguments are the tensors ``strided``, which begin with query and key and whose strides it also
    takes, and then the tensors ``others``, which are contiguous.
    """
    query, num_kv_heads = strided[0], strided[1].shape[1]
    num_tokens, num_heads, _ = query.shape
    row = launch(kernel.__name__, query.device, query.dtype)
    num_tiles = layout.most_tiles(row.blocks["BLOCK_M"])
    grid = (layout.num_groups * num_tiles * num_heads,)
    lengths = (layout.starts, layout.cu_groups, layout.cu_prompts)
    counts = (num_tokens, num_tiles, num_kv_heads, num_heads // num_kv_heads)
    _run(kernel, grid, row, *strided, *others, *lengths, *_strides(*strided), *counts, scale)


def _grad_key_value(saved: _Saved, layout: SharedPrefixLayout, scale: float) -> tuple[Tensor, Tensor]:
    key = saved.key
    num_tokens, num_kv_heads, _ = key.shape
    repeats = saved.query.shape[1] // num_kv_heads
    row = launch("_shared_prefix_dkdv_kernel", key.device, key.dtype)
    num_tiles = layout.most_tiles(row.blocks["BLOCK_N"])
    programs = layout.num_groups * num_tiles * num_kv_heads
    heads_per_part = _heads_per_part(programs, repeats, key.device)
    parts = triton.cdiv(repeats, heads_per_part)
    dtype = key.dtype if parts == 1 else torch.float32
    grad_key, grad_value = (key.new_empty((parts, *key.shape), dtype=dtype) for _ in range(2))
    _run(
        _shared_prefix_dkdv_kernel,
        (programs, parts),
        row,
        *saved,
        grad_key,
        grad_value,
        layout.ends,
        layout.cu_groups,
        layout.cu_prompts,
        *_strides(*saved[:4]),
        grad_key.stride(0),
        num_tokens,
        num_tiles,
        num_kv_heads,
        repeats,
        heads_per_part,
        scale,
    )
    return grad_key, grad_value


def _run(kernel: Any, grid: tuple[int, ...], row: Launch, *arguments: Tensor | float) -> None:
    """Launches a kernel on the device of its first argument, a tensor (T, heads, head_dim)."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    with on_device(first.device):
        kernel[grid](*arguments, HEAD_DIM=first.shape[2], **_split(first.shape[2]), **row.kwargs())


def _heads_per_part(programs: int, repeats: int, device: torch.device) -> int:
    """Number of query heads that one program of the key gradient goes through: all that share the key head, or fewer if
    that would make fewer than two programs for each streaming multiprocessor."""
    multiprocessors = _multiprocessors(device) if device.type == "cuda" else 1
    wanted_parts = triton.cdiv(2 * multiprocessors, max(programs, 1))
    return max(1, repeats // min(wanted_parts, repeats))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(query: Tensor) -> None:
    if query.dtype not in TRITON_TYPES:
        raise ValueError(f"impl: 'triton' has no {query.dtype}; use 'reference' or 'auto'")
    size, largest = query.shape[-1], TRITON_MAX_HEAD_DIM
    if not 1 <= size <= largest:
        raise ValueError(f"query: impl 'triton' has head sizes from 1 to {largest}, not {size}; use 'auto'")


def _addressable(x: Tensor) -> Tensor:
    """``x``, or a copy if its columns are not contiguous or offsets within a tile of 256 tokens exceed 31 bits."""
    return x if x.stride(2) == 1 and 256 * x.stride(0) < 2**31 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """The token stride and the head stride of each tensor, one tensor after the other."""
    return [stride for x in tensors for stride in x.stride()[:2]]


@functools.cache
def _split(head_dim: int) -> dict[str, int]:
    """Splits a head's columns into two parts that are powers of two, each at least 16 as the matrix products require;
    the second may be 0."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return {"D0": first, "D1": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0}


# The compile suite's shape: 8 groups, each with a prompt of 1024 tokens and 8 completions of 128 tokens;
# Qwen2.5-VL-3B's heads.
_GROUPS, _COMPLETIONS, _PROMPT, _COMPLETION = 8, 8, 1024, 128
_HEADS, _KV_HEADS = 16, 2
_TOKENS = _GROUPS * (_PROMPT + _COMPLETIONS * _COMPLETION)
_PAIRS = _GROUPS * (
    _PROMPT * (_PROMPT + 1) // 2 + _COMPLETIONS * (_COMPLETION * _PROMPT + _COMPLETION * (_COMPLETION + 1) // 2)
)
_SHAPE = f"B={_GROUPS} G={_COMPLETIONS} prompt={_PROMPT} completion={_COMPLETION} H={_HEADS} H_kv={_KV_HEADS}"
_STRIDES = [f"{name}_stride_{axis}" for name in ("query", "key", "value", "grad") for axis in "TH"]
_COUNTS = ("num_tokens", "num_tiles", "num_kv_heads", "repeats")


def _keys_read(row: Launch) -> int:
    """Number of keys that all tiles of queries of one head and one group load together."""
    block_m, block_n = row.blocks["BLOCK_M"], row.blocks["BLOCK_N"]
    prompt = sum(_tiled(begin, block_n) + _tiled(block_m, block_n) for begin in range(0, _PROMPT, block_m))
    own = 0
    for begin in range(0, _COMPLETIONS * _COMPLETION, block_m):
        own += _tiled(_PROMPT, block_n) + _tiled(block_m + begin % _COMPLETION, block_n)
    return prompt + own


def _queries_read(row: Launch) -> int:
    """Number of queries that all tiles of keys of one head and one group load together."""
    block_m, block_n = row.blocks["BLOCK_M"], row.blocks["BLOCK_N"]
    total = _COMPLETIONS * _COMPLETION
    prompt = sum(_tiled(_PROMPT - begin + total, block_m) for begin in range(0, _PROMPT, block_n))
    own = 0
    for begin in range(0, total, block_n):
        end = _tiled(min(begin + block_n, total), _COMPLETION)
        own += _tiled(end - begin, block_m)
    return prompt + own


def _tiled(length: int, block: int) -> int:
    return -(-length // block) * block


def _work(
    head_dim: int,
    dtype: torch.dtype,
    row: Launch,
    *,
    query_rows: int,
    statistics: int,
    key_rows: int,
    products: int,
    by_keys: bool = False,
) -> Work:
    """The work of a kernel that computes products for all pairs of a query and a key that the query sees.

    Args:
        head_dim: columns of a head.
        dtype: storage dtype of the tensors.
        row: tile sizes.
        query_rows: number of tensors (T, H, head_dim) that it reads or writes.
        statistics: number of float32 tensors (H, T) that it reads or writes.
        key_rows: number of tensors (T, H_kv, head_dim) that it reads or writes.
        products: number of matrix products.
        by_keys: whether a program owns a tile of keys and reads the queries repeatedly; otherwise the other way round.
    """
    size = head_dim * dtype.itemsize
    queries = _TOKENS * _HEADS * (query_rows * size + 4 * statistics)
    keys = key_rows * _TOKENS * _KV_HEADS * size
    if by_keys:
        moved = keys + _GROUPS * _HEADS * _queries_read(row) * (2 * size + 8)
    else:
        moved = queries + 2 * _GROUPS * _HEADS * _keys_read(row) * size
    operations = 2 * products * _PAIRS * _HEADS * head_dim
    unit: Literal["tensor", "fp32"] = "tensor" if dtype.itemsize == 2 else "fp32"
    return Work(f"{_SHAPE} D={head_dim}", queries + keys, moved, operations, unit)


def _delta_work(head_dim: int, dtype: torch.dtype, _: Launch) -> Work:
    moved = _TOKENS * _HEADS * (2 * head_dim * dtype.itemsize + 4)
    return Work(f"{_SHAPE} D={head_dim}", moved, moved, 2 * _TOKENS * _HEADS * head_dim)


_WORK: dict[Any, Callable[[int, torch.dtype, Launch], Work]] = {
    _shared_prefix_fwd_kernel: functools.partial(_work, query_rows=2, statistics=1, key_rows=2, products=2),
    _shared_prefix_delta_kernel: _delta_work,
    _shared_prefix_dq_kernel: functools.partial(_work, query_rows=3, statistics=2, key_rows=2, products=3),
    _shared_prefix_dkdv_kernel: functools.partial(
        _work, query_rows=2, statistics=2, key_rows=4, products=4, by_keys=True
    ),
}


def _spec(kernel: Any, head_dim: int, dtype: torch.dtype) -> KernelSpec:
    types = dict.fromkeys(("starts_T", "ends_T", "cu_groups", "cu_prompts"), "*i32")
    types |= dict.fromkeys(("lse_HT", "delta_HT"), "*fp32")
    types |= dict.fromkeys((*_STRIDES, *_COUNTS, "num_heads", "heads_per_part", "part_stride"), "i32")
    types["scale"] = "fp32"
    constexprs = {"HEAD_DIM": head_dim, **_split(head_dim)}
    streams = kernel is _shared_prefix_delta_kernel
    return KernelSpec(
        kernel=kernel,
        dtype=dtype,
        arguments={
            name: types.get(name, f"*{TRITON_TYPES[dtype]}")
            for name in kernel.arg_names
            if name not in constexprs and not name.startswith("BLOCK")
        },
        constexprs=constexprs,
        work=lambda row: _WORK[kernel](head_dim, dtype, row),
        variant=f"d{head_dim}",
        divisible=frozenset({*_STRIDES, "part_stride"}),
        wide_store=not streams,
        tensor_core=dtype.itemsize == 2 and not streams,
    )


_VARIANTS = [(d, torch.bfloat16) for d in (64, 80, 96, 128)] + [
    (128, torch.float16),
    (80, torch.float32),
    (128, torch.float32),
]
KERNEL_SPECS = [_spec(kernel, *variant) for kernel in _WORK for variant in _VARIANTS]
