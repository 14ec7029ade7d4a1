"""Checks that the sampler serves the policy's weights, by comparing both sides' log-probabilities of a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from balcaprl.policy import Group, Policy
from balcaprl.rollout.sampler import instead_of_vllm
from balcaprl.rollout.weights import StaleWeightsError
from balcaprl.types import Prompt

logger = logging.getLogger(__name__)

NUM_PROBE_TOKENS = 4
_ROUNDING = 2e-3
"""Largest log-probability difference that rounding in float32 explains, in nats; measured: 1e-6 to 1e-4."""
_ROUNDING_HALF = 0.3
"""Largest log-probability difference, in nats, that rounding explains if either side computes in half precision."""
_NO_ROUNDING = 1.0
"""Largest log-probability difference, in nats, that any precision explains, even that of a quantised server, because
greedy tokens are likely ones."""


class Probe:
    """Compares a sampler's log-probabilities with the policy's on one short prompt.

    Args:
        policy: the trainer's policy.
        ask: function that greedily samples ``NUM_PROBE_TOKENS`` ids for a prompt; returns ids and log-probabilities.
        same_precision: whether the sampler computes in the policy's data type.
    """

    def __init__(
        self, policy: Policy, ask: Callable[[Prompt], tuple[list[int], list[float]]], *, same_precision: bool
    ) -> None:
        self._policy, self._ask, self._same_precision = policy, ask, same_precision
        self._prompt: Prompt | None = None
        self._tolerance = _ROUNDING_HALF
        self.passed = False
        """Whether the weights of at least one sync were verified since ``calibrate``."""

    def choose(self, prompts: Sequence[Prompt]) -> None:
        """Use the shortest of these prompts for the following probes."""
        self._prompt = min(prompts, key=lambda prompt: len(prompt.prompt_ids))

    def difference(self) -> float:
        """Ask the sampler, and return the largest difference of both sides' log-probabilities; 0 before ``choose``."""
        prompt = self._prompt
        if prompt is None:
            return 0.0
        token_ids, logprobs = self._ask(prompt)
        completion = torch.tensor(token_ids, dtype=torch.long)
        expected = sampler_logprobs(self._policy, Group(prompt.prompt_ids, [completion], prompt.image_inputs))
        return (torch.tensor(logprobs) - expected).abs().max().item()

    def calibrate(self) -> None:
        """Set the tolerance from how far both sides are apart on the same weights.

        Raises:
            RuntimeError: both sides are so far apart that they cannot be the same model.
        """
        self.passed = False
        exact = self._same_precision and self._policy.dtype == torch.float32 and self._policy.autocast_dtype is None
        self._tolerance = _ROUNDING if exact else _ROUNDING_HALF
        difference = self.difference()
        if not difference <= self._tolerance:
            told = f"the sampler's log-probabilities differ from the policy's by {difference:.3g} on the same weights"
            if exact or not difference <= _NO_ROUNDING:
                raise RuntimeError(
                    f"{told}: this version of vLLM computes another model, or sees other images; "
                    f"{instead_of_vllm(self._policy)}"
                )
            logger.warning("%s: is it the same model?", told)
            self._tolerance = 3 * difference

    def verify(self, policy_version: int) -> None:
        """Check after a sync that the sampler serves the policy's weights.

        Raises:
            StaleWeightsError: the sampler serves other weights or cached results.
        """
        difference = self.difference()
        if not difference <= self._tolerance:
            raise StaleWeightsError(
                f"after the sync to policy version {policy_version} the sampler's log-probabilities differ from the "
                f"policy's by {difference:.3g} (at most {self._tolerance:.3g} is rounding): it still serves other weights "
                "or cached results. Set rollout.sync to reload, or rollout.sampler to hf"
            )
        self.passed = True


@torch.no_grad()
def sampler_logprobs(policy: Policy, group: Group) -> torch.Tensor:
    """Compute log-probabilities (T,) of a few tokens, with the banned ids excluded even if those are the likeliest."""
    packed = policy.pack([group])
    with policy.autocast():
        logits = policy.head.logits(policy.hidden_states(packed)).float()
    logits[:, list(policy.banned_token_ids)] = -torch.inf
    return logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0].cpu()
