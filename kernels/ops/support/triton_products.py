"""Matrix products and rounding in and around Triton kernels, correct both on a GPU and under the interpreter.

Triton 3.9's interpreter multiplies the bit patterns of bfloat16 operands of ``tl.dot`` as if they were integers, and
rounds float32 to bfloat16 towards zero. Under the interpreter, operands of products are therefore first widened to
float32, which holds their exact values, and rounding is done on the bits. Compiled code needs neither. This module is
imported only where triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.support.launch import interpreting

_INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def product(x, y, total):
    """total + x y in float32; a ``total`` of None means 0. Products of float32 use IEEE precision, never TF32."""
    if _INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """The float32 ``x`` converted to ``dtype``, rounded to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # Rounding could overflow the bits of a NaN, so a NaN stays as it is. Rounding does not change an infinity.
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


def float32_product(x: Tensor, y: Tensor, total: Tensor | None = None) -> Tensor:
    """total + x @ y in float32, computed by torch; a ``total`` of None means 0. May write the result into ``total``."""
    if x.dtype != torch.float32 and x.device.type == "cpu":  # under the interpreter: ``out_dtype`` needs a GPU
        x, y = x.float(), y.float()
    if x.dtype == torch.float32:
        return x @ y if total is None else total.addmm_(x, y)
    if total is None:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.addmm(total, x, y, out_dtype=torch.float32)
