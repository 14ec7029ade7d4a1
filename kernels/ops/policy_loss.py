"""The clipped policy loss of a ragged batch, from log-probabilities.

For completion token t of rollout j (A_j its advantage)::

    ratio  = exp(logprobs - old_logprobs)
    token  = -min(ratio * A_j, clip(ratio, 1 - clip_low, 1 + clip_high) * A_j)
    token *= min(exp(old_logprobs - sampling_logprobs), sampling_ratio_cap)         only where a cap is given
    token += kl_coef * (exp(d) - d - 1),   d = reference_logprobs - logprobs        the k3 estimator

The reduction divides by a *global* denominator, ``normalizer``, so that parts of a batch add up to the whole:

=================  =======================================  ==========================================================
reduction          loss                                     ``normalizer``, and what it is when not given
=================  =======================================  ==========================================================
``token-mean``     sum over tokens / normalizer             completion tokens of the global batch; this call's T
``sequence-mean``  sum over rollouts of the mean over       completions of the global batch, empty ones included; this
                   their tokens / normalizer                call's R
``constant``       sum over tokens / normalizer             completions x max length of the global batch; this call's
                                                            R x its longest completion (1 if all are empty)
=================  =======================================  ==========================================================

An empty completion contributes 0. A token whose advantage is 0 has a policy term of exactly 0, whatever its ratio. The
gradient, written out (the op computes it with the loss, and keeps nothing else for the backward)::

    d token / d logprobs = -A_j * ratio * importance * [not clipped] + kl_coef * (1 - exp(d))
    clipped: ratio > 1 + clip_high and A_j > 0, or ratio < 1 - clip_low and A_j < 0
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.checks import check_choice, check_impl, check_number, check_tensor

REDUCTIONS = ("token-mean", "sequence-mean", "constant")
IMPLS = ("reference",)


class PolicyLoss(NamedTuple):
    """The loss and what to watch beside it. All are 0-d tensors, float64 where ``logprobs`` is, else float32.

    The metrics are detached and cover the tokens of *this call*, without ``normalizer``: to join parts, weight the
    means by their tokens. Without tokens they are 0; those whose input was not given are NaN.
    """

    loss: Tensor
    """Differentiable in ``logprobs``, once."""
    clip_fraction: Tensor
    """Share of tokens whose policy gradient the clip stopped."""
    ratio_mean: Tensor
    """Mean of exp(logprobs - old_logprobs)."""
    ratio_max: Tensor
    """Largest exp(logprobs - old_logprobs)."""
    kl: Tensor
    """Mean k3 estimate of KL(policy || reference policy), from ``reference_logprobs``."""
    sampling_kl: Tensor
    """Mean k3 estimate of KL(sampler || trainer): exp(d) - d - 1 with d = old_logprobs - sampling_logprobs. Never
    negative; 0 where sampler and trainer agree on every token."""


class _Tokens(NamedTuple):
    """What loss, gradient and metrics of the T tokens are made of; all (T,) in the compute dtype."""

    advantages: Tensor
    ratio: Tensor
    surrogate_ratio: Tensor
    """``ratio``, and 1 where the advantage is 0: an overflowing ratio times 0 would be NaN."""
    clipped: Tensor
    """Bool: the clip stops the gradient."""
    importance: Tensor | None
    reference_difference: Tensor | None
    sampling_difference: Tensor | None


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampling_logprobs: Tensor | None = None,
    sampling_ratio_cap: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    reduction: str = "token-mean",
    normalizer: float | None = None,
    impl: str = "auto",
) -> PolicyLoss:
    """Loss and metrics of T completion tokens of R rollouts; the module's docstring has the mathematics.

    Args:
        logprobs: (T,) floating, of the current policy, with gradient. Float64 is computed in float64, all else in
            float32.
        old_logprobs: (T,) floating, of the policy at the start of this batch's updates; None: on-policy, the detached
            ``logprobs``.
        advantages: (R,) floating.
        cu_seqlens: (R + 1,) int32: rollout j has tokens cu_seqlens[j] to cu_seqlens[j + 1]. From 0 to T, never falling.
        clip_low: 0 <= clip_low <= 1.
        clip_high: >= 0.
        sampling_logprobs: (T,) floating, as the sampler returned them.
        sampling_ratio_cap: > 0; asks for truncated importance sampling and needs ``sampling_logprobs``.
        reference_logprobs: (T,) floating, of the frozen reference policy.
        kl_coef: >= 0; above 0 it needs ``reference_logprobs``. At 0 the divergence is measured only.
        reduction: ``token-mean``, ``sequence-mean`` or ``constant``.
        normalizer: > 0, the global denominator; see the table.
        impl: ``reference`` or ``auto``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, range, or a value that is not finite; the message
            starts with its name.
    """
    per_token = {
        "old_logprobs": old_logprobs,
        "sampling_logprobs": sampling_logprobs,
        "reference_logprobs": reference_logprobs,
    }
    check_batch(logprobs, per_token, advantages, cu_seqlens)
    check_settings(
        clip=(clip_low, clip_high),
        sampling_ratio_cap=sampling_ratio_cap,
        has_sampling=sampling_logprobs is not None,
        kl_coef=kl_coef,
        has_reference=reference_logprobs is not None,
        reduction=reduction,
        normalizer=normalizer,
    )
    check_impl("policy_loss", impl, IMPLS)
    loss, metrics, _ = _policy_loss_op(
        logprobs,
        _detached(old_logprobs),
        advantages.detach(),
        cu_seqlens,
        float(clip_low),
        float(clip_high),
        _detached(sampling_logprobs),
        None if sampling_ratio_cap is None else float(sampling_ratio_cap),
        _detached(reference_logprobs),
        float(kl_coef),
        reduction,
        None if normalizer is None else float(normalizer),
        impl,
    )
    present = {"has_reference": reference_logprobs is not None, "has_sampling": sampling_logprobs is not None}
    return _result(loss, metrics, **present)


def check_batch(logprobs: Tensor, per_token: dict[str, Tensor | None], advantages: Tensor, cu_seqlens: Tensor) -> None:
    """Checks shapes, dtypes and devices of a ragged batch."""
    check_tensor("logprobs", logprobs, shape=("T",))
    device = logprobs.device
    for name, value in per_token.items():
        if value is not None:
            check_tensor(name, value, shape=tuple(logprobs.shape), device=device)
    check_tensor("advantages", advantages, shape=("R",), device=device)
    check_tensor("cu_seqlens", cu_seqlens, shape=(advantages.shape[0] + 1,), dtypes=(torch.int32,), device=device)


def check_settings(
    *,
    clip: tuple[float, float],
    sampling_ratio_cap: float | None,
    has_sampling: bool,
    kl_coef: float,
    has_reference: bool,
    reduction: str,
    normalizer: float | None,
) -> None:
    """Checks the numbers and choices of the loss, and that the log-probabilities they need are there."""
    check_number("clip_low", clip[0], low=0.0, high=1.0)
    check_number("clip_high", clip[1], low=0.0)
    check_number("kl_coef", kl_coef, low=0.0)
    check_choice("reduction", reduction, REDUCTIONS)
    if kl_coef > 0.0 and not has_reference:
        raise ValueError(f"reference_logprobs: missing; kl_coef={kl_coef} needs them")
    if sampling_ratio_cap is not None:
        check_number("sampling_ratio_cap", sampling_ratio_cap, low=0.0, exclusive_low=True)
        if not has_sampling:
            raise ValueError("sampling_logprobs: missing; sampling_ratio_cap needs them")
    if normalizer is not None:
        check_number("normalizer", normalizer, low=0.0, exclusive_low=True)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def policy_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampling_logprobs: Tensor | None = None,
    sampling_ratio_cap: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    reduction: str = "token-mean",
    normalizer: float | None = None,
) -> PolicyLoss:
    """The specification, in plain PyTorch with autograd's own gradient; arguments as above, unchecked."""
    tokens = _token_terms(
        logprobs,
        old_logprobs,
        advantages,
        cu_seqlens,
        (clip_low, clip_high),
        sampling_logprobs,
        sampling_ratio_cap,
        reference_logprobs,
    )
    scale_T = _token_scale(cu_seqlens, reduction, normalizer, tokens.ratio)
    loss = _reduced_loss(tokens, scale_T, (clip_low, clip_high), kl_coef)
    present = {"has_reference": reference_logprobs is not None, "has_sampling": sampling_logprobs is not None}
    return _result(loss, _metrics(tokens), **present)


def _token_terms(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    clip: tuple[float, float],
    sampling_logprobs: Tensor | None,
    sampling_ratio_cap: float | None,
    reference_logprobs: Tensor | None,
) -> _Tokens:
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    logprobs = logprobs.to(dtype)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs.to(dtype)
    advantages_T = advantages.to(dtype).repeat_interleave(cu_seqlens.diff().long(), output_size=logprobs.shape[0])
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ((advantages_T > 0) & (ratio > 1.0 + clip[1])) | ((advantages_T < 0) & (ratio < 1.0 - clip[0]))
    sampling_difference = None if sampling_logprobs is None else old_logprobs - sampling_logprobs.to(dtype)
    importance = None
    if sampling_ratio_cap is not None and sampling_difference is not None:
        importance = sampling_difference.exp().clamp(max=sampling_ratio_cap)
    return _Tokens(
        advantages=advantages_T,
        ratio=ratio,
        surrogate_ratio=log_ratio.masked_fill(advantages_T == 0, 0.0).exp(),
        clipped=clipped,
        importance=importance,
        reference_difference=None if reference_logprobs is None else reference_logprobs.to(dtype) - logprobs,
        sampling_difference=sampling_difference,
    )


def _reduced_loss(tokens: _Tokens, scale_T: Tensor, clip: tuple[float, float], kl_coef: float) -> Tensor:
    clipped_ratio = tokens.surrogate_ratio.clamp(1.0 - clip[0], 1.0 + clip[1])
    token_T = -torch.minimum(tokens.surrogate_ratio * tokens.advantages, clipped_ratio * tokens.advantages)
    if tokens.importance is not None:
        token_T = token_T * tokens.importance
    if kl_coef > 0.0 and tokens.reference_difference is not None:
        token_T = token_T + kl_coef * _k3(tokens.reference_difference)
    return (token_T * scale_T).sum()


def _k3(difference: Tensor) -> Tensor:
    """exp(d) - d - 1, by way of expm1: it keeps its digits near 0."""
    return difference.expm1() - difference


def _token_scale(cu_seqlens: Tensor, reduction: str, normalizer: float | None, like_T: Tensor) -> Tensor:
    """What each token is multiplied by before the sum: (T,), or 0-d where it is the same for all."""
    num_rollouts = cu_seqlens.shape[0] - 1
    lengths_R = cu_seqlens.diff()
    if normalizer is not None:
        denominator = like_T.new_tensor(normalizer)
    elif reduction == "token-mean":
        denominator = like_T.new_tensor(max(like_T.shape[0], 1))
    elif reduction == "sequence-mean":
        denominator = like_T.new_tensor(max(num_rollouts, 1))
    else:
        longest = lengths_R.max() if num_rollouts else cu_seqlens[0]
        denominator = (longest.to(like_T.dtype) * num_rollouts).clamp(min=1)
    if reduction != "sequence-mean":
        return denominator.reciprocal()
    per_rollout = (lengths_R.to(like_T.dtype) * denominator).reciprocal()
    return per_rollout.repeat_interleave(lengths_R.long(), output_size=like_T.shape[0])


def _token_gradient(tokens: _Tokens, kl_coef: float) -> Tensor:
    """d token / d logprobs, (T,)."""
    gradient = -(tokens.advantages * tokens.surrogate_ratio).masked_fill(tokens.clipped, 0.0)
    if tokens.importance is not None:
        gradient = gradient * tokens.importance
    if kl_coef > 0.0 and tokens.reference_difference is not None:
        gradient = gradient - kl_coef * tokens.reference_difference.expm1()
    return gradient


def _metrics(tokens: _Tokens) -> Tensor:
    """(5,): the metrics in the order of ``PolicyLoss``, 0 where their input is missing."""
    ratio = tokens.ratio.detach()
    if ratio.shape[0] == 0:
        return ratio.new_zeros(5)
    differences = (tokens.reference_difference, tokens.sampling_difference)
    divergences = [ratio.new_zeros(()) if d is None else _k3(d.detach()).mean() for d in differences]
    return torch.stack([tokens.clipped.to(ratio.dtype).mean(), ratio.mean(), ratio.max(), *divergences])


def _result(loss: Tensor, metrics: Tensor, *, has_reference: bool, has_sampling: bool) -> PolicyLoss:
    """Names the metrics, and says NaN where there was nothing to measure.

    Not done in ``_metrics``: the op must not return NaN, which opcheck holds to be unequal to itself.
    """
    clip_fraction, ratio_mean, ratio_max, kl, sampling_kl = metrics.detach().unbind()
    kl = kl if has_reference else torch.full_like(kl, torch.nan)
    sampling_kl = sampling_kl if has_sampling else torch.full_like(sampling_kl, torch.nan)
    return PolicyLoss(loss, clip_fraction, ratio_mean, ratio_max, kl, sampling_kl)


@torch.library.custom_op(
    "balcaprl::policy_loss",
    mutates_args=(),
    schema="(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor cu_seqlens, float clip_low, "
    "float clip_high, Tensor? sampling_logprobs, float? sampling_ratio_cap, Tensor? reference_logprobs, float kl_coef, "
    "str reduction, float? normalizer, str impl) -> (Tensor loss, Tensor metrics, Tensor grad_logprobs)",
)
def _policy_loss_op(
    logprobs,
    old_logprobs,
    advantages,
    cu_seqlens,
    clip_low,
    clip_high,
    sampling_logprobs,
    sampling_ratio_cap,
    reference_logprobs,
    kl_coef,
    reduction,
    normalizer,
    impl,
):
    """Checks values, out of sight of the tracer; returns the loss, (5,) metrics, and d loss / d logprobs."""
    check_ragged(cu_seqlens, logprobs.shape[0])
    _check_finite(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        sampling_logprobs=sampling_logprobs,
        reference_logprobs=reference_logprobs,
    )
    tokens = _token_terms(
        logprobs,
        old_logprobs,
        advantages,
        cu_seqlens,
        (clip_low, clip_high),
        sampling_logprobs,
        sampling_ratio_cap,
        reference_logprobs,
    )
    scale_T = _token_scale(cu_seqlens, reduction, normalizer, tokens.ratio)
    loss = _reduced_loss(tokens, scale_T, (clip_low, clip_high), kl_coef)
    gradient = _token_gradient(tokens, kl_coef) * scale_T
    return loss, _metrics(tokens), gradient.to(logprobs.dtype)


@_policy_loss_op.register_fake
def _policy_loss_fake(logprobs, *_):
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return logprobs.new_empty((), dtype=dtype), logprobs.new_empty(5, dtype=dtype), torch.empty_like(logprobs)


def _policy_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(output[2])


def _policy_loss_backward(ctx, grad_loss, _grad_metrics, _grad_gradient):
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss).to(gradient.dtype), *([None] * 12)


_policy_loss_op.register_autograd(_policy_loss_backward, setup_context=_policy_loss_setup)


def check_ragged(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Checks the values of ``cu_seqlens``: from 0 to ``num_tokens``, never falling."""
    ends_fit = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
    if not (ends_fit & (cu_seqlens.diff() >= 0).all()):
        raise ValueError(
            f"cu_seqlens: expected offsets that never fall, from 0 to {num_tokens}; got {cu_seqlens.tolist()}"
        )


def _check_finite(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values are not finite")
