"""The middle that ``policy_loss``, ``linear_policy_loss`` and ``logits_policy_loss`` share.

Once advantages and reduction are spread over the tokens, the loss (mathematics: ``policy_loss.py``) is a function of each
token's log-probability alone, so that any slice of tokens can be taken by itself::

    arguments = LossArguments(...)                      what the caller passed; check_arguments() without reading values
    batch = token_batch(arguments, T, dtype, impl)      checks values and spreads
    parts = [token_loss(logprobs[a:b], batch.rows(a, b), arguments.settings, impl) for a, b in ranges]
    loss = sum of the parts' loss_sum;   metrics = policy_loss_metrics(stack of their metric_sums)
    result = arguments.result(loss, metrics)

``token_loss`` returns the gradient with the loss; nothing here is seen by autograd but the two functions that
``policy_loss_reference`` is made of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels import native
from balcaprl.kernels.checks import check_choice, check_number, check_tensor

REDUCTIONS = ("token-mean", "sequence-mean", "constant")
LOSS_SCHEMA = (
    "Tensor? old_logprobs, Tensor advantages, Tensor cu_seqlens, float clip_low, float clip_high, "
    "Tensor? sampling_logprobs, float? sampling_ratio_cap, Tensor? reference_logprobs, float kl_coef, str reduction, "
    "float? normalizer"
)
"""The fields of ``LossArguments``, in their order, as a ``torch.library`` schema writes them."""
METRIC_SUMS = ("clipped", "ratio", "ratio_max", "k3_reference", "k3_sampling", "count")
_RATIO_MAX = METRIC_SUMS.index("ratio_max")


class PolicyLoss(NamedTuple):
    """The loss and what to watch beside it. All are 0-d tensors, float64 where the log-probabilities are, else float32.

    The metrics are detached and cover the tokens of *this call*, without ``normalizer``: to join parts, weight the
    means by their tokens. Without tokens they are 0; those whose input was not given are NaN.
    """

    loss: Tensor
    """Differentiable, once."""
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


class LossSettings(NamedTuple):
    """The numbers of the token loss; see ``policy_loss``."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    sampling_ratio_cap: float | None = None
    kl_coef: float = 0.0


class LossArguments(NamedTuple):
    """What the policy losses take beside log-probabilities (or what makes them) and targets; see ``policy_loss``."""

    old_logprobs: Tensor | None
    advantages: Tensor
    cu_seqlens: Tensor
    clip_low: float = 0.2
    clip_high: float = 0.2
    sampling_logprobs: Tensor | None = None
    sampling_ratio_cap: float | None = None
    reference_logprobs: Tensor | None = None
    kl_coef: float = 0.0
    reduction: str = "token-mean"
    normalizer: float | None = None

    @property
    def settings(self) -> LossSettings:
        return LossSettings(self.clip_low, self.clip_high, self.sampling_ratio_cap, self.kl_coef)

    @property
    def per_token(self) -> dict[str, Tensor]:
        """The (T,) tensors that are there, by name."""
        names = ("old_logprobs", "sampling_logprobs", "reference_logprobs")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def plain(self) -> LossArguments:
        """As a ``torch.library`` op takes them: tensors detached, numbers as float."""
        return self._replace(
            old_logprobs=_detached(self.old_logprobs),
            sampling_logprobs=_detached(self.sampling_logprobs),
            reference_logprobs=_detached(self.reference_logprobs),
            advantages=self.advantages.detach(),
            clip_low=float(self.clip_low),
            clip_high=float(self.clip_high),
            sampling_ratio_cap=None if self.sampling_ratio_cap is None else float(self.sampling_ratio_cap),
            kl_coef=float(self.kl_coef),
            normalizer=None if self.normalizer is None else float(self.normalizer),
        )

    def result(self, loss: Tensor, metrics: Tensor) -> PolicyLoss:
        """Names the (5,) metrics, and says NaN where there was nothing to measure.

        Outside of the registered op, which must not return NaN: opcheck holds it to be unequal to itself.
        """
        clip_fraction, ratio_mean, ratio_max, kl, sampling_kl = metrics.detach().unbind()
        kl = torch.full_like(kl, torch.nan) if self.reference_logprobs is None else kl
        sampling_kl = torch.full_like(sampling_kl, torch.nan) if self.sampling_logprobs is None else sampling_kl
        return PolicyLoss(loss, clip_fraction, ratio_mean, ratio_max, kl, sampling_kl)


class TokenBatch(NamedTuple):
    """What the loss of T tokens needs beside their log-probabilities: (T,) contiguous tensors of the compute dtype."""

    old_logprobs: Tensor | None
    """None: on-policy, the log-probabilities themselves."""
    advantages: Tensor
    scale: Tensor
    """What each token's loss is multiplied by before the sum: reduction and normalizer."""
    sampling_logprobs: Tensor | None
    reference_logprobs: Tensor | None

    def rows(self, begin: int, end: int) -> TokenBatch:
        """The tokens from ``begin`` to ``end``."""
        old, advantages, scale, sampling, reference = (None if t is None else t[begin:end] for t in self)
        assert advantages is not None  # the two that are always there
        assert scale is not None
        return TokenBatch(old, advantages, scale, sampling, reference)


class TokenLoss(NamedTuple):
    """What ``token_loss`` returns."""

    loss_sum: Tensor
    """0-d float64: the sum of loss times scale."""
    metric_sums: Tensor
    """(6,) float64, in the order of ``METRIC_SUMS``; ``ratio_max`` is the largest, not a sum."""
    grad_logprobs: Tensor
    """(T,) in the dtype of the log-probabilities: d loss_sum / d logprobs."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the loss of log-probabilities of ``dtype`` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def check_arguments(arguments: LossArguments, num_tokens: int, device: torch.device) -> None:
    """Checks all that can be told without reading a tensor's values.

    Raises:
        ValueError: starts with the argument's name.
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
    """Checks that all values are finite, at the price of one read of a flag from the device for all tensors together.

    Raises:
        ValueError: starts with the first name whose tensor has a value that is not.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if present and not torch.stack([tensor.isfinite().all() for tensor in present.values()]).all():
        for name, tensor in present.items():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise ValueError(f"{name}: {bad} of {tensor.numel()} values are not finite")


def check_ragged(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Checks the values of ``cu_seqlens``: from 0 to ``num_tokens``, never falling."""
    ends_fit = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_tokens)
    if not (ends_fit & (cu_seqlens.diff() >= 0).all()):
        raise ValueError(
            f"cu_seqlens: expected offsets that never fall, from 0 to {num_tokens}; got {cu_seqlens.tolist()}"
        )


def token_batch(
    arguments: LossArguments, num_tokens: int, dtype: torch.dtype, impl: str, *, logprobs: Tensor | None = None
) -> TokenBatch:
    """Checks the values of ``arguments`` and spreads them over ``num_tokens`` tokens.

    Args:
        arguments: as ``check_arguments`` accepts them.
        num_tokens: T.
        dtype: float32 or float64, see ``compute_dtype``.
        impl: of the op, resolved: not ``auto``. ``native`` knows float32.
        logprobs: (T,) where the caller has passed them in: checked with the others.

    Raises:
        ValueError: a value is not finite, or ``cu_seqlens`` are no offsets; starts with the argument's name.
    """
    if impl == "native" or (impl == "triton" and dtype == torch.float32):
        return _checked_batch(arguments, num_tokens, logprobs, impl)
    _check_values(arguments, num_tokens, logprobs)
    return spread(arguments, num_tokens, dtype)


def _checked_batch(arguments: LossArguments, num_tokens: int, logprobs: Tensor | None, impl: str) -> TokenBatch:
    """By the implementations that check and spread in one go."""
    if impl == "native":
        batch = _token_batch_native(arguments, num_tokens, logprobs)
    else:
        from balcaprl.kernels import triton_token_loss

        batch = triton_token_loss.token_batch(arguments, num_tokens, logprobs)
    if batch is None:
        _check_values(arguments, num_tokens, logprobs)  # says what it was
        raise ValueError("advantages or log-probabilities: a value that float32 cannot hold")
    return batch


def _check_values(arguments: LossArguments, num_tokens: int, logprobs: Tensor | None) -> None:
    check_ragged(arguments.cu_seqlens, num_tokens)
    check_finite(logprobs=logprobs, advantages=arguments.advantages, **arguments.per_token)


def _token_batch_native(arguments: LossArguments, num_tokens: int, logprobs: Tensor | None) -> TokenBatch | None:
    """``balcaprl_token_batch`` of ``kernels/csrc/policy_loss.cpp``; None if a value is not as it should be."""
    # Named, so that converted copies live until the call returns.
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
    """Contiguous float32, by a copy only where it is something else."""
    return tensor.to(torch.float32).contiguous()


def spread(arguments: LossArguments, num_tokens: int, dtype: torch.dtype) -> TokenBatch:
    """``token_batch`` without its checks."""
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
    """Loss, metrics and gradient of T tokens (a whole batch, or any rows of it) in one go; no autograd.

    Args:
        logprobs_T: (T,) in the dtype of ``batch``, contiguous, finite.
        batch: as ``token_batch`` gives it.
        settings: see ``policy_loss``.
        impl: resolved: not ``auto``. ``native`` knows float32; ``triton`` takes the reference for float64.
    """
    if impl == "native":
        return _token_loss_native(logprobs_T, batch, settings)
    if impl == "triton" and logprobs_T.dtype == torch.float32:
        from balcaprl.kernels import triton_token_loss

        return triton_token_loss.token_loss(logprobs_T, batch, settings)
    with torch.no_grad():
        tokens = token_terms(logprobs_T, batch, settings)
        losses_T = token_losses(tokens, batch, settings)
        grad_T = _token_gradient(tokens, batch, settings) * batch.scale
        loss_sum = (losses_T * batch.scale).sum(dtype=torch.float64)
        return TokenLoss(loss_sum, metric_sums(tokens), grad_T)


def _token_loss_native(logprobs_T: Tensor, batch: TokenBatch, settings: LossSettings) -> TokenLoss:
    """``balcaprl_token_loss`` of ``kernels/csrc/policy_loss.cpp``: one pass over blocks of tokens, on torch's threads."""
    sums = torch.empty(1 + len(METRIC_SUMS), dtype=torch.float64)
    gradient_T = torch.empty(logprobs_T.shape[0])
    status = native.library().balcaprl_token_loss(
        logprobs_T.shape[0],
        logprobs_T.data_ptr(),
        *(None if t is None else t.data_ptr() for t in batch),
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
    """(5,) float64 metrics in the order of ``PolicyLoss``, from the (6,) sums of one part or the (N, 6) of several.

    0 where there is no token, or no input to measure.
    """
    joined = metric_sums.view(-1, len(METRIC_SUMS))
    sums = joined.sum(dim=0)
    count = sums[-1].clamp(min=1.0)
    return torch.cat([sums[:2] / count, joined[:, _RATIO_MAX].amax(dim=0, keepdim=True), sums[3:5] / count])


class TokenTerms(NamedTuple):
    """What loss, gradient and metrics are made of; all (T,) in the compute dtype."""

    ratio: Tensor
    surrogate_ratio: Tensor
    """``ratio``, and 1 where the advantage is 0: an overflowing ratio times 0 would be NaN."""
    clipped: Tensor
    """Bool: the clip stops the gradient."""
    importance: Tensor | None
    reference_difference: Tensor | None
    sampling_difference: Tensor | None


def token_terms(logprobs_T: Tensor, batch: TokenBatch, settings: LossSettings) -> TokenTerms:
    """The terms, differentiable in ``logprobs_T``."""
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
    """(T,) losses before scale and sum."""
    clipped_ratio = tokens.surrogate_ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    losses_T = -torch.minimum(tokens.surrogate_ratio * batch.advantages, clipped_ratio * batch.advantages)
    if tokens.importance is not None:
        losses_T = losses_T * tokens.importance
    if settings.kl_coef > 0.0 and tokens.reference_difference is not None:
        losses_T = losses_T + settings.kl_coef * _k3(tokens.reference_difference)
    return losses_T


def metric_sums(tokens: TokenTerms) -> Tensor:
    """(6,) float64, detached, in the order of ``METRIC_SUMS``; 0 where the input is missing."""
    ratio = tokens.ratio.detach().double()
    zero = ratio.new_zeros(())
    differences = (tokens.reference_difference, tokens.sampling_difference)
    divergences = [zero if d is None else _k3(d.detach()).sum(dtype=torch.float64) for d in differences]
    largest = ratio.max() if ratio.shape[0] else zero
    clipped, count = tokens.clipped.sum(dtype=torch.float64), torch.full_like(zero, ratio.shape[0])
    return torch.stack([clipped, ratio.sum(), largest, *divergences, count])


def _token_gradient(tokens: TokenTerms, batch: TokenBatch, settings: LossSettings) -> Tensor:
    """d token / d logprobs, (T,)."""
    gradient = -(batch.advantages * tokens.surrogate_ratio).masked_fill(tokens.clipped, 0.0)
    if tokens.importance is not None:
        gradient = gradient * tokens.importance
    if settings.kl_coef > 0.0 and tokens.reference_difference is not None:
        gradient = gradient - settings.kl_coef * tokens.reference_difference.expm1()
    return gradient


def _k3(difference: Tensor) -> Tensor:
    """exp(d) - d - 1, by way of expm1: it keeps its digits near 0."""
    return difference.expm1() - difference


def _token_scale(
    lengths_R: Tensor, num_tokens: int, reduction: str, normalizer: float | None, dtype: torch.dtype
) -> Tensor:
    """(T,): 1 / (the reduction's denominator)."""
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
