"""Measures how much of the judge's time a training run hides behind sampling, from the run's own log of phases.

The run trains the demo's policy on-policy against a scripted judge on loopback. ``score_s`` is how long a step still
waits for scores after sampling. ``judge_alone_s`` is how long the same groups take if they are scored afterwards with
no other work. Both are medians. ``hidden`` is 1 minus the first time divided by the second, each summed over all steps
but the first. The run submits each completion as soon as it ends, so the judge's time for the last completions is never
hidden. A real judge computes on another machine, but the scripted one computes on this one: use ``--threads`` to leave
it a core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from balcaprl.config import TrainConfig
from balcaprl.reporting.metrics import read_jsonl
from balcaprl.rewards import score_groups
from balcaprl.rewards.endpoint.judge import EndpointJudge
from balcaprl.rewards.judge import ScoreStats
from balcaprl.training.pipeline import SampledStep
from balcaprl.training.trainer import Trainer
from balcaprl.types import RolloutGroup
from judging.serving import serving


class KeepsGroups(Trainer):
    """A trainer that keeps each step's groups in ``kept``."""

    def score_groups(self, sampled: SampledStep) -> ScoreStats:
        """Keeps the groups, then scores them as ``Trainer`` does."""
        self.kept: list[list[RolloutGroup]] = [*getattr(self, "kept", []), sampled.groups]
        return super().score_groups(sampled)


def overlap_in_run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the training, then scores its groups again with a new judge that has no cache; returns the row."""
    with tempfile.TemporaryDirectory() as folder, serving(latency_s=options.latency, slots=options.slots) as url:
        config = run_config(folder, url, options)
        trainer = KeepsGroups(config)
        try:
            trainer.train()
        finally:
            trainer.close()
        steps = read_jsonl(Path(folder) / "metrics.jsonl")[1:]  # the first one warms up
        alone = [seconds_alone(config, groups) for groups in trainer.kept[1:]]
    phases = {
        f"{name}_s": statistics.median(s[f"time/{name}"] for s in steps) for name in ("sample", "score", "update")
    }
    return {
        "what": "overlap in a run", "sampler": options.sampler, **phases, "judge_alone_s": statistics.median(alone),
        "hidden": 1 - sum(step["time/score"] for step in steps) / sum(alone),
    }  # fmt: skip


def seconds_alone(config: TrainConfig, groups: list[RolloutGroup]) -> float:
    """Seconds to score these groups with no other work."""
    judge = EndpointJudge.from_config(config.reward, config.endpoint, data_path=None, run_dir=None)
    started = time.perf_counter()
    score_groups(judge, groups, config.reward)
    seconds = time.perf_counter() - started
    judge.close()
    return seconds


def run_config(folder: str, url: str, options: argparse.Namespace) -> TrainConfig:
    """The configuration of the run: the demo's policy, a few steps, and no cache, so that every caption is judged."""
    return TrainConfig.model_validate(
        {
            "output_dir": folder,
            "steps": options.steps,
            "threads": options.threads,
            "model": {"path": "demo"},
            "data": {"num_eval": 0},
            "rollout": {
                "sampler": options.sampler, "prompts_per_step": 16, "group_size": 8,
                "sampling": {"max_completion_tokens": 96},
            },
            "checkpoint": {"every": 0},
            "logging": {"tensorboard": False},
            "reward": {"judge": "endpoint", "protocol": {"model": "m"}},
            "endpoint": {"servers": [{"url": url, "max_concurrency": options.slots}], "cache": None, "required_share": 1.0},
        }
    )  # fmt: skip
