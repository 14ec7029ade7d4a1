"""Compares the demo's updates with shared and with repeated prompts: differences between the policies, and times.

    python bench/demo_updates.py [--steps 20] [--output FILE]

Two policies start from the demo's warm start. At every step the policy with shared prompts samples a batch and the
scene judge scores it. Both policies are then updated from this batch, one after the other in alternating order, each
with its own arrangement of prompts, so the weights of each follow only from its own updates. The script prints one JSON
object per step and one at the end with the largest differences and the median times.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from run import ROOT, provenance

from balcaprl.assets import demo_model_path
from balcaprl.config import TrainConfig
from balcaprl.data import load_dataset
from balcaprl.policy import Policy
from balcaprl.rewards import score_groups, write_advantages
from balcaprl.rewards.scenes.judge import SceneJudge
from balcaprl.rollout.hf import HFRollout
from balcaprl.training.optim import PolicyOptimizer
from balcaprl.training.update import PolicyUpdate
from balcaprl.types import RolloutGroup

ARRANGEMENTS = ("shared", "repeated")


def make_update(config: TrainConfig, arrangement: str) -> PolicyUpdate:
    """An update with its own policy, whose prompts are arranged as ``arrangement`` says."""
    plain = config.model_dump()
    plain["optim"]["prompt_sharing"] = arrangement
    mine = TrainConfig.model_validate(plain)
    policy = Policy.from_pretrained(demo_model_path(), dtype="float32", device="cpu")
    return PolicyUpdate(policy, PolicyOptimizer(policy.model.named_parameters(), mine.optim, mine.steps), mine)


def scored_batch(config: TrainConfig, sampler: HFRollout, prompts: list[Any], step: int) -> list[RolloutGroup]:
    """Rollouts of ``prompts``, scored and with advantages."""
    rollout = config.rollout
    groups = sampler.generate(prompts, rollout.group_size, rollout.sampling, seed=step)
    score_groups(SceneJudge(), groups, config.reward)
    write_advantages(groups, config.reward, config.advantage)
    return groups


def weight_difference(first: Policy, second: Policy) -> float:
    """The largest absolute difference between corresponding weights."""
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def run(config: TrainConfig, steps: int) -> list[dict[str, Any]]:
    """One row per step: gradient norms and seconds of both policies, and the difference between their weights."""
    updates = {name: make_update(config, name) for name in ARRANGEMENTS}
    policy = updates["shared"].policy
    sampler = HFRollout(policy)
    stream = load_dataset(config.data, seed=config.seed).train_stream(seed=config.seed)
    rows = []
    for step in range(steps):
        prompts = [policy.prepare(sample) for sample in stream.next_decodable(config.rollout.prompts_per_step)]
        groups = scored_batch(config, sampler, prompts, step)
        row: dict[str, Any] = {"bench": "demo_updates", "step": step}
        for name in ARRANGEMENTS if step % 2 else ARRANGEMENTS[::-1]:
            mine = copy.deepcopy(groups)
            started = time.perf_counter()
            metrics = updates[name].run(mine)
            row[f"{name}_s"] = time.perf_counter() - started
            row |= {f"{name}_{key}": metrics[key] for key in ("grad_norm", "forward_tokens")}
        row["weight_difference"] = weight_difference(policy, updates["repeated"].policy)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row over all steps; the times leave out the first step."""
    times = {name: statistics.median(row[f"{name}_s"] for row in rows[1:]) for name in ARRANGEMENTS}
    # Losses would show no difference: on-policy they are the mean of the advantages, whatever the policy.
    apart = max(abs(row["shared_grad_norm"] - row["repeated_grad_norm"]) for row in rows)
    return {
        "bench": "demo_updates",
        "steps": len(rows),
        "largest_grad_norm_difference": apart,
        "largest_weight_difference": max(row["weight_difference"] for row in rows),
        "median_shared_s": times["shared"],
        "median_repeated_s": times["repeated"],
        "times_faster": times["repeated"] / times["shared"],
        **provenance(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, help="the last line is appended here")
    options = parser.parse_args()
    config = TrainConfig.model_validate(yaml.safe_load((ROOT / "engine" / "recipes" / "demo.yaml").read_text()))
    line = json.dumps(summary(run(config, options.steps)))
    print(line)
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
