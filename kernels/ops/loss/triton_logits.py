"""Triton kernels over logits: statistics of each row in one read, and its gradient in one more read and one write.

Between the two, ``token_loss`` turns log-probabilities into their gradient. Arithmetic on logits is in float32.
``logits_policy_loss`` uses these kernels, and so do the head's chunks (``head.triton_chunks``), whose logits are
float32 and whose gradient is in the storage dtype.

Both kernels are bound by memory. A program of the first streams all tiles of a row, one of the second handles a single
tile; each thread loads 16 bytes at a time. Rows are addressed with 64-bit offsets. This module is imported only where
``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.support.launch import TRITON_TYPES, KernelSpec, Launch, Work, launch, on_device
from balcaprl.kernels.support.native_softmax import SoftmaxRows
from balcaprl.kernels.support.triton_math import expm1_float32
from balcaprl.kernels.support.triton_products import narrowed

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _finite(highest):
    """``highest``, or 0 where it is -inf (all values are). Subtracting 0 there gives sums of 0 instead of NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _logits_stats_kernel(
    logits_TV,
    targets_T,
    max_T,
    sum_T,
    logprobs_T,
    row_stride,
    vocabulary,
    scale,
    BLOCK_V: tl.constexpr,
):
    """One program per row: writes its maximum, the sum of exp((x - max) * scale), and the target's log-probability."""
    token = tl.program_id(0).to(tl.int64)
    row = logits_TV + token * row_stride
    # Each lane covers the values in 16 bytes, one load of its thread, and keeps their running maximum and sum of
    # exponentials over all tiles, so threads exchange nothing before the end.
    PACK: tl.constexpr = 128 // logits_TV.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK_V // PACK
    columns = tl.arange(0, LANES)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    to_exp2 = scale * _LOG2E
    highest = tl.full((LANES,), float("-inf"), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    for begin in range(0, vocabulary, BLOCK_V):
        tile = tl.load(row + begin + columns, mask=begin + columns < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(tile, axis=1))
        base = _finite(higher)
        exps = tl.exp2((tile - base[:, None]) * to_exp2)
        sums = sums * tl.exp2((highest - base) * to_exp2) + tl.sum(exps, axis=1)
        highest = higher
    row_max = tl.max(highest, axis=0)
    total = tl.sum(sums * tl.exp2((highest - _finite(row_max)) * to_exp2), axis=0)
    target = tl.load(targets_T + token)
    # The logit of a target outside of [0, V) is not read but taken as NaN, which the caller finds.
    inside = (target >= 0) & (target < vocabulary)
    chosen = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(max_T + token, row_max)
    tl.store(sum_T + token, total)
    # Computed in float64 and rounded once, because an error here becomes an error of the loss's ratio.
    logprob = (chosen.to(tl.float64) - row_max.to(tl.float64)) * scale - tl.log(total.to(tl.float64))
    tl.store(logprobs_T + token, logprob.to(tl.float32))


@triton.jit
def _logits_gradient_kernel(
    logits_TV,
    grad_logits_TV,
    targets_T,
    max_T,
    sum_T,
    logprobs_T,
    grad_logprobs_T,
    grad_loss,
    tokens_N,
    row_stride,
    grad_row_stride,
    vocabulary,
    scale,
    BLOCK_V: tl.constexpr,
):
    """One program per tile of a row: writes the gradient of the logits.

    ``grad_logits_TV`` may be ``logits_TV``, because the thread that writes a value is the one that reads it. With
    ``tokens_N``, row n of the output belongs to token tokens_N[n].
    """
    row = tl.program_id(0).to(tl.int64)
    token = row if tokens_N is None else tl.load(tokens_N + row)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < vocabulary
    out = grad_logits_TV + row * grad_row_stride + columns
    gradient = tl.load(grad_logprobs_T + token) * tl.load(grad_loss).to(tl.float32) * scale
    if gradient == 0.0:
        # The token is clipped or has no advantage, so its logits need not be read.
        tl.store(out, tl.zeros((BLOCK_V,), grad_logits_TV.dtype.element_ty), mask=mask)
    else:
        tile = tl.load(logits_TV + token * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        # The quotient is rounded to nearest, because its error affects the whole row.
        coefficient = tl.div_rn(-gradient, tl.load(sum_T + token))
        values = tl.exp2((tile - tl.load(max_T + token)) * (scale * _LOG2E)) * coefficient
        # 1 - p is computed as -expm1(log p), which stays accurate when p is near 1.
        at_target = -gradient * expm1_float32(tl.load(logprobs_T + token))
        values = tl.where(columns == tl.load(targets_T + token), at_target, values)
        tl.store(out, narrowed(values, grad_logits_TV.dtype.element_ty), mask=mask)


def stats(logits: Tensor, targets: Tensor, scale: float) -> SoftmaxRows:
    """One read of the logits gives each token's maximum, sum of exponentials and log-probability (``SoftmaxRows``).

    Args:
        logits: (T, V) float32, bfloat16 or float16, columns contiguous.
        targets: (T,) int64, contiguous. A target outside of [0, V) gives a log-probability of NaN.
        scale: 1 / temperature.
    """
    num_tokens, vocabulary = logits.shape
    rows = SoftmaxRows(*(logits.new_empty(num_tokens, dtype=torch.float32) for _ in SoftmaxRows._fields))
    if num_tokens:
        row = launch("_logits_stats_kernel", logits.device, logits.dtype)
        with on_device(logits.device):
            _logits_stats_kernel[(num_tokens,)](
                logits, targets, *rows, logits.stride(0), vocabulary, scale, **row.kwargs()
            )
    return rows


def gradient(
    logits: Tensor,
    targets: Tensor,
    rows: SoftmaxRows,
    grad_logprobs: Tensor,
    grad_loss: Tensor,
    scale: float,
    out: Tensor,
    tokens: Tensor | None = None,
) -> None:
    """Writes the gradient of the logits: reads the rows that have a gradient once, and writes all rows once.

    Args:
        logits: (T, V) logits, as for ``stats``.
        targets: (T,) int64, contiguous.
        rows: softmax rows from ``stats``.
        grad_logprobs: (T,) float32 gradient of the log-probabilities, contiguous.
        grad_loss: one value, float32 or float64, on the device; it multiplies ``grad_logprobs``.
        scale: 1 / temperature.
        out: (T, V) tensor for the gradient, columns contiguous; may be ``logits``.
        tokens: (N,) int64, the token of each row of ``out``, which is then (N, V). None means all tokens, in order.
    """
    vocabulary = logits.shape[1]
    if not out.numel():
        return
    row = launch("_logits_gradient_kernel", logits.device, logits.dtype)
    grid = (out.shape[0], triton.cdiv(vocabulary, row.blocks["BLOCK_V"]))
    with on_device(logits.device):
        _logits_gradient_kernel[grid](
            logits,
            out,
            targets,
            *rows,
            grad_logprobs,
            grad_loss,
            tokens,
            logits.stride(0),
            out.stride(0),
            vocabulary,
            scale,
            **row.kwargs(),
        )


# The compile suite's shape: the head of Qwen2.5-VL-3B over 8192 completion tokens.
_TOKENS, _VOCABULARY = 8192, 151936
_ROWS = {"targets_T": "*i64", "max_T": "*fp32", "sum_T": "*fp32", "logprobs_T": "*fp32"}
_SIZES = {"row_stride": "i32", "vocabulary": "i32", "scale": "fp32"}


def _stats_spec(dtype: torch.dtype) -> KernelSpec:
    def work(_: Launch) -> Work:
        size = _TOKENS * _VOCABULARY
        moved = size * dtype.itemsize + 20 * _TOKENS
        # Operations per logit, at most: a difference, a product, exp2, an addition and the maximum; 7 with each lane's
        # rescaling.
        return Work(f"T={_TOKENS} V={_VOCABULARY}", moved, moved + dtype.itemsize * _TOKENS, 7 * size)

    return KernelSpec(
        kernel=_logits_stats_kernel,
        dtype=dtype,
        arguments={"logits_TV": f"*{TRITON_TYPES[dtype]}", **_ROWS, **_SIZES},
        constexprs={},
        work=work,
        divisible=frozenset({"row_stride", "vocabulary"}),
    )


def _gradient_spec(dtype: torch.dtype, chunk: bool = False) -> KernelSpec:
    """The specification of the gradient kernel. With ``chunk`` it is the variant that ``head.triton_chunks`` uses: from
    float32 logits to a bfloat16 gradient of listed tokens."""
    out = torch.bfloat16 if chunk else dtype

    def work(launch_row: Launch) -> Work:
        size = _TOKENS * _VOCABULARY
        moved = size * (dtype.itemsize + out.itemsize) + 24 * _TOKENS
        repeated = 24 * _TOKENS * (-(-_VOCABULARY // launch_row.blocks["BLOCK_V"]) - 1)
        # Operations per logit: a difference, exp2, two products, and the choice between target and other columns.
        return Work(f"T={_TOKENS} V={_VOCABULARY}", moved, moved + repeated, 5 * size)

    tokens = {"tokens_N": "*i64"} if chunk else {}
    return KernelSpec(
        kernel=_logits_gradient_kernel,
        dtype=dtype,
        arguments={
            "logits_TV": f"*{TRITON_TYPES[dtype]}",
            "grad_logits_TV": f"*{TRITON_TYPES[out]}",
            **_ROWS,
            "grad_logprobs_T": "*fp32",
            "grad_loss": "*fp32",
            **tokens,
            **_SIZES,
            "grad_row_stride": "i32",
        },
        constexprs={} if chunk else {"tokens_N": None},
        work=work,
        variant="chunk" if chunk else "",
        divisible=frozenset({"row_stride", "grad_row_stride", "vocabulary"}),
        wide_store=True,
    )


KERNEL_SPECS = [
    *(make(dtype) for make in (_stats_spec, _gradient_spec) for dtype in TRITON_TYPES),
    _gradient_spec(torch.float32, chunk=True),
]
