"""Measures how peaked a captioner's distribution is, on a model's own sampled captions at temperature 1.

    python bench/policy_entropy.py [--model FOLDER] [--prompts 32] [--group_size 4]

The script prints one JSON object: the mean entropy in nats, the share of (token, vocabulary entry) pairs whose
probability reaches 2^-12, the share of vocabulary entries that reach it for at least one of 32 (or 128, 512)
consecutive tokens, and the share of sampled tokens that are among the 100 most frequent ones. ``inputs.py`` gives its
peaked inputs the entropy of the demo's warm start.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from balcaprl.assets import demo_model_path
from balcaprl.config import SamplingConfig
from balcaprl.data.scenes import scene_sample
from balcaprl.policy import Group, Policy
from balcaprl.rollout.hf import HFRollout
from balcaprl.types import RolloutGroup

EPS = 2.0**-12


def profile(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, object]:
    """The figures of T tokens, from hidden (T, D), weight (V, D) and targets (T,)."""
    logprobs = (hidden @ weight.T).log_softmax(dim=-1)
    reaches = logprobs >= math.log(EPS)
    counts = torch.bincount(targets, minlength=weight.shape[0]).sort(descending=True).values
    return {
        "tokens": targets.numel(),
        "vocabulary": weight.shape[0],
        "mean_entropy": -float((logprobs.exp() * logprobs).sum(dim=-1).mean()),
        "share_of_pairs_reaching_eps": float(reaches.float().mean()),
        "share_of_columns_reaching_eps": {
            size: float(torch.stack([block.any(dim=0).float().mean() for block in reaches.split(size)]).mean())
            for size in (32, 128, 512)
        },
        "share_of_tokens_in_the_100_commonest": float(counts[:100].sum() / counts.sum()),
    }


def group_of(sampled: RolloutGroup) -> Group:
    """A sampled group in the form that the policy takes."""
    completions = [torch.as_tensor(rollout.completion.token_ids) for rollout in sampled.rollouts]
    return Group(sampled.prompt.prompt_ids, completions, sampled.prompt.image_inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a checkpoint folder; default: the demo's warm start")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group_size", type=int, default=4)
    options = parser.parse_args()
    policy = Policy.from_pretrained(options.model or demo_model_path(), dtype="float32", device="cpu")
    samples = [scene_sample("validation", i, instruction="Describe the image.") for i in range(options.prompts)]
    prompts = [policy.prepare(sample) for sample in samples]
    groups = HFRollout(policy).generate(prompts, options.group_size, SamplingConfig(max_completion_tokens=128), seed=0)
    with torch.no_grad():
        packed = policy.pack([group_of(rollout_group) for rollout_group in groups])
        hidden = policy.hidden_states(packed)
    print(json.dumps(profile(hidden, policy.lm_head_weight.detach(), packed.targets), indent=2))


if __name__ == "__main__":
    main()
