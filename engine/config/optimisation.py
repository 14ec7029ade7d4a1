"""The sections ``advantage``, ``loss`` and ``optim``: from rewards to an update."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from balcaprl.config.base import Section


class AdvantageConfig(Section):
    """How rewards become advantages."""

    method: Literal["c-gdpo", "gdpo", "grpo"] = "c-gdpo"
    """``c-gdpo``: each reward is normalised by itself within its group, and the results are summed. ``gdpo``: the sums
    are then also whitened over the batch. ``grpo``: the rewards are summed first, and the sum is normalised."""
    eps: float = Field(1e-4, gt=0)
    """Added to each standard deviation (ours; as in TRL)."""


class LossConfig(Section):
    """The clipped policy loss."""

    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of the divergence from the frozen reference policy; 0 loads no reference."""
    reduction: Literal["token-mean", "sequence-mean", "constant"] = "token-mean"
    """How the token losses of the global batch become one number."""
    sampling_ratio_cap: float | None = Field(None, gt=0)
    """Cap of the truncated importance weight exp(old_logprobs - sampling_logprobs); null: no such weight."""


class OptimConfig(Section):
    """AdamW, its schedule, and how a batch is split."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment (ours)."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of all gradients together; if theirs is larger, they are scaled down to it."""
    max_update_ratio: float = Field(1.0, gt=0)
    """An update is refused if its norm is more than this times the norm of all the policy's weights at the start
    (ours). Ordinary updates are below 0.02."""
    max_weight_growth: float = Field(10.0, gt=0)
    """Updates are refused once the norm of the trained weights is more than this times the norm of all the policy's
    weights at the start (ours)."""
    max_refused_updates: int = Field(5, ge=1)
    """Number of refused updates in a row after which the run ends (ours). Updates whose gradient or moments are not
    finite are refused too."""
    fused: bool = True
    """On CUDA, make an update in a few launches of fused kernels, without float32 copies of the gradients. False:
    PyTorch's AdamW, as on the CPU."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate of the schedules ``linear`` and ``cosine``, as a share of ``lr``."""
    epochs_per_batch: int = Field(1, ge=1)
    """Updates made from one batch of rollouts."""
    accumulation_steps: int = Field(1, ge=1)
    """Number of parts into which a batch is split, if it has that many groups. More parts save memory, and do not
    change the result."""
    token_budget: int | None = Field(None, ge=1)
    """Most tokens that go through the model at once, including padding; a batch is split further until its parts fit. A
    group stays whole unless it is too large by itself; then its prompt goes through once for each piece (see the metric
    ``num_split_groups``)."""
    prompt_sharing: Literal["auto", "shared", "repeated"] = "auto"
    """``shared``: the prompt and images of a group go through the model once. ``repeated``: the prompt goes through
    once per completion, padded. ``auto``: shared if the model supports it and it saves enough tokens to be faster. The
    result is the same."""

    def learning_rate(self, step: int, num_steps: int) -> float:
        """Learning rate of the update that comes after ``step`` updates, in a run of ``num_steps`` updates."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        falling = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * falling)
