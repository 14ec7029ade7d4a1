"""Memory layouts for which a CPU matrix product of torch reads nothing outside its first operand.

oneDNN multiplies bfloat16 on AMX in blocks of 32 columns (64 bytes) of the first operand. If the rows are not adjacent
in memory and the number of columns is not a multiple of 32, oneDNN has been seen to read past the last column, into the
gap between two rows, and past the end of the last row. It multiplies what it reads there by zeros, which is correct for
finite numbers; but uninitialised memory may hold NaN. ``bench/strided_bf16_product.py`` shows the fault without this
package.

Every operand that may be strided, transposed operands included, therefore goes through ``gapless`` before it becomes a
first operand. ``gapless`` copies only where the fault is possible; otherwise, and always on a GPU or in float32, it
costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK_COLUMNS = 32
"""Number of 16-bit columns that the product processes at once."""
_SIZES = (15, 33, 34, 80, 129)
_WIDER = 7


def gapless(matrix: Tensor) -> Tensor:
    """Returns the matrix, or a copy if a product with it as the first operand could read memory outside it.

    Args:
        matrix: (..., M, K) matrices, or a transposed view of such matrices; a vector is returned as it is.

    Returns:
        The same values in the same orientation; differentiable. The result is a copy only for 16-bit matrices on a CPU
        whose rows are neither adjacent nor made of whole blocks.
    """
    if not _may_be_read_beside(matrix) or matrix.dim() < 2:
        return matrix
    if matrix.stride(-1) != 1 and matrix.stride(-2) == 1:
        return gapless(matrix.mT).mT
    if matrix.stride(-1) == 1 and (matrix.shape[-1] % BLOCK_COLUMNS == 0 or has_no_gaps(matrix)):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def has_no_gaps(matrix: Tensor) -> bool:
    """Whether the rows of (..., M, K) are adjacent in memory.

    ``is_contiguous()`` is not enough: it accepts any stride for a single row, and oneDNN receives that stride.
    """
    columns, distance = matrix.shape[-1], matrix.stride(-2)
    return distance == columns or (matrix.shape[-2] == 1 and distance < columns)


def with_gapless_gradient(x: Tensor) -> Tensor:
    """Returns the same values; in the backward, their gradient goes through ``gapless``."""
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
    """Whether torch on this processor reads outside a strided bfloat16 operand.

    Fills the gaps between the rows with NaN and looks for NaN in the product.

    Args:
        protected: whether to pass the operand through ``gapless`` first.
    """
    for columns in _SIZES:
        wide = torch.full((33, columns + _WIDER), torch.nan, dtype=torch.bfloat16)
        strided = wide[:, :columns].fill_(1.0)
        first = gapless(strided) if protected else strided
        if not torch.mm(first, torch.ones(columns, 64, dtype=torch.bfloat16)).isfinite().all():
            return True
    return False
