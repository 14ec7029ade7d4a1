"""Caption lengths, and what the length ratio does to the linguistic reward.

``rho = completion length / reference length``, both in ``reward.length_unit``.

==========  =========================================================================================================
``mask``    the linguistic reward counts where ``tau_low <= rho <= tau_high`` and is 0 elsewhere; done inside
            ``balcaprl.kernels.advantages.grouped_advantages``, which normalises afterwards
``linear``  the linguistic reward is multiplied by ``max(0, 1 - |1 - rho|)``
``none``    the linguistic reward stays as judged
==========  =========================================================================================================

The same rule applies to custom rewards with ``mask``. A missing score (NaN) stays missing under every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from balcaprl.config import RewardConfig
from balcaprl.rewards.unicode_text import count_words
from balcaprl.types import RolloutGroup

CountTokens = Callable[[str], int]


def measure_length(text: str, config: RewardConfig, count_tokens: CountTokens | None = None) -> float:
    """Return a caption's length in ``reward.length_unit``: words by Unicode's rules (``count_words``) or policy tokens.

    Raises:
        ValueError: the unit is tokens, and ``count_tokens`` is missing.
    """
    if config.length_unit == "words":
        return float(count_words(text))
    if count_tokens is None:
        raise ValueError("reward.length_unit is tokens: count_tokens is needed, such as Policy.count_tokens")
    return float(count_tokens(text))


def is_outside_bounds(length: float, reference_length: float, config: RewardConfig) -> bool:
    """Return whether the ``mask`` rule sets the linguistic reward of a caption of this length to 0."""
    return not config.tau_low <= length / reference_length <= config.tau_high


def linear_factor(lengths: Tensor, reference_lengths: Tensor) -> Tensor:
    """(R,), (R,) -> (R,): the factor by which the ``linear`` rule multiplies the linguistic reward."""
    return (1.0 - (1.0 - lengths / reference_lengths).abs()).clamp(min=0.0)


def length_vectors(groups: Sequence[RolloutGroup], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(R,), (R,): completion and reference lengths of all rollouts, group after group."""
    pairs = [(rollout.length, rollout.reference_length) for group in groups for rollout in group.rollouts]
    lengths, reference_lengths = torch.tensor(pairs, dtype=dtype).reshape(-1, 2).unbind(1)
    return lengths.contiguous(), reference_lengths.contiguous()
