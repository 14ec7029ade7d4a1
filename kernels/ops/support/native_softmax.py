"""The library's row-wise softmax (``csrc/linear_logprobs.cpp``) on torch tensors, for logits that are stored.

Logits are (n, V) float32, bfloat16 or float16 on the CPU; the values of a row are contiguous. Tensors with one value
per row are (n,) and contiguous; targets are int64, all others float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.support import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of logits; their order must match the codes of LogitsType in csrc/softmax.h."""


class SoftmaxRows(NamedTuple):
    """Softmax statistics of each token; all (T,) and contiguous, float32 except in the float64 reference.

    A probability is exp((logit - max) * scale) / sum, with scale = 1 / temperature.
    """

    max: Tensor
    sum: Tensor
    logprobs: Tensor
    """Log-probabilities of the targets."""

    def take(self, index: Tensor | slice) -> SoftmaxRows:
        """Selects the rows of some tokens."""
        return SoftmaxRows(*(values[index] for values in self))

    @classmethod
    def empty(cls, num_tokens: int) -> SoftmaxRows:
        """Makes uninitialised float32 rows."""
        return cls(*(torch.empty(num_tokens) for _ in cls._fields))


class Tokens(NamedTuple):
    """Data of some tokens, one token for each row of a buffer of logits; every tensor is (n, ...)."""

    hidden: Tensor
    targets: Tensor
    rows: SoftmaxRows
    grad_logprobs: Tensor

    def take(self, index: Tensor | slice) -> Tokens:
        """Selects some of the tokens."""
        return Tokens(self.hidden[index], self.targets[index], self.rows.take(index), self.grad_logprobs[index])


def write_stats(logits: Tensor, targets: Tensor, scale: float, rows: SoftmaxRows, entropy: Tensor | None) -> None:
    """Writes ``rows``, and ``entropy`` (n,) if it is given, with one read of the logits.

    Raises:
        ValueError: a target is outside [0, V).
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
    """Writes the gradient of row ``active[i]`` over row i of the logits; rows from ``len(active)`` on become unusable.

    Args:
        logits: (n, columns) logits of consecutive columns of the vocabulary.
        first_column: index of the first of these columns in the vocabulary; targets are indices in the vocabulary.
        active: indices of the rows whose gradient is written, int64, ascending.
        tokens: data of all n rows.
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
    """Ascending indices of the columns whose softmax is at least ``eps``, or that are the target, in any active row."""
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
    """Gradient at the ascending rows ``active`` and ``columns``: (rows, columns) in the dtype of the logits."""
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
