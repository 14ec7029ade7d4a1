"""Triton kernels of ``token_batch`` and ``token_loss``.

``token_batch`` runs one kernel, which checks all values and writes the advantage and the scale of each token. With
torch's ops this took about 25 launches and a millisecond.

``token_loss`` takes two launches. One pass over the tokens gives the gradients and, for each program, a row of partial
sums. Another kernel adds the rows up, always in the same order, so that the same input gives the same bits. It also
adds up the invalid values that the checks have found, and makes the loss NaN if there are any. The host reads nothing
back: the caller passes ``TokenLoss.num_bad`` to ``deferred.check``.

This module is imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.loss.records import METRIC_SUMS, LossArguments, LossSettings, TokenBatch, TokenLoss
from balcaprl.kernels.support import triton_math
from balcaprl.kernels.support.launch import KernelSpec, Launch, Work, launch, on_device

_NUM_SUMS: tl.constexpr = tl.constexpr(8)  # loss, METRIC_SUMS, and the number of invalid values
_NUM_BAD: tl.constexpr = tl.constexpr(7)
_RATIO_MAX: tl.constexpr = tl.constexpr(1 + METRIC_SUMS.index("ratio_max"))


@triton.jit
def _is_bad(values_T, tokens, mask):
    """1 if one of the tokens' values is not finite, otherwise 0. A ``values_T`` of None gives 0."""
    bad = 0
    if values_T is not None:
        values = tl.load(values_T + tokens, mask=mask, other=0.0)
        # NaN differs from itself; infinity minus itself is NaN.
        bad = tl.max((values - values != 0.0).to(tl.int32), axis=0)
    return bad


@triton.jit(do_not_specialize=["num_rollouts", "search_steps"])
def _token_batch_kernel(
    offsets_R1, advantages_R,
    logprobs_T, old_logprobs_T, sampling_logprobs_T, reference_logprobs_T,
    advantages_T, scale_T, status,
    num_tokens, num_rollouts, search_steps, denominator,
    PER_SEQUENCE: tl.constexpr, BY_LONGEST: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens and of rollouts: checks all values, and writes each token's advantage and scale.

    The kernel that checks the offsets cannot rely on them: whatever their values, reads stay within the R + 1 offsets.
    """
    lanes = tl.arange(0, BLOCK_T)
    # Rollouts: offsets must go from 0 to T without falling, and advantages must be finite.
    rollouts = tl.program_id(0) * BLOCK_T + lanes
    is_rollout = rollouts < num_rollouts
    begins = tl.load(offsets_R1 + rollouts, mask=rollouts <= num_rollouts, other=0)
    ends = tl.load(offsets_R1 + rollouts + 1, mask=is_rollout, other=0)
    wrong = is_rollout & (ends < begins)
    wrong |= (rollouts == 0) & (begins != 0)
    wrong |= (rollouts == num_rollouts) & (begins != num_tokens)
    bad = tl.max(wrong.to(tl.int32), axis=0)
    bad |= _is_bad(advantages_R, rollouts, is_rollout)
    # Tokens: all log-probabilities must be finite.
    tokens = tl.program_id(0) * BLOCK_T + lanes
    mask = tokens < num_tokens
    bad |= _is_bad(logprobs_T, tokens, mask)
    bad |= _is_bad(old_logprobs_T, tokens, mask)
    bad |= _is_bad(sampling_logprobs_T, tokens, mask)
    bad |= _is_bad(reference_logprobs_T, tokens, mask)
    if bad != 0:
        tl.atomic_or(status, 1)
    # Bisection finds each token's rollout, the last one that begins at or before the token:
    # offsets[low] <= token < offsets[high].
    low = tl.zeros((BLOCK_T,), tl.int32)
    high = low + num_rollouts
    for _ in range(search_steps):
        middle = (low + high) // 2
        behind = tl.load(offsets_R1 + middle) > tokens
        low, high = tl.where(behind, low, middle), tl.where(behind, middle, high)
    if BY_LONGEST:
        longest = 0
        for begin in range(0, num_rollouts, BLOCK_T):
            each = begin + lanes
            inside = each < num_rollouts
            begins = tl.load(offsets_R1 + each, mask=inside, other=0)
            lengths = tl.load(offsets_R1 + each + 1, mask=inside, other=0) - begins
            longest = tl.maximum(longest, tl.max(lengths, axis=0))
        denominator = tl.maximum(tl.cast(longest, tl.float32) * num_rollouts, 1.0)
    divisors = tl.zeros((BLOCK_T,), tl.float32) + denominator
    if PER_SEQUENCE:
        lengths = tl.load(offsets_R1 + high) - tl.load(offsets_R1 + low)
        divisors *= lengths.to(tl.float32)
    advantages = tl.load(advantages_R + low, mask=mask & (low < num_rollouts), other=0.0)
    tl.store(advantages_T + tokens, advantages, mask=mask)
    # The quotient is rounded to nearest, because all tokens share its error.
    tl.store(scale_T + tokens, tl.div_rn(tl.full((BLOCK_T,), 1.0, tl.float32), divisors), mask=mask)


@triton.jit
def _token_loss_kernel(
    logprobs_T,
    old_logprobs_T,
    advantages_T,
    scale_T,
    sampling_logprobs_T,
    reference_logprobs_T,
    status,
    grad_logprobs_T,
    partials_PS,
    num_tokens,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    SAMPLING_CAP: tl.constexpr,
    KL_COEF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per block of tokens: writes gradients and a row of partial sums. Missing inputs are None.

    The gradient of a token is NaN if its log-probability is not finite or the batch's ``status`` is not 0.
    """
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
    bad = logprobs - logprobs != 0.0  # NaN differs from itself; infinity minus itself is NaN
    if status is not None:
        bad |= tl.load(status) != 0
    gradient = tl.where(bad, float("nan"), gradient * scale)
    tl.store(grad_logprobs_T + tokens, gradient.to(grad_logprobs_T.dtype.element_ty), mask=mask)
    # Lanes past the last token have log-probabilities and advantages of 0, so only their ratio is not 0.
    ratio = tl.where(mask, ratio, 0.0)
    row = partials_PS + block.to(tl.int64) * _NUM_SUMS
    tl.store(row + 0, tl.sum(loss * scale, axis=0))
    tl.store(row + 1, tl.sum(clipped, axis=0))
    tl.store(row + 2, tl.sum(ratio, axis=0))
    tl.store(row + 3, tl.max(ratio, axis=0))
    tl.store(row + 4, tl.sum(k3_reference, axis=0))
    tl.store(row + 5, tl.sum(k3_sampling, axis=0))
    tl.store(row + 6, tl.sum(tl.where(mask, 1.0, 0.0).to(tl.float64), axis=0))
    tl.store(row + _NUM_BAD, tl.sum(bad.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["num_partials"])
def _token_sums_kernel(partials_PS, status, sums_S, num_partials, BLOCK_P: tl.constexpr):
    """A single program adds up all rows, tile after tile; for the largest ratio it takes the maximum instead.

    Adds the batch's ``status``, if not None, to the number of invalid values, and makes the loss NaN if there are any.
    """
    columns = tl.arange(0, _NUM_SUMS)
    sums = tl.zeros((_NUM_SUMS,), tl.float64)
    for begin in range(0, num_partials, BLOCK_P):
        rows = begin + tl.arange(0, BLOCK_P)
        offsets = rows[:, None].to(tl.int64) * _NUM_SUMS + columns[None, :]
        tile = tl.load(partials_PS + offsets, mask=(rows < num_partials)[:, None], other=0.0)
        sums = tl.where(columns == _RATIO_MAX, tl.maximum(sums, tl.max(tile, axis=0)), sums + tl.sum(tile, axis=0))
    if status is not None:
        sums += tl.where(columns == _NUM_BAD, tl.load(status), 0).to(tl.float64)
    num_bad = tl.sum(tl.where(columns == _NUM_BAD, sums, 0.0), axis=0)
    sums += tl.where(columns == 0, tl.where(num_bad > 0.0, float("nan"), 0.0), 0.0)
    tl.store(sums_S + columns, sums)


def token_batch(arguments: LossArguments, num_tokens: int, logprobs: Tensor | None) -> TokenBatch:
    """The same as ``balcaprl.kernels.loss.token_loss.token_batch`` in float32; invalid values only set ``status``."""
    device, num_rollouts = arguments.advantages.device, arguments.advantages.shape[0]
    advantages_R = arguments.advantages.float().contiguous()
    per_token = (logprobs, arguments.old_logprobs, arguments.sampling_logprobs, arguments.reference_logprobs)
    floats = [None if t is None else t.float().contiguous() for t in per_token]
    advantages_T, scale_T = torch.empty(2, num_tokens, device=device).unbind()
    status = torch.zeros(1, dtype=torch.int32, device=device)
    defaults = {"token-mean": max(num_tokens, 1), "sequence-mean": max(num_rollouts, 1), "constant": 1}
    given = arguments.normalizer
    row = launch("_token_batch_kernel", device, torch.float32)
    with on_device(device):
        _token_batch_kernel[(triton.cdiv(max(num_tokens, num_rollouts + 1), row.blocks["BLOCK_T"]),)](
            arguments.cu_seqlens.contiguous(),
            advantages_R,
            *floats,
            advantages_T,
            scale_T,
            status,
            num_tokens,
            num_rollouts,
            num_rollouts.bit_length(),
            float(defaults[arguments.reduction] if given is None else given),
            arguments.reduction == "sequence-mean",
            arguments.reduction == "constant" and given is None,
            **row.kwargs(),
        )
    return TokenBatch(floats[1], advantages_T, scale_T, floats[2], floats[3], status)


def token_loss(logprobs_T: Tensor, batch: TokenBatch, settings: LossSettings) -> TokenLoss:
    """The same as ``balcaprl.kernels.loss.token_loss.token_loss``, for float32 tensors."""
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
        _token_sums_kernel[(1,)](partials_PS, batch.status, sums_S, num_blocks, **sums_row.kwargs())
    loss_sum, metric_sums, num_bad = sums_S[0], sums_S[1 : 1 + len(METRIC_SUMS)], sums_S[_NUM_BAD.value]
    return TokenLoss(loss_sum, metric_sums, grad_logprobs_T, num_bad)


# The compile suite's shape: 8192 completions of 256 tokens.
_TOKENS = 8192 * 256
_PER_TOKEN = ("logprobs_T", "old_logprobs_T", "advantages_T", "scale_T", "sampling_logprobs_T", "reference_logprobs_T")


def _token_batch_spec() -> KernelSpec:
    """The specification of the batch kernel with all inputs and the reduction ``sequence-mean``."""
    num_rollouts, inputs = 8192, ("logprobs_T", "old_logprobs_T", "sampling_logprobs_T", "reference_logprobs_T")

    def work(_: Launch) -> Work:
        moved = 4 * (_TOKENS * (len(inputs) + 2) + 2 * num_rollouts)
        return Work(f"T={_TOKENS} R={num_rollouts}", moved, moved, _TOKENS * (len(inputs) + 5 * 14))

    return KernelSpec(
        kernel=_token_batch_kernel,
        dtype=torch.float32,
        arguments={
            "offsets_R1": "*i32",
            **dict.fromkeys(("advantages_R", *inputs, "advantages_T", "scale_T"), "*fp32"),
            "status": "*i32",
            **dict.fromkeys(("num_tokens", "num_rollouts", "search_steps"), "i32"),
            "denominator": "fp32",
        },
        constexprs={"PER_SEQUENCE": True, "BY_LONGEST": False},
        work=work,
        divisible=frozenset({"num_tokens"}),
        wide_store=True,
    )


def _token_loss_spec(*, full: bool) -> KernelSpec:
    """The specification of the loss kernel: with all terms if ``full``, otherwise with only the clipped ratio."""
    missing = () if full else ("sampling_logprobs_T", "reference_logprobs_T")
    given = [name for name in _PER_TOKEN if name not in missing]

    def work(launch_row: Launch) -> Work:
        moved = 4 * _TOKENS * (len(given) + 1) + 64 * _TOKENS // launch_row.blocks["BLOCK_T"]
        # About 30 float64 operations per exponential, and about 30 others per token.
        return Work(f"T={_TOKENS}", moved, moved, _TOKENS * (30 * (3 if full else 1) + 30), "fp64")

    return KernelSpec(
        kernel=_token_loss_kernel,
        dtype=torch.float32,
        arguments={
            **dict.fromkeys(given, "*fp32"),
            "status": "*i32",
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
        arguments={"partials_PS": "*fp64", "status": "*i32", "sums_S": "*fp64", "num_partials": "i32"},
        constexprs={},
        work=work,
    )


KERNEL_SPECS = [_token_batch_spec(), _token_loss_spec(full=True), _token_loss_spec(full=False), _token_sums_spec()]
