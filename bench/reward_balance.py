"""Correlates the demo's three rewards over a model's own rollouts, to see whether they are three different signals.

    python bench/reward_balance.py [--model FOLDER] [--prompts 64] [--group_size 8]

The model is the demo's warm start by default. The script prints one JSON object: mean rewards, b-CapScore, the mean
within-group correlation of each pair of rewards, and as many examples as ``--examples`` asks for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from balcaprl.assets import demo_model_path
from balcaprl.config import RewardConfig, SamplingConfig
from balcaprl.data.scenes import scene_sample
from balcaprl.evaluation.b_capscore import summarise
from balcaprl.policy import Policy
from balcaprl.rewards import score_groups
from balcaprl.rewards.balance import within_group_correlations
from balcaprl.rewards.scenes.judge import SceneJudge
from balcaprl.rollout.hf import HFRollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--examples", type=int, default=0)
    options = parser.parse_args()
    policy = Policy.from_pretrained(options.model or demo_model_path(), dtype="float32", device="cpu")
    samples = [scene_sample("validation", i, instruction="Describe the image.") for i in range(options.prompts)]
    prompts = [policy.prepare(sample) for sample in samples]
    groups = HFRollout(policy).generate(prompts, options.group_size, SamplingConfig(max_completion_tokens=128), seed=0)
    score_groups(SceneJudge(), groups, RewardConfig())
    result = {
        "scores": summarise(groups),
        "correlations": within_group_correlations(groups),
        "examples": [
            {
                "reference": group.prompt.sample.reference,
                "caption": group.rollouts[0].completion.text,
                "rewards": group.rollouts[0].breakdown.rewards if group.rollouts[0].breakdown else None,
            }
            for group in groups[: options.examples]
        ],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
