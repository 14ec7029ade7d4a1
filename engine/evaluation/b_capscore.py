"""b-CapScore: the harmonic mean of precision, recall and linguistic quality of each caption, averaged over images.

The linguistic score is used as judged, because the length mask is only a training signal; the mean length ratio is
reported separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from balcaprl.config import RewardConfig, SamplingConfig
from balcaprl.policy import Policy
from balcaprl.reporting.metrics import nanmean
from balcaprl.rewards import Judge, score_groups
from balcaprl.rewards.columns import reward_of
from balcaprl.rollout import Sampler
from balcaprl.types import REWARD_NAMES, Prompt, RolloutGroup


@dataclass(frozen=True)
class Evaluation:
    """Scores of one caption per held-out sample."""

    scores: dict[str, float]
    """Means over images: the rewards, ``b_capscore``, ``length_ratio``. Counts: ``num_images``, ``num_samples`` (more
    than images if an image has several references), ``num_unscorable`` (samples whose caption could not be scored) and
    ``num_excluded`` (samples from which no prompt could be made)."""
    groups: list[RolloutGroup]
    """The captions, as groups of one rollout each."""


def evaluate_captions(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    judge: Judge,
    reward: RewardConfig,
    sampling: SamplingConfig,
    *,
    seed: int,
    greedy: bool,
    batch_size: int = 64,
    num_excluded: int = 0,
) -> Evaluation:
    """Caption each prompt once and score the captions.

    ``num_excluded`` is the number of held-out samples from which no prompt could be made; it is only reported.
    ``greedy=False`` samples from the policy's own distribution, which shows flaws that greedy decoding hides.
    """
    groups: list[RolloutGroup] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        groups += sampler.generate(batch, 1, sampling, seed=seed + start, greedy=greedy)
    score_groups(judge, groups, reward, count_tokens=policy.count_tokens)
    scores = summarise_images(groups, reward.names)
    return Evaluation({**scores, "num_excluded": num_excluded}, groups)


def summarise(groups: Sequence[RolloutGroup], names: Sequence[str] = REWARD_NAMES) -> dict[str, float]:
    """Return means over all rollouts of ``groups`` (the named rewards, b-CapScore and length ratio), and counts."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    breakdowns = [rollout.breakdown for rollout in rollouts if rollout.breakdown is not None]
    return {
        **{name: nanmean(reward_of(b, name) for b in breakdowns) for name in names},
        "b_capscore": nanmean(b.b_capscore for b in breakdowns),
        "length_ratio": nanmean(rollout.length_ratio for rollout in rollouts),
        "num_samples": len(rollouts),
        "num_unscorable": sum(b.error is not None for b in breakdowns),
    }


def summarise_images(groups: Sequence[RolloutGroup], names: Sequence[str] = REWARD_NAMES) -> dict[str, float]:
    """Like ``summarise``, but average over each image's samples first, so an image with five references counts once."""
    by_image: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        by_image.setdefault(group.prompt.sample.image_identity, []).append(group)
    each = [summarise(own, names) for own in by_image.values()]
    counts = ("num_samples", "num_unscorable")
    scores = {name: nanmean(one[name] for one in each) for name in (*names, "b_capscore", "length_ratio")}
    return {**scores, "num_images": len(each), **{name: sum(one[name] for one in each) for name in counts}}
