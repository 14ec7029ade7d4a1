"""The records of ``adamw_update``: what a caller passes and what comes back. ``adamw.py`` has the mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

CLIP_EPS = 1e-6
"""Added to the gradient's norm before ``max_grad_norm`` is divided by it, as in ``torch.nn.utils.clip_grad_norm_``."""


class AdamWSettings(NamedTuple):
    """Hyperparameters of one update; all are finite."""

    lr: float
    """Learning rate, >= 0."""
    beta1: float
    """Decay of the first moment, in [0, 1)."""
    beta2: float
    """Decay of the second moment, in [0, 1)."""
    eps: float
    """Added to the root of the second moment, > 0."""
    weight_decay: float
    """Decoupled weight decay, >= 0."""
    max_grad_norm: float
    """Largest norm of all gradients together, > 0; if theirs is larger, they are scaled down to it."""


class AdamWTensors(NamedTuple):
    """One parameter and its state. All tensors have the same shape and device; all but the gradient are contiguous."""

    parameter: Tensor
    """The weights as the model uses them; written in place."""
    master: Tensor
    """The weights that are updated, in place: ``parameter`` itself, or its copy in a wider dtype."""
    gradient: Tensor | None
    """Gradient before clipping; None leaves the parameter out of the update."""
    exp_avg: Tensor | None
    """First moment, in the dtype of ``master``; updated in place. Not read if there is no gradient."""
    exp_avg_sq: Tensor | None
    """Second moment, likewise."""
    step: int
    """Number of updates that this parameter has had."""


class AdamWNorms(NamedTuple):
    """Euclidean norms over all parameters."""

    gradient: float
    """Norm of the gradient before clipping."""
    update: float
    """Upper bound of the norm of what the update adds to the weights: exact without weight decay, otherwise at most
    ``2 lr weight_decay |weights|`` too large."""
    weights: float
    """Norm of the masters before the update."""


@dataclass(frozen=True)
class AdamWUpdate:
    """An update that has been measured but not yet made."""

    norms: AdamWNorms
    apply: Callable[[], None]
    """Makes the update. Call it at most once, and before anything else changes the tensors."""


def bias_corrections(step: int, settings: AdamWSettings) -> tuple[float, float]:
    """Bias-correction factors of the first moment and of the root of the second, for the next update of a parameter
    that has had ``step`` updates."""
    number = step + 1
    return 1 / (1 - settings.beta1**number), 1 / math.sqrt(1 - settings.beta2**number)
