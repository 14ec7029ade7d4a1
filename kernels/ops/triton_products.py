"""Matrix products and rounding in and around Triton kernels, right on a GPU and under the interpreter. Imported with triton
only.

Triton 3.9's interpreter multiplies the bit patterns of bfloat16 operands of ``tl.dot`` as if they were integers, and
rounds float32 to bfloat16 towards zero. Interpreted, products are therefore of operands widened to float32, which holds
their exact values, and rounding is done on the bits. Compiled, each of the two is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.launch import interpreting

_INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def product(x, y, total):
    """total + x y in float32; ``total`` may be None. Float32 operands are multiplied in IEEE precision, never TF32."""
    if _INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Float32 ``x`` in ``dtype``, rounded to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # NaN's bits would overflow; an infinity's are its own.
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


def float32_product(x: Tensor, y: Tensor, total: Tensor | None = None) -> Tensor:
    """total (None: 0) + x @ y in float32, by torch; ``total`` may be written."""
    if x.dtype != torch.float32 and x.device.type == "cpu":  # interpreted: torch has this product on GPUs only
        x, y = x.float(), y.float()
    if x.dtype == torch.float32:
        return x @ y if total is None else total.addmm_(x, y)
    if total is None:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.addmm(total, x, y, out_dtype=torch.float32)
