"""The interface and common code of all samplers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from balcaprl.config import SamplingConfig
from balcaprl.logtext import printable
from balcaprl.policy import Policy
from balcaprl.types import Completion, Prompt, Rollout, RolloutGroup, SyncReport


@dataclass(frozen=True)
class Draw:
    """One completion as a sampler yields it."""

    prompt: int
    """Index of the completion's prompt."""
    position: int
    """Index of the completion among those of its prompt."""
    rollout: Rollout


@runtime_checkable
class Sampler(Protocol):
    """Draws completions from the policy."""

    name: str
    """The sampler's name in ``rollout.sampler``."""
    policy_version: int
    """Version of the weights that the sampler uses; ``sync`` sets it."""

    @property
    def policy(self) -> Policy:
        """The policy that is sampled from; the trainer refuses a sampler of any policy other than its own."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, seed: int, greedy: bool = False
    ) -> list[RolloutGroup]:
        """Sample as ``stream`` does, and return one group for each prompt, in order; the errors are the same."""
        ...

    def stream(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, seed: int, greedy: bool = False
    ) -> Iterator[Draw]:
        """Sample ``group_size`` completions of each prompt.

        The ids in ``policy.banned_token_ids`` are never sampled. Before the length limit, a completion ends only at an
        id in ``policy.eos_token_ids`` or at a stop text. ``sampling_logprobs`` belong to the distribution that was
        sampled from: after the temperature, and with the banned ids removed.

        Args:
            prompts: Prompts from ``policy.prepare``.
            group_size: Number of completions for each prompt.
            sampling: Temperature, length limit and stop texts.
            seed: The same seed, prompts and weights give the same completions on the same CPU. The global random
                state is neither used nor changed.
            greedy: Take the likeliest token each time; the temperature is then 1, also in ``sampling_logprobs``.

        Yields:
            Each completion as soon as it is complete, in any order. A sampler in this process only continues with the
            others when the next one is requested.
        """
        ...

    def sync(self, policy_version: int) -> SyncReport:
        """Make the next ``generate`` sample from the policy's weights as they are at this call."""
        ...

    def close(self) -> None:
        """Free the sampler's resources. A closed sampler cannot generate."""
        ...


class PolicySampler(Sampler):
    """What the samplers of this package share: the policy, the version of its weights, and ``generate``."""

    def __init__(self, policy: Policy) -> None:
        """Sample from ``policy``."""
        self._policy = policy
        self.policy_version = 0

    @property
    def policy(self) -> Policy:
        """The policy that is sampled from. See ``Sampler.policy``."""
        return self._policy

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, seed: int, greedy: bool = False
    ) -> list[RolloutGroup]:
        """Collect all of ``stream`` into one group for each prompt, in order. See ``Sampler.generate``."""
        draws = self.stream(prompts, group_size, sampling, seed=seed, greedy=greedy)
        return gather(prompts, draws, self.policy_version)


def check_request(prompts: Sequence[Prompt], group_size: int) -> None:
    """Raise ValueError if there is nothing to sample."""
    if not prompts:
        raise ValueError("generate needs at least one prompt")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, is {group_size}")


def check_context(policy: Policy, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
    """Raise ValueError, naming the sample, if a prompt with its longest completion exceeds the model's positions."""
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        if limit is not None and len(prompt.prompt_ids) + sampling.max_completion_tokens > limit:
            raise ValueError(
                f"prompts: sample {printable(prompt.sample.sample_id)} has {len(prompt.prompt_ids)} tokens; with a "
                f"completion of {sampling.max_completion_tokens} they exceed the model's {limit} positions: lower "
                "data.max_pixels or rollout.sampling.max_completion_tokens"
            )


def make_rollouts(
    policy: Policy, token_ids: Sequence[list[int]], logprobs: Sequence[list[float]], stop: Sequence[str] = ()
) -> list[Rollout]:
    """Make rollouts from sampled ids and their log-probabilities.

    Their text has no special tokens, and is cut before the first stop text.
    """
    texts = policy.tokenizer.batch_decode(list(token_ids), skip_special_tokens=True)
    ends = set(policy.eos_token_ids)
    rollouts = []
    for ids, text, values in zip(token_ids, texts, logprobs, strict=True):
        cut = first_stop(text, stop)
        finished = cut is not None or (bool(ids) and ids[-1] in ends)
        rollouts.append(Rollout(Completion(ids, text[:cut], values, finished)))
    return rollouts


def gather(prompts: Sequence[Prompt], draws: Iterable[Draw], policy_version: int | None) -> list[RolloutGroup]:
    """Collect all draws of a ``stream`` into one group for each prompt, in order."""
    found: list[dict[int, Rollout]] = [{} for _ in prompts]
    for draw in draws:
        found[draw.prompt][draw.position] = draw.rollout
    return [
        RolloutGroup(prompt, [rollouts[position] for position in sorted(rollouts)], policy_version)
        for prompt, rollouts in zip(prompts, found, strict=True)
    ]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return the index at which the first stop text begins; None if the text has none."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places) if places else None


def prompt_seed(seed: int, index: int) -> int:
    """Make a seed for the prompt at ``index``.

    A group's completions take this seed plus 0, 1, ...; ``seed + index`` would therefore repeat seeds across groups.
    """
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def instead_of_vllm(policy: Policy) -> str:
    """Return advice for a policy that vLLM cannot sample from, as the end of a message."""
    if policy.family.is_known:
        return (
            "set rollout.sampler to hf, which samples from the policy itself, as it was compared with its model at load"
        )
    return f"model_type {policy.model.config.model_type!r} can be sampled by no other sampler; train another model"


def check_prompt(policy: Policy, prompt: Prompt, used: Sequence[int]) -> None:
    """Raise RuntimeError if a sampler expanded a prompt differently from the policy's processor."""
    if list(used) != prompt.prompt_ids.tolist():
        raise RuntimeError(
            f"sample {prompt.sample.sample_id}: vLLM sampled after a prompt of {len(used)} tokens, the policy prepared "
            f"one of {len(prompt.prompt_ids)}, or of other ids: this version of vLLM changes prompts; "
            f"{instead_of_vllm(policy)}"
        )
