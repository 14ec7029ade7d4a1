"""First operands of torch's matrix products on a CPU, so laid out that the product reads nothing beside them.

oneDNN multiplies bfloat16 on AMX in blocks of 32 columns (64 bytes) of the first operand. Where rows do not lie one
after the other and their number of columns is no multiple of that, it has been seen to read on past the last column, into
the gap between two rows, and behind the last row. The rest of the block is multiplied with zeros, which is right for
numbers; but memory that nobody has written may hold NaN. ``bench/strided_bf16_product.py`` shows it without this package.

So whatever may be strided goes through ``gapless`` before it is a first operand, transposed ones as well. It costs a copy
in those cases alone, and nothing in others, on a GPU or in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK_COLUMNS = 32
"""16-bit columns that the product takes at once."""
_SIZES = (15, 33, 34, 80, 129)
_WIDER = 7


def gapless(matrix: Tensor) -> Tensor:
    """The matrix, or a copy of it where a product with it as the first operand could read beside it.

    Args:
        matrix: (..., M, K), or a transposed view of such; a vector is returned as it is.

    Returns:
        The same values in the same orientation; differentiable. A copy only of 16-bit numbers on a CPU whose rows are
        neither whole blocks nor one after the other.
    """
    if not _may_be_read_beside(matrix) or matrix.dim() < 2:
        return matrix
    if matrix.stride(-1) != 1 and matrix.stride(-2) == 1:
        return gapless(matrix.mT).mT
    if matrix.stride(-1) == 1 and (matrix.shape[-1] % BLOCK_COLUMNS == 0 or has_no_gaps(matrix)):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def has_no_gaps(matrix: Tensor) -> bool:
    """Whether the rows of (..., M, K) lie one after the other.

    ``is_contiguous()`` takes any stride for a single row, and oneDNN is told that stride.
    """
    columns, distance = matrix.shape[-1], matrix.stride(-2)
    return distance == columns or (matrix.shape[-2] == 1 and distance < columns)


def with_gapless_gradient(x: Tensor) -> Tensor:
    """The same tensor; the gradient that comes back to it is ``gapless``."""
    return _GaplessGradient.apply(x) if _may_be_read_beside(x) and x.requires_grad else x


def _may_be_read_beside(x: Tensor) -> bool:
    return x.element_size() == 2 and x.device.type == "cpu"


class _GaplessGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gapless(gradient)


def reads_gaps(*, protected: bool = False) -> bool:
    """Whether this torch, on this processor, reads beside a strided bfloat16 operand: NaN in the gaps comes out.

    Args:
        protected: with the operand that ``gapless`` makes of it.
    """
    for columns in _SIZES:
        wide = torch.full((33, columns + _WIDER), torch.nan, dtype=torch.bfloat16)
        strided = wide[:, :columns].fill_(1.0)
        first = gapless(strided) if protected else strided
        if not torch.mm(first, torch.ones(columns, 64, dtype=torch.bfloat16)).isfinite().all():
            return True
    return False
