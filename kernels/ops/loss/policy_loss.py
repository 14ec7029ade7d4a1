"""The clipped policy loss of a ragged batch, from log-probabilities.

For completion token t of rollout j with advantage A_j::

    ratio  = exp(logprobs - old_logprobs)
    token  = -min(ratio * A_j, clip(ratio, 1 - clip_low, 1 + clip_high) * A_j)
    token *= min(exp(old_logprobs - sampling_logprobs), sampling_ratio_cap)         only if a cap is given
    token += kl_coef * (exp(d) - d - 1),   d = reference_logprobs - logprobs        the k3 estimator

The reduction divides by a *global* denominator, ``normalizer``, so that the losses of the parts of a batch add up to
the loss of the whole batch:

=================  =======================================  ==========================================================
reduction          loss                                     ``normalizer``; its default
=================  =======================================  ==========================================================
``token-mean``     sum over tokens / normalizer             completion tokens of the global batch; this call's T
``sequence-mean``  sum over rollouts of the mean over       completions of the global batch, empty ones included; this
                   their tokens / normalizer                call's R
``constant``       sum over tokens / normalizer             completions x max length of the global batch; this call's
                                                            R x its longest completion (1 if all are empty)
=================  =======================================  ==========================================================

An empty completion contributes 0. A token whose advantage is 0 has a policy term of exactly 0, whatever its ratio. The
op computes the gradient together with the loss and keeps only the gradient for the backward. The gradient is::

    d token / d logprobs = -A_j * ratio * importance * [not clipped] + kl_coef * (1 - exp(d))
    clipped: ratio > 1 + clip_high and A_j > 0, or ratio < 1 - clip_low and A_j < 0
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from balcaprl.kernels.loss.records import LOSS_SCHEMA, LossArguments, PolicyLoss
from balcaprl.kernels.loss.token_loss import (
    check_arguments,
    check_parts,
    metric_sums,
    policy_loss_metrics,
    raise_invalid,
    spread,
    token_batch,
    token_loss,
    token_losses,
    token_terms,
)
from balcaprl.kernels.support import launch
from balcaprl.kernels.support.checks import check_impl, check_tensor
from balcaprl.kernels.support.dispatch import compute_dtype, fastest_impl

IMPLS = ("reference", "native", "triton")


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
        logprobs: (T,) floating log-probabilities under the current policy, with gradient. Float64 is computed in
            float64, every other dtype in float32.
        old_logprobs: (T,) floating log-probabilities under the policy at the start of this batch's updates; None means
            on-policy: the detached ``logprobs``.
        advantages: (R,) floating, the advantage of each rollout.
        cu_seqlens: (R + 1,) int32 offsets that never fall, from 0 to T: rollout j has tokens cu_seqlens[j] to
            cu_seqlens[j + 1] - 1.
        clip_low: lower clip range, 0 <= clip_low <= 1.
        clip_high: upper clip range, >= 0.
        sampling_logprobs: (T,) floating log-probabilities that the sampler returned.
        sampling_ratio_cap: cap of the importance weight, > 0; turns on truncated importance sampling and needs
            ``sampling_logprobs``.
        reference_logprobs: (T,) floating log-probabilities under the frozen reference policy.
        kl_coef: coefficient of the KL term, >= 0; a value above 0 needs ``reference_logprobs``. At 0 the divergence is
            only measured.
        reduction: ``token-mean``, ``sequence-mean`` or ``constant``.
        normalizer: the global denominator, > 0; the table in the module's docstring has its meaning and default.
        impl: ``native`` (CPU), ``triton`` (CUDA, or CPU under Triton's interpreter), ``reference`` or ``auto``. Only
            ``reference`` supports float64.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range, or a value that is not allowed; the message
            starts with the argument's name. On a GPU an invalid value is found later: the loss is NaN, and a later op
            or ``kernels.support.deferred.raise_pending`` raises the error.
        RuntimeError: ``impl`` is ``native`` and the compiled library is not available.
    """
    check_tensor("logprobs", logprobs, shape=("T",))
    arguments = LossArguments(
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
    )
    check_arguments(arguments, logprobs.shape[0], logprobs.device)
    check_impl("policy_loss", impl, IMPLS)
    if impl != "auto":
        resolve_impl(impl, logprobs)
    loss, metrics, _ = _policy_loss_op(logprobs, *arguments.plain(), impl)
    return arguments.result(loss, metrics)


def resolve_impl(impl: str, logprobs: Tensor) -> str:
    """Returns the implementation to run for ``logprobs``; ``auto`` becomes the fastest one that can run.

    Raises:
        ValueError: ``impl`` cannot run on such tensors; the message starts with ``impl``.
    """
    has_dtype = logprobs.dtype != torch.float64
    if impl == "auto":
        return fastest_impl(logprobs.device, native_fits=has_dtype, triton_fits=has_dtype)
    if impl == "native" and (logprobs.device.type != "cpu" or not has_dtype):
        raise ValueError(f"impl: 'native' is for CPU tensors below float64, got {logprobs.dtype} on {logprobs.device}")
    if impl == "triton":
        launch.check_triton(logprobs.device)
        if not has_dtype:
            raise ValueError("impl: 'triton' is for tensors below float64, got torch.float64; use 'reference'")
    return impl


def policy_loss_reference(
    logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, cu_seqlens: Tensor, **options: Any
) -> PolicyLoss:
    """The specification of ``policy_loss``, in plain PyTorch with autograd's own gradient.

    Takes the same arguments except ``impl``, and does not check them.
    """
    arguments = LossArguments(old_logprobs, advantages, cu_seqlens, **options)
    logprobs = logprobs.to(compute_dtype(logprobs.dtype))
    batch = spread(arguments, logprobs.shape[0], logprobs.dtype)
    tokens = token_terms(logprobs, batch, arguments.settings)
    loss = (token_losses(tokens, batch, arguments.settings) * batch.scale).sum()
    return arguments.result(loss, policy_loss_metrics(metric_sums(tokens)).to(loss.dtype))


@torch.library.custom_op(
    "balcaprl::policy_loss",
    mutates_args=(),
    schema=f"(Tensor logprobs, {LOSS_SCHEMA}, str impl) -> (Tensor loss, Tensor metrics, Tensor grad_logprobs)",
)
def _policy_loss_op(logprobs, *rest):
    """Runs the forward and its checks of values, which a tracer does not see.

    Returns the loss, the (5,) metrics, and d loss / d logprobs.
    """
    arguments, impl = LossArguments(*rest[:-1]), rest[-1]
    impl, dtype = resolve_impl(impl, logprobs), compute_dtype(logprobs.dtype)
    batch = token_batch(arguments, logprobs.shape[0], dtype, impl, logprobs=logprobs)
    part = token_loss(logprobs.to(dtype).contiguous(), batch, arguments.settings, impl)
    check_parts([part], partial(raise_invalid, arguments, logprobs.shape[0], logprobs.detach()))
    metrics = policy_loss_metrics(part.metric_sums)
    return part.loss_sum.to(dtype), metrics.to(dtype), part.grad_logprobs.to(logprobs.dtype)


@_policy_loss_op.register_fake
def _policy_loss_fake(logprobs, *_):
    dtype = compute_dtype(logprobs.dtype)
    return logprobs.new_empty((), dtype=dtype), logprobs.new_empty(5, dtype=dtype), logprobs.new_empty(logprobs.shape)


def _policy_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(output[2])


def _policy_loss_backward(ctx, grad_loss, _grad_metrics, _grad_gradient):
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss).to(gradient.dtype), *([None] * (len(LossArguments._fields) + 1))


_policy_loss_op.register_autograd(_policy_loss_backward, setup_context=_policy_loss_setup)
