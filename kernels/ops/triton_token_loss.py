"""Triton kernels of ``token_loss``: one pass over the tokens gives gradients and a row of partial sums per program; a second
kernel adds the rows up, always in the same order, so that the same input gives the same bits. Nothing is read back.

Imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels import triton_math
from balcaprl.kernels.launch import KernelSpec, Launch, Work, launch, on_device
from balcaprl.kernels.token_loss import METRIC_SUMS, LossSettings, TokenBatch, TokenLoss

_NUM_SUMS: tl.constexpr = tl.constexpr(8)  # the loss, METRIC_SUMS, and one that is not used: rows stay aligned
_RATIO_MAX: tl.constexpr = tl.constexpr(1 + METRIC_SUMS.index("ratio_max"))


@triton.jit
def _token_loss_kernel(
    logprobs_T,
    old_logprobs_T,
    advantages_T,
    scale_T,
    sampling_logprobs_T,
    reference_logprobs_T,
    grad_logprobs_T,
    partials_PS,
    num_tokens,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    SAMPLING_CAP: tl.constexpr,
    KL_COEF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per block of tokens. Log-probabilities that are not there are None."""
    block = tl.program_id(0)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = tokens < num_tokens
    logprobs = tl.load(logprobs_T + tokens, mask=mask, other=0.0).to(tl.float64)
    advantages = tl.load(advantages_T + tokens, mask=mask, other=0.0).to(tl.float64)
    scale = tl.load(scale_T + tokens, mask=mask, other=0.0).to(tl.float64)
    old_logprobs = logprobs
    if old_logprobs_T is not None:
        old_logprobs = tl.load(old_logprobs_T + tokens, mask=mask, other=0.0).to(tl.float64)
    sampling_logprobs = old_logprobs
    if sampling_logprobs_T is not None:
        sampling_logprobs = tl.load(sampling_logprobs_T + tokens, mask=mask, other=0.0).to(tl.float64)
    reference_logprobs = logprobs
    if reference_logprobs_T is not None:
        reference_logprobs = tl.load(reference_logprobs_T + tokens, mask=mask, other=0.0).to(tl.float64)

    loss, gradient, clipped, ratio, k3_reference, k3_sampling = triton_math.token_loss(
        logprobs,
        old_logprobs,
        advantages,
        sampling_logprobs,
        reference_logprobs,
        CLIP_LOW,
        CLIP_HIGH,
        SAMPLING_CAP,
        KL_COEF,
    )
    tl.store(grad_logprobs_T + tokens, (gradient * scale).to(grad_logprobs_T.dtype.element_ty), mask=mask)
    # A token behind the end has log-probabilities and an advantage of 0: only its ratio is not 0.
    ratio = tl.where(mask, ratio, 0.0)
    row = partials_PS + block.to(tl.int64) * _NUM_SUMS
    tl.store(row + 0, tl.sum(loss * scale, axis=0))
    tl.store(row + 1, tl.sum(clipped, axis=0))
    tl.store(row + 2, tl.sum(ratio, axis=0))
    tl.store(row + 3, tl.max(ratio, axis=0))
    tl.store(row + 4, tl.sum(k3_reference, axis=0))
    tl.store(row + 5, tl.sum(k3_sampling, axis=0))
    tl.store(row + 6, tl.sum(tl.where(mask, 1.0, 0.0).to(tl.float64), axis=0))
    tl.store(row + 7, 0.0)


@triton.jit
def _token_sums_kernel(partials_PS, sums_S, num_partials, BLOCK_P: tl.constexpr):
    """One program adds up all rows, tile after tile; of the largest ratios it takes the largest."""
    columns = tl.arange(0, _NUM_SUMS)
    sums = tl.zeros((_NUM_SUMS,), tl.float64)
    for begin in range(0, num_partials, BLOCK_P):
        rows = begin + tl.arange(0, BLOCK_P)
        offsets = rows[:, None].to(tl.int64) * _NUM_SUMS + columns[None, :]
        tile = tl.load(partials_PS + offsets, mask=(rows < num_partials)[:, None], other=0.0)
        sums = tl.where(columns == _RATIO_MAX, tl.maximum(sums, tl.max(tile, axis=0)), sums + tl.sum(tile, axis=0))
    tl.store(sums_S + columns, sums)


def token_loss(logprobs_T: Tensor, batch: TokenBatch, settings: LossSettings) -> TokenLoss:
    """As ``balcaprl.kernels.token_loss.token_loss``, for float32 tensors on the GPU."""
    num_tokens, device = logprobs_T.shape[0], logprobs_T.device
    row = launch("_token_loss_kernel", device, logprobs_T.dtype)
    num_blocks = triton.cdiv(num_tokens, row.blocks["BLOCK_T"])
    partials_PS = torch.empty(num_blocks, _NUM_SUMS.value, dtype=torch.float64, device=device)
    sums_S = torch.empty(_NUM_SUMS.value, dtype=torch.float64, device=device)
    grad_logprobs_T = torch.empty_like(logprobs_T)
    with on_device(device):
        if num_blocks:
            _token_loss_kernel[(num_blocks,)](
                logprobs_T,
                *batch,
                grad_logprobs_T,
                partials_PS,
                num_tokens,
                settings.clip_low,
                settings.clip_high,
                settings.sampling_ratio_cap or 0.0,
                settings.kl_coef,
                **row.kwargs(),
            )
        sums_row = launch("_token_sums_kernel", device, torch.float64)
        _token_sums_kernel[(1,)](partials_PS, sums_S, num_blocks, **sums_row.kwargs())
    return TokenLoss(sums_S[0], sums_S[1 : 1 + len(METRIC_SUMS)], grad_logprobs_T)


# For the compile suite: 8192 completions of 256 tokens.
_TOKENS = 8192 * 256
_PER_TOKEN = ("logprobs_T", "old_logprobs_T", "advantages_T", "scale_T", "sampling_logprobs_T", "reference_logprobs_T")


def _token_loss_spec(*, full: bool) -> KernelSpec:
    """All terms, or the clipped ratio alone."""
    missing = () if full else ("sampling_logprobs_T", "reference_logprobs_T")
    given = [name for name in _PER_TOKEN if name not in missing]

    def work(launch_row: Launch) -> Work:
        moved = 4 * _TOKENS * (len(given) + 1) + 64 * _TOKENS // launch_row.blocks["BLOCK_T"]
        # Per exponential about 30 operations in float64, per token about 30 others.
        return Work(f"T={_TOKENS}", moved, moved, _TOKENS * (30 * (3 if full else 1) + 30), "fp64")

    return KernelSpec(
        kernel=_token_loss_kernel,
        dtype=torch.float32,
        arguments={
            **dict.fromkeys(given, "*fp32"),
            "grad_logprobs_T": "*fp32",
            "partials_PS": "*fp64",
            "num_tokens": "i32",
        },
        constexprs={
            **dict.fromkeys(missing),
            "CLIP_LOW": 0.2,
            "CLIP_HIGH": 0.28,
            "SAMPLING_CAP": 2.0 if full else 0.0,
            "KL_COEF": 0.1 if full else 0.0,
        },
        work=work,
        variant="full" if full else "ratio",
        divisible=frozenset({"num_tokens"}),
        wide_store=True,
    )


def _token_sums_spec() -> KernelSpec:
    rows = _TOKENS // 1024

    def work(_: Launch) -> Work:
        return Work(f"P={rows}", 64 * (rows + 1), 64 * (rows + 1), 8 * rows, "fp64")

    return KernelSpec(
        kernel=_token_sums_kernel,
        dtype=torch.float64,
        arguments={"partials_PS": "*fp64", "sums_S": "*fp64", "num_partials": "i32"},
        constexprs={},
        work=work,
        divisible=frozenset({"num_partials"}),
    )


KERNEL_SPECS = [_token_loss_spec(full=True), _token_loss_spec(full=False), _token_sums_spec()]
