"""The library's row-wise softmax (``csrc/linear_logprobs.cpp``) on torch tensors; what a head does between its products.

Logits are (n, V) float32, bfloat16 or float16 on the CPU, columns contiguous. Tensors with one value per row are (n,)
contiguous: targets int64, all else float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""As LogitsType in csrc/softmax.h."""


class SoftmaxRows(NamedTuple):
    """Of each token's softmax; all (T,) float32, contiguous. exp((logit - max) * scale) / sum is a probability."""

    max: Tensor
    sum: Tensor
    logprobs: Tensor
    """Of the targets."""

    def take(self, index: Tensor | slice) -> SoftmaxRows:
        """The rows of some tokens."""
        return SoftmaxRows(*(values[index] for values in self))

    @classmethod
    def empty(cls, num_tokens: int) -> SoftmaxRows:
        """Not yet written."""
        return cls(*(torch.empty(num_tokens) for _ in cls._fields))


class Tokens(NamedTuple):
    """Some tokens, one for each row of a buffer of logits; (n, ...) tensors."""

    hidden: Tensor
    targets: Tensor
    rows: SoftmaxRows
    grad_logprobs: Tensor

    def take(self, index: Tensor | slice) -> Tokens:
        """Some of them."""
        return Tokens(self.hidden[index], self.targets[index], self.rows.take(index), self.grad_logprobs[index])


def write_stats(logits: Tensor, targets: Tensor, scale: float, rows: SoftmaxRows, entropy: Tensor | None) -> None:
    """Writes ``rows`` and, where given, ``entropy`` (n,): one read of the logits.

    Raises:
        ValueError: a target outside of [0, V).
    """
    status = native.library().balcaprl_softmax_stats(
        *_row_arguments(logits),
        *logits.shape,
        scale,
        targets.data_ptr(),
        rows.max.data_ptr(),
        rows.sum.data_ptr(),
        rows.logprobs.data_ptr(),
        None if entropy is None else entropy.data_ptr(),
    )
    if status == native.BAD_TARGETS:
        raise ValueError(f"targets: expected token ids in [0, {logits.shape[1]})")
    _check(status)


def write_gradient(logits: Tensor, first_column: int, active: Tensor, tokens: Tokens, scale: float) -> None:
    """Writes the gradient over the logits, that of row ``active[i]`` into row i; the rows after those are used up.

    Args:
        logits: columns ``first_column`` and following of the vocabulary.
        first_column: targets count from the vocabulary's start.
        active: rising row numbers.
        tokens: of all rows.
        scale: 1 / temperature.
    """
    status = native.library().balcaprl_softmax_gradient(
        *_row_arguments(logits),
        first_column,
        logits.shape[1],
        active.data_ptr(),
        active.shape[0],
        scale,
        *_token_arguments(tokens),
    )
    _check(status)


def marked_columns(logits: Tensor, active: Tensor, tokens: Tokens, scale: float, eps: float) -> Tensor:
    """Rising numbers of the columns whose softmax reaches ``eps`` in an active row, and of those rows' targets."""
    marks = torch.empty(logits.shape[1], dtype=torch.uint8)
    targets, row_max, row_sum, *_ = _token_arguments(tokens)
    status = native.library().balcaprl_softmax_mark(
        *_row_arguments(logits),
        logits.shape[1],
        active.data_ptr(),
        active.shape[0],
        scale,
        targets,
        row_max,
        row_sum,
        eps,
        marks.data_ptr(),
    )
    _check(status)
    return marks.nonzero()[:, 0]


def gathered_gradient(logits: Tensor, active: Tensor, columns: Tensor, tokens: Tokens, scale: float) -> Tensor:
    """The gradient of some rows and columns, both rising, side by side: (rows, columns) in the logits' dtype."""
    out = logits.new_empty(active.shape[0], columns.shape[0])
    status = native.library().balcaprl_softmax_gather_gradient(
        *_row_arguments(logits),
        active.data_ptr(),
        active.shape[0],
        columns.data_ptr(),
        columns.shape[0],
        scale,
        *_token_arguments(tokens),
        out.data_ptr(),
    )
    _check(status)
    return out


def _row_arguments(logits: Tensor) -> tuple[int, int, int]:
    assert logits.stride(1) == 1 or logits.shape[1] <= 1
    return DTYPES.index(logits.dtype), logits.data_ptr(), logits.stride(0)


def _token_arguments(tokens: Tokens) -> tuple[int, int, int, int, int]:
    per_row = (tokens.targets, *tokens.rows, tokens.grad_logprobs)
    assert all(values.is_contiguous() for values in per_row)
    assert all(values.dtype == torch.float32 for values in per_row[1:])
    targets, row_max, row_sum, logprobs, grad_logprobs = (values.data_ptr() for values in per_row)
    return targets, row_max, row_sum, logprobs, grad_logprobs


def _check(status: int) -> None:
    if status != native.OK:
        raise RuntimeError(f"the native library refused its arguments (status {status}): this is a bug in balcaprl")
