"""The records of the policy losses: what a caller passes, what an implementation takes, and what comes back.

All implementations use these records, so this module imports none of the implementations. ``policy_loss.py`` has the
mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOSS_SCHEMA = (
    "Tensor? old_logprobs, Tensor advantages, Tensor cu_seqlens, float clip_low, float clip_high, "
    "Tensor? sampling_logprobs, float? sampling_ratio_cap, Tensor? reference_logprobs, float kl_coef, str reduction, "
    "float? normalizer"
)
"""The fields of ``LossArguments``, in the same order, in the syntax of a ``torch.library`` schema."""
METRIC_SUMS = ("clipped", "ratio", "ratio_max", "k3_reference", "k3_sampling", "count")


class PolicyLoss(NamedTuple):
    """The loss and its metrics: 0-d tensors, float64 for float64 log-probabilities, otherwise float32.

    The metrics are detached, cover only the tokens of *this call*, and do not use ``normalizer``. To join the metrics
    of several calls, weight the means by the calls' numbers of tokens. Without tokens the metrics are 0. A metric whose
    input was not given is NaN.
    """

    loss: Tensor
    """The loss, differentiable once."""
    clip_fraction: Tensor
    """Share of tokens whose policy gradient is 0 because of the clip."""
    ratio_mean: Tensor
    """Mean of exp(logprobs - old_logprobs)."""
    ratio_max: Tensor
    """Largest exp(logprobs - old_logprobs)."""
    kl: Tensor
    """Mean k3 estimate of KL(policy || reference policy), from ``reference_logprobs``."""
    sampling_kl: Tensor
    """Mean k3 estimate of KL(sampler || trainer): exp(d) - d - 1 with d = old_logprobs - sampling_logprobs. It is never
    negative, and 0 if sampler and trainer agree on every token."""


class LossSettings(NamedTuple):
    """Numeric settings of the token loss; ``policy_loss`` documents them."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    sampling_ratio_cap: float | None = None
    kl_coef: float = 0.0


class LossArguments(NamedTuple):
    """The arguments that all policy losses share; ``policy_loss`` documents them.

    The inputs in which the losses differ (log-probabilities, logits, hidden states, weight, targets) are not here.
    """

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
        """The per-token (T,) tensors that are not None, by name."""
        names = ("old_logprobs", "sampling_logprobs", "reference_logprobs")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def plain(self) -> LossArguments:
        """The arguments in the form that a ``torch.library`` op accepts: tensors detached, numbers as float."""
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
        """Makes a ``PolicyLoss`` from the loss and the (5,) metrics, with NaN for a metric whose input was not given.

        The registered op itself must not return NaN, because opcheck compares outputs and NaN differs from itself.
        """
        clip_fraction, ratio_mean, ratio_max, kl, sampling_kl = metrics.detach().unbind()
        kl = torch.full_like(kl, torch.nan) if self.reference_logprobs is None else kl
        sampling_kl = torch.full_like(sampling_kl, torch.nan) if self.sampling_logprobs is None else sampling_kl
        return PolicyLoss(loss, clip_fraction, ratio_mean, ratio_max, kl, sampling_kl)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


class TokenBatch(NamedTuple):
    """Inputs of the loss of T tokens except their log-probabilities: (T,) contiguous tensors of the compute dtype."""

    old_logprobs: Tensor | None
    """Log-probabilities at the start of the batch's updates; None means on-policy: the log-probabilities themselves."""
    advantages: Tensor
    scale: Tensor
    """Factor of each token's loss in the sum; it includes the reduction and ``normalizer``."""
    sampling_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    status: Tensor | None = None
    """(1,) int32: 0 if all values were valid, otherwise 1; ``token_loss`` adds it to ``num_bad``. None if all values
    have been checked already."""

    @property
    def per_token(self) -> tuple[Tensor | None, ...]:
        """All tensors but ``status``."""
        return self[:5]

    def rows(self, begin: int, end: int) -> TokenBatch:
        """Selects the tokens [begin, end)."""
        old, advantages, scale, sampling, reference = (None if t is None else t[begin:end] for t in self.per_token)
        assert advantages is not None  # advantages and scale are never None
        assert scale is not None
        return TokenBatch(old, advantages, scale, sampling, reference, self.status)


class TokenLoss(NamedTuple):
    """Loss, metric sums and gradient of some tokens: the result of ``token_loss``."""

    loss_sum: Tensor
    """Sum over tokens of loss times scale, 0-d float64."""
    metric_sums: Tensor
    """Sums of the metrics, (6,) float64, in the order of ``METRIC_SUMS``; ``ratio_max`` is a maximum, not a sum."""
    grad_logprobs: Tensor
    """Gradient d loss_sum / d logprobs, (T,) in the dtype of the log-probabilities."""
    num_bad: Tensor | None = None
    """0-d float64: 0 if the batch's ``status`` is 0 and all log-probabilities are finite; otherwise positive, and
    ``loss_sum`` is NaN. Only whether it is 0 is meaningful. None if all values have been checked already."""
