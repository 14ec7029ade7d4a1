"""Early checks of whether a run can learn anything, from its configuration and references, before a model is loaded.

A certain fault is an error. All likely faults together give one warning. ``learning.py`` finds the other faults during
the run.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

from balcaprl.config import RewardConfig, TrainConfig
from balcaprl.types import REWARD_NAMES

logger = logging.getLogger(__name__)

GREEDY_TEMPERATURE = 1e-5
"""Temperature below which vLLM takes the likeliest token; at such temperatures other samplers in effect do the same."""
_COLD_TEMPERATURE = 0.1
_FEW_TOKENS = 4
_SMALLEST_CHANGE = 1e-9
"""Smallest change that float32 can still make to a weight of ordinary size, 0.02."""
_STRONGEST_KL = 10.0
_NEVER_MET = "a condition is on a reward that the judge does not give, or asks for more than 1, the best score"


def expected_rewards(config: RewardConfig) -> list[str]:
    """Names of the rewards that a run learns from: those that are given and have a weight above 0."""
    given = config.names if config.judge != "none" else config.names[len(REWARD_NAMES) :]
    return [name for name, weight in zip(config.names, config.weights, strict=True) if weight and name in given]


def refuse_hopeless(config: TrainConfig) -> None:
    """Raise ValueError if it is certain that a run learns nothing; the message says why, and what to change.

    A run of no steps only evaluates and is not meant to learn: nothing is refused.
    """
    if not config.steps:
        return
    reward, temperature = config.reward, config.rollout.sampling.temperature
    expected = expected_rewards(reward)
    if not expected:
        judge = "reward.judge is none, and " if reward.judge == "none" else ""
        raise ValueError(f"{judge}no reward has a weight above 0: there is nothing to learn from; see reward.custom")
    never = _never_met(reward)
    if never.issuperset(expected):
        raise ValueError(f"reward.conditions: {', '.join(expected)} would never count; {_NEVER_MET}")
    if config.rollout.group_size < 2:
        raise ValueError("rollout.group_size must be at least 2: one completion by itself teaches nothing")
    if temperature < GREEDY_TEMPERATURE:
        raise ValueError(
            f"rollout.sampling.temperature: {temperature:g} is greedy, so that all completions of an image are the same and "
            "there is nothing to compare; sample at about 1"
        )


def warn_of_doubts(config: TrainConfig, references: Sequence[str]) -> None:
    """Log one warning with all reasons why a run may learn nothing, if there are any.

    ``references`` are some of the reference captions in the run's data.
    """
    found = doubts(config, references) if config.steps else []
    if found:
        logger.warning("this run may learn little or nothing: %s", "; ".join(found))


def doubts(config: TrainConfig, references: Sequence[str]) -> list[str]:
    """All reasons why a run may learn nothing; the arguments are those of ``warn_of_doubts``."""
    sampling, reward, kl_coef = config.rollout.sampling, config.reward, config.loss.kl_coef
    change, most = largest_change(config), sampling.max_completion_tokens
    stops = [text for text in sampling.stop if len(text) == 1 and (text == " " or text.isalnum())]
    table = {
        f"rollout.sampling.temperature is {sampling.temperature:g}: the completions of an image will hardly differ": (
            sampling.temperature < _COLD_TEMPERATURE
        ),
        f"rollout.sampling.max_completion_tokens is {most}: no caption fits": most < _FEW_TOKENS,
        f"rollout.sampling.stop ends captions at {stops!r}, after a word or less": bool(stops),
        f"reward.conditions: {', '.join(sorted(_never_met(reward)))} will never count; {_NEVER_MET}": bool(
            _never_met(reward)
        ),
        f"an update changes a weight by {change:.1g} at most, too little for float32: see optim.lr, optim.eps, "
        "optim.max_grad_norm, optim.warmup_steps, advantage.eps, loss.sampling_ratio_cap and the rewards' weights": (
            change < _SMALLEST_CHANGE
        ),
        f"loss.kl_coef is {kl_coef:g}: it holds the policy where it is": kl_coef > _STRONGEST_KL,
    }
    return [*(message for message, holds in table.items() if holds), *_always_masked(config, references)]


def largest_change(config: TrainConfig) -> float:
    """Roughly the largest change that one update can make to one weight.

    This is AdamW's step size at the largest learning rate that the warm-up reaches and the largest gradient that can
    occur.
    """
    optim, cap = config.optim, config.loss.sampling_ratio_cap
    updates = config.steps * optim.epochs_per_batch
    reached = optim.lr * min(1.0, max(1, updates) / max(1, optim.warmup_steps))
    weight = max(
        w
        for name, w in zip(config.reward.names, config.reward.weights, strict=True)
        if name in expected_rewards(config.reward)
    )
    gradient = min(optim.max_grad_norm, weight * min(1.0, cap or 1.0) / (1.0 + config.advantage.eps))
    return reached * gradient / (gradient + optim.eps)


def _always_masked(config: TrainConfig, references: Sequence[str]) -> list[str]:
    """One warning if captions are cut before they are long enough for the length mask; otherwise none.

    The check assumes that a token is at most one word, which is nearly always true.
    """
    reward, most = config.reward, config.rollout.sampling.max_completion_tokens
    if reward.length_rule != "mask" or not reward.linguistic_weight or not references or most < _FEW_TOKENS:
        return []
    from balcaprl.rewards.unicode_text import count_words  # its package imports torch

    words = statistics.median(map(count_words, references))
    if most >= reward.tau_low * words:
        return []
    return [
        f"rollout.sampling.max_completion_tokens is {most}, and references have about {words:.0f} words: the length mask "
        f"(reward.tau_low {reward.tau_low:g}) takes the linguistic reward of nearly every caption"
    ]


def _never_met(config: RewardConfig) -> set[str]:
    """Names of the expected rewards whose condition can never hold.

    A condition on a custom reward can always hold, because such a reward may give any number.
    """
    missing = REWARD_NAMES if config.judge == "none" else ()
    return {
        c.reward for c in config.conditions if c.on in missing or (c.on in REWARD_NAMES and c.at_least > 1.0)
    } & set(expected_rewards(config))
