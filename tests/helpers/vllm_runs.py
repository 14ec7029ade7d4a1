"""What the tests of real vLLM share: a model that starts in seconds, samples, a judge, the comparison with the trainer."""

import numpy as np
import torch
from PIL import Image

from balcaprl.config import TrainConfig
from balcaprl.policy import Group
from balcaprl.training.trainer import Trainer
from balcaprl.types import RewardBreakdown, Sample

CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "vision_hidden_size": 32,
    "vision_intermediate_size": 48, "vision_depth": 2, "vision_num_heads": 2,
}  # fmt: skip


def make_sample(seed, size=(112, 112)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Sample(f"s{seed}", lambda: Image.fromarray(pixels), "A red circle.", "Describe the image.")


def token_ids(groups):
    return [[rollout.completion.token_ids for rollout in group.rollouts] for group in groups]


def largest_difference(policy, groups, temperature=1.0):
    """Between the sampler's log-probabilities and the trainer's."""
    rollouts = [
        Group(g.prompt.prompt_ids, [torch.tensor(r.completion.token_ids) for r in g.rollouts], g.prompt.image_inputs)
        for g in groups
    ]
    with torch.no_grad():
        expected = policy.logprobs(policy.pack(rollouts), temperature, exclude_banned=True).float()
    sampled = torch.tensor([lp for g in groups for r in g.rollouts for lp in r.completion.sampling_logprobs])
    return (sampled - expected).abs().max().item()


def perturb(policy, part=""):
    """Add noise to every parameter whose name holds ``part``."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if part in name:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


class NoisyJudge:
    """Scores that differ within every group."""

    name = "noisy"

    def score(self, sample, captions):
        values = np.random.default_rng(sum(map(ord, sample.sample_id))).uniform(0.1, 0.9, size=(len(captions), 3))
        return [RewardBreakdown(*map(float, row)) for row in values]


def run_config(folder, out, **changes):
    """A run of a few short steps on drawn scenes, sampled by vLLM; ``changes`` are merged section by section."""
    plain = {
        "output_dir": str(out),
        "steps": 4,
        "model": {"path": str(folder)},
        "data": {"num_eval": 2},
        "rollout": {
            "sampler": "vllm",
            "prompts_per_step": 2,
            "group_size": 3,
            "sampling": {"max_completion_tokens": 8},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }
    for section, values in changes.items():
        plain[section] = {**plain.get(section, {}), **values} if isinstance(values, dict) else values
    return TrainConfig.model_validate(plain)


def run(config):
    """Train to the end; returns the trainer, closed."""
    trainer = Trainer(config, judge=NoisyJudge())
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer
