"""The only kernel that ``transformer_block`` alone uses: it undoes the rotation of the gradients of query and key, and
writes them and the gradient of value into one tensor. The block's other kernels are those of ``layers/triton.py`` and
``shared_prefix/triton.py``. This module is imported only where Triton runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.support.launch import TRITON_TYPES, KernelSpec, Launch, Work, launch, on_device
from balcaprl.kernels.support.triton_products import narrowed


def join_heads(grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of [query | key | value] before rotation, computed from the gradients after rotation.

    Args:
        grad_query: (T, H, head_dim), contiguous.
        grad_key: (P, T, H_kv, head_dim), contiguous: P parts, which are added in float32, in order.
        grad_value: (P, T, H_kv, head_dim), contiguous: P parts, as for the key.
        cos: (T, head_dim) cosines, contiguous.
        sin: (T, head_dim) sines, contiguous.

    Returns:
        (T, H + 2 H_kv, head_dim) in the dtype of ``grad_query``.
    """
    num_tokens, num_heads, head_dim = grad_query.shape
    parts, _, num_kv_heads, _ = grad_key.shape
    out = grad_query.new_empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    if not num_tokens:
        return out
    row = launch("_join_heads_kernel", out.device, out.dtype)
    grid = (triton.cdiv(num_tokens, row.blocks["BLOCK_T"]), num_heads + 2 * num_kv_heads)
    with on_device(out.device):
        _join_heads_kernel[grid](
            grad_query,
            grad_key,
            grad_value,
            cos.contiguous(),
            sin.contiguous(),
            out,
            num_tokens,
            parts,
            num_heads,
            num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim // 2),
            **row.kwargs(),
        )
    return out


@triton.jit(do_not_specialize=["num_tokens", "parts"])
def _join_heads_kernel(
    grad_query,
    grad_key,
    grad_value,
    cos,
    sin,
    out,
    num_tokens,
    parts,
    num_heads,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Writes BLOCK_T tokens of one head. Rotation turns (x1, x2) into (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), so a
    gradient (g1, g2) of its result gives the gradient (g1 cos1 + g2 sin2, g2 cos2 - g1 sin1) of (x1, x2)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    mask = (tokens < num_tokens)[:, None] & (columns < HALF)[None, :]
    rows = tl.cast(tokens, tl.int64)[:, None]
    if head < num_heads:
        source = (rows * num_heads + head) * HEAD_DIM + columns[None, :]
        low = tl.load(grad_query + source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(grad_query + source + HALF, mask=mask, other=0.0).to(tl.float32)
    else:
        low = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        high = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        is_key = head < num_heads + num_kv_heads
        own = tl.where(is_key, head - num_heads, head - num_heads - num_kv_heads)
        source = (rows * num_kv_heads + own) * HEAD_DIM + columns[None, :]
        size = tl.cast(num_tokens, tl.int64) * num_kv_heads * HEAD_DIM
        base = grad_value
        if is_key:
            base = grad_key
        for part in range(parts):
            low += tl.load(base + part * size + source, mask=mask, other=0.0).to(tl.float32)
            high += tl.load(base + part * size + source + HALF, mask=mask, other=0.0).to(tl.float32)
    angles = rows * HEAD_DIM + columns[None, :]
    turned = mask & (tl.zeros_like(columns) + head < num_heads + num_kv_heads)[None, :]
    cos1 = tl.load(cos + angles, mask=turned, other=1.0).to(tl.float32)
    cos2 = tl.load(cos + angles + HALF, mask=turned, other=1.0).to(tl.float32)
    sin1 = tl.load(sin + angles, mask=turned, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angles + HALF, mask=turned, other=0.0).to(tl.float32)
    target = out + (rows * (num_heads + 2 * num_kv_heads) + head) * HEAD_DIM + columns[None, :]
    tl.store(target, narrowed(low * cos1 + high * sin2, out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, narrowed(high * cos2 - low * sin1, out.dtype.element_ty), mask=mask)


# The compile suite's shapes: the heads of Qwen2.5-VL-3B's decoder, and of its image tower.
_TOKENS = 8192
_VARIANTS = {"d128": (16, 2, 128), "d80": (16, 16, 80)}


def _work(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Work:
    values = _TOKENS * (num_heads + 2 * num_kv_heads) * head_dim
    angles = 2 * _TOKENS * head_dim * dtype.itemsize
    moved = 2 * values * dtype.itemsize
    read_again = angles * (num_heads + num_kv_heads)
    shape = f"T={_TOKENS} H={num_heads} H_kv={num_kv_heads} D={head_dim}"
    return Work(shape, moved + angles, moved + read_again, 6 * values)


def _spec(variant: str, dtype: torch.dtype) -> KernelSpec:
    num_heads, num_kv_heads, head_dim = _VARIANTS[variant]
    pointers = dict.fromkeys(("grad_query", "grad_key", "grad_value", "cos", "sin", "out"), f"*{TRITON_TYPES[dtype]}")
    counts = dict.fromkeys(("num_tokens", "parts", "num_heads", "num_kv_heads"), "i32")

    def work(_: Launch) -> Work:
        return _work(num_heads, num_kv_heads, head_dim, dtype)

    return KernelSpec(
        kernel=_join_heads_kernel,
        dtype=dtype,
        arguments={**pointers, **counts},
        constexprs={"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim // 2)},
        work=work,
        variant=variant,
    )


KERNEL_SPECS = [_spec(variant, dtype) for variant in _VARIANTS for dtype in (torch.bfloat16, torch.float32)]
