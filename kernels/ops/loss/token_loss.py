"""The part that ``policy_loss``, ``linear_policy_loss`` and ``logits_policy_loss`` share: the loss of each token.

``policy_loss.py`` has the mathematics. After each rollout's advantage and share of the reduction have been copied to
its tokens, the loss of a token depends only on that token's log-probability, so any slice of tokens can be processed by
itself::

    arguments = LossArguments(...)                      what the caller passed; check_arguments() reads no values
    batch = token_batch(arguments, T, dtype, impl)      checks values; per-token advantages and scale
    parts = [token_loss(logprobs[a:b], batch.rows(a, b), arguments.settings, impl) for a, b in ranges]
    loss = sum of the parts' loss_sum;   metrics = policy_loss_metrics(stack of their metric_sums)
    check_parts(parts, explain)                         raises for what the kernels found, on a GPU later
    result = arguments.result(loss, metrics)

``token_loss`` returns the gradient together with the loss and needs no autograd. ``policy_loss_reference`` instead lets
autograd differentiate ``token_terms`` and ``token_losses``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from balcaprl.kernels.loss.records import METRIC_SUMS, LossArguments, LossSettings, TokenBatch, TokenLoss
from balcaprl.kernels.support import deferred, native
from balcaprl.kernels.support.checks import check_choice, check_number, check_tensor

REDUCTIONS = ("token-mean", "sequence-mean", "constant")
_RATIO_MAX = METRIC_SUMS.index("ratio_max")


def check_arguments(arguments: LossArguments, num_tokens: int, device: torch.device) -> None:
    """Checks the arguments of a policy loss without reading a tensor's values.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range, or is missing; the message starts with its
            name.
    """
    for name, value in arguments.per_token.items():
        check_tensor(name, value, shape=(num_tokens,), device=device)
    check_tensor("advantages", arguments.advantages, shape=("R",), device=device)
    offsets_shape = (arguments.advantages.shape[0] + 1,)
    check_tensor("cu_seqlens", arguments.cu_seqlens, shape=offsets_shape, dtypes=(torch.int32,), device=device)
    check_number("clip_low", arguments.clip_low, low=0.0, high=1.0)
    check_number("clip_high", arguments.clip_high, low=0.0)
    check_number("kl_coef", arguments.kl_coef, low=0.0)
    check_choice("reduction", arguments.reduction, REDUCTIONS)
    if arguments.kl_coef > 0.0 and arguments.reference_logprobs is None:
        raise ValueError(f"reference_logprobs: missing; kl_coef={arguments.kl_coef} needs them")
    if arguments.sampling_ratio_cap is not None:
        check_number("sampling_ratio_cap", arguments.sampling_ratio_cap, low=0.0, exclusive_low=True)
        if arguments.sampling_logprobs is None:
            raise ValueError("sampling_logprobs: missing; sampling_ratio_cap needs them")
    if arguments.normalizer is not None:
        check_number("normalizer", arguments.normalizer, low=0.0, exclusive_low=True)


def check_finite(**tensors: Tensor | None) -> None:
    """Checks that all values are finite; if they are, it reads only one flag from the device for all tensors together.

    Raises:
        ValueError: a value is not finite; the message starts with the name of the first such tensor.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if present and not torch.stack([tensor.isfinite().all() for tensor in present.values()]).all():
        for name, tensor in present.items():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise ValueError(f"{name}: {bad} of {tensor.numel()} values are not finite")


def check_ragged(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Checks that the offsets ``cu_seqlens`` start at 0, never fall, and end at ``num_tokens``."""
    ends_fit = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
    if not (ends_fit & (cu_seqlens.diff() >= 0).all()):
        raise ValueError(
            f"cu_seqlens: expected offsets that never fall, from 0 to {num_tokens}; got {cu_seqlens.tolist()}"
        )


def token_batch(
    arguments: LossArguments, num_tokens: int, dtype: torch.dtype, impl: str, *, logprobs: Tensor | None = None
) -> TokenBatch:
    """Checks the values of ``arguments`` and converts them to one value per token.

    ``triton`` only notes an invalid value in the batch's ``status``, for ``check_parts``.

    Args:
        arguments: arguments that have passed ``check_arguments``.
        num_tokens: T, the number of tokens.
        dtype: float32 or float64, the result of ``compute_dtype``.
        impl: implementation of the op, not ``auto``. ``native`` supports only float32.
        logprobs: (T,) log-probabilities if they are an input of the op; their values are checked too.

    Raises:
        ValueError: a value is not finite, or ``cu_seqlens`` are not valid offsets; the message starts with the
            argument's name.
    """
    if impl == "triton" and dtype == torch.float32:
        from balcaprl.kernels.loss import triton as triton_token_loss

        return triton_token_loss.token_batch(arguments, num_tokens, logprobs)
    if impl == "native":
        batch = _token_batch_native(arguments, num_tokens, logprobs)
        if batch is None:
            raise_invalid(arguments, num_tokens, logprobs)
        return batch
    _check_values(arguments, num_tokens, logprobs)
    return spread(arguments, num_tokens, dtype)


def check_parts(parts: Sequence[TokenLoss], explain: deferred.Explain) -> None:
    """Calls ``explain``, which raises, if the parts count invalid values: at once on a CPU, later on a GPU."""
    counts = [part.num_bad for part in parts if part.num_bad is not None]
    if counts:
        deferred.check(counts[0] if len(counts) == 1 else torch.stack(counts).sum(), explain)


def raise_invalid(arguments: LossArguments, num_tokens: int, logprobs: Tensor | None = None) -> NoReturn:
    """Raises ValueError with the name of the argument that has an invalid value; call it only if one has."""
    _check_values(arguments, num_tokens, logprobs)
    raise ValueError("advantages or log-probabilities: a value that float32 cannot hold")


def _check_values(arguments: LossArguments, num_tokens: int, logprobs: Tensor | None) -> None:
    check_ragged(arguments.cu_seqlens, num_tokens)
    check_finite(logprobs=logprobs, advantages=arguments.advantages, **arguments.per_token)


def _token_batch_native(arguments: LossArguments, num_tokens: int, logprobs: Tensor | None) -> TokenBatch | None:
    """Runs ``balcaprl_token_batch`` of ``kernels/csrc/policy_loss.cpp``; returns None if a value is not allowed."""
    # The names below keep converted copies alive until the call returns.
    offsets, advantages_R = arguments.cu_seqlens.contiguous(), _plain_float(arguments.advantages)
    per_token = (logprobs, arguments.old_logprobs, arguments.sampling_logprobs, arguments.reference_logprobs)
    floats = [None if t is None else _plain_float(t) for t in per_token]
    advantages_T, scale_T = torch.empty(2, num_tokens).unbind()
    status = native.library().balcaprl_token_batch(
        num_tokens,
        advantages_R.shape[0],
        offsets.data_ptr(),
        advantages_R.data_ptr(),
        *(None if t is None else t.data_ptr() for t in floats),
        REDUCTIONS.index(arguments.reduction),
        0.0 if arguments.normalizer is None else arguments.normalizer,
        advantages_T.data_ptr(),
        scale_T.data_ptr(),
    )
    return None if status != native.OK else TokenBatch(floats[1], advantages_T, scale_T, floats[2], floats[3])


def _plain_float(tensor: Tensor) -> Tensor:
    """Returns the tensor as contiguous float32, without a copy if it already is."""
    return tensor.to(torch.float32).contiguous()


def spread(arguments: LossArguments, num_tokens: int, dtype: torch.dtype) -> TokenBatch:
    """Converts the arguments to one value per token, like ``token_batch`` but without checks."""
    lengths_R = arguments.cu_seqlens.diff().long()
    per_token = {name: value.to(dtype).contiguous() for name, value in arguments.per_token.items()}
    return TokenBatch(
        old_logprobs=per_token.get("old_logprobs"),
        advantages=arguments.advantages.to(dtype).repeat_interleave(lengths_R, output_size=num_tokens),
        scale=_token_scale(lengths_R, num_tokens, arguments.reduction, arguments.normalizer, dtype),
        sampling_logprobs=per_token.get("sampling_logprobs"),
        reference_logprobs=per_token.get("reference_logprobs"),
    )


def token_loss(logprobs_T: Tensor, batch: TokenBatch, settings: LossSettings, impl: str) -> TokenLoss:
    """Computes loss, metric sums and gradient of T tokens (a whole batch or any rows of it), without autograd.

    Args:
        logprobs_T: (T,) log-probabilities in the dtype of ``batch``, contiguous and finite; ``triton`` itself checks
            that they are finite.
        batch: result of ``token_batch``, or rows of it.
        settings: clip ranges, importance cap and KL coefficient; ``policy_loss`` documents them.
        impl: implementation of the op, not ``auto``. ``native`` supports only float32; ``triton`` uses the reference
            for float64.
    """
    if impl == "native":
        return _token_loss_native(logprobs_T, batch, settings)
    if impl == "triton" and logprobs_T.dtype == torch.float32:
        from balcaprl.kernels.loss import triton as triton_token_loss

        return triton_token_loss.token_loss(logprobs_T, batch, settings)
    with torch.no_grad():
        tokens = token_terms(logprobs_T, batch, settings)
        losses_T = token_losses(tokens, batch, settings)
        grad_T = _token_gradient(tokens, batch, settings) * batch.scale
        loss_sum = (losses_T * batch.scale).sum(dtype=torch.float64)
        return TokenLoss(loss_sum, metric_sums(tokens), grad_T)


def _token_loss_native(logprobs_T: Tensor, batch: TokenBatch, settings: LossSettings) -> TokenLoss:
    """Runs ``balcaprl_token_loss`` of ``kernels/csrc/policy_loss.cpp``: one pass over the tokens on torch's threads."""
    sums = torch.empty(1 + len(METRIC_SUMS), dtype=torch.float64)
    gradient_T = torch.empty(logprobs_T.shape[0])
    status = native.library().balcaprl_token_loss(
        logprobs_T.shape[0],
        logprobs_T.data_ptr(),
        *(None if t is None else t.data_ptr() for t in batch.per_token),
        settings.clip_low,
        settings.clip_high,
        settings.sampling_ratio_cap or 0.0,
        settings.kl_coef,
        gradient_T.data_ptr(),
        sums.data_ptr(),
    )
    if status != native.OK:
        raise MemoryError(f"token_loss: no memory for {logprobs_T.shape[0]} tokens")
    return TokenLoss(sums[0], sums[1:], gradient_T)


def policy_loss_metrics(metric_sums: Tensor) -> Tensor:
    """(5,) float64 metrics in the order of ``PolicyLoss``, from the (6,) sums of one part or (N, 6) sums of several.

    A metric is 0 if there are no tokens or its input is missing.
    """
    joined = metric_sums.view(-1, len(METRIC_SUMS))
    sums = joined.sum(dim=0)
    count = sums[-1].clamp(min=1.0)
    return torch.cat([sums[:2] / count, joined[:, _RATIO_MAX].amax(dim=0, keepdim=True), sums[3:5] / count])


class TokenTerms(NamedTuple):
    """Terms from which loss, gradient and metrics are computed; all (T,), in the compute dtype except ``clipped``."""

    ratio: Tensor
    surrogate_ratio: Tensor
    """``ratio``, replaced by 1 where the advantage is 0, because an overflowing ratio times 0 would be NaN."""
    clipped: Tensor
    """Whether the clip makes the token's policy gradient 0; bool."""
    importance: Tensor | None
    reference_difference: Tensor | None
    sampling_difference: Tensor | None


def token_terms(logprobs_T: Tensor, batch: TokenBatch, settings: LossSettings) -> TokenTerms:
    """Computes the terms of (T,) log-probabilities, differentiable in ``logprobs_T``."""
    old_logprobs = logprobs_T.detach() if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = logprobs_T - old_logprobs
    ratio, positive, negative = log_ratio.exp(), batch.advantages > 0, batch.advantages < 0
    clipped = (positive & (ratio > 1.0 + settings.clip_high)) | (negative & (ratio < 1.0 - settings.clip_low))
    sampling_difference = None if batch.sampling_logprobs is None else old_logprobs - batch.sampling_logprobs
    importance = None
    if settings.sampling_ratio_cap is not None and sampling_difference is not None:
        importance = sampling_difference.exp().clamp(max=settings.sampling_ratio_cap)
    return TokenTerms(
        ratio=ratio,
        surrogate_ratio=log_ratio.masked_fill(batch.advantages == 0, 0.0).exp(),
        clipped=clipped,
        importance=importance,
        reference_difference=None if batch.reference_logprobs is None else batch.reference_logprobs - logprobs_T,
        sampling_difference=sampling_difference,
    )


def token_losses(tokens: TokenTerms, batch: TokenBatch, settings: LossSettings) -> Tensor:
    """(T,) losses of the tokens, before scaling and summation."""
    clipped_ratio = tokens.surrogate_ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    losses_T = -torch.minimum(tokens.surrogate_ratio * batch.advantages, clipped_ratio * batch.advantages)
    if tokens.importance is not None:
        losses_T = losses_T * tokens.importance
    if settings.kl_coef > 0.0 and tokens.reference_difference is not None:
        losses_T = losses_T + settings.kl_coef * _k3(tokens.reference_difference)
    return losses_T


def metric_sums(tokens: TokenTerms) -> Tensor:
    """(6,) float64 sums of the metrics, detached, in the order of ``METRIC_SUMS``; 0 for a missing input."""
    ratio = tokens.ratio.detach().double()
    zero = ratio.new_zeros(())
    differences = (tokens.reference_difference, tokens.sampling_difference)
    divergences = [zero if d is None else _k3(d.detach()).sum(dtype=torch.float64) for d in differences]
    largest = ratio.max() if ratio.shape[0] else zero
    clipped, count = tokens.clipped.sum(dtype=torch.float64), torch.full_like(zero, ratio.shape[0])
    return torch.stack([clipped, ratio.sum(), largest, *divergences, count])


def _token_gradient(tokens: TokenTerms, batch: TokenBatch, settings: LossSettings) -> Tensor:
    """(T,) gradient d token / d logprobs, before scaling."""
    gradient = -(batch.advantages * tokens.surrogate_ratio).masked_fill(tokens.clipped, 0.0)
    if tokens.importance is not None:
        gradient = gradient * tokens.importance
    if settings.kl_coef > 0.0 and tokens.reference_difference is not None:
        gradient = gradient - settings.kl_coef * tokens.reference_difference.expm1()
    return gradient


def _k3(difference: Tensor) -> Tensor:
    """The k3 estimator exp(d) - d - 1, computed with expm1, which stays accurate near 0."""
    return difference.expm1() - difference


def _token_scale(
    lengths_R: Tensor, num_tokens: int, reduction: str, normalizer: float | None, dtype: torch.dtype
) -> Tensor:
    """(T,) factor of each token's loss: 1 / (the reduction's denominator)."""
    num_rollouts = lengths_R.shape[0]
    defaults = {"token-mean": max(num_tokens, 1), "sequence-mean": max(num_rollouts, 1)}
    if normalizer is not None or reduction in defaults:
        value = defaults[reduction] if normalizer is None else normalizer
        denominator = torch.full((), value, dtype=dtype, device=lengths_R.device)
    else:
        longest = lengths_R.max() if num_rollouts else lengths_R.sum()
        denominator = (longest.to(dtype) * num_rollouts).clamp(min=1)
    if reduction != "sequence-mean":
        return denominator.reciprocal().repeat(num_tokens)
    per_rollout = (lengths_R.to(dtype) * denominator).reciprocal()
    return per_rollout.repeat_interleave(lengths_R, output_size=num_tokens)
