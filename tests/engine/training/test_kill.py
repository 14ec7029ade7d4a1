"""kill -9 at random moments, SIGTERM and SIGINT: a run goes on and ends with the same bits.

``BALCAPRL_KILLS=20 pytest tests/engine/training/test_kill.py`` kills twenty times; by default it is three.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from balcaprl.checkpoints.checkpoint import list_checkpoints
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.reporting.metrics import is_reproducible, read_jsonl

NUM_KILLS = int(os.environ.get("BALCAPRL_KILLS", "3"))
STEPS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A run of a few seconds: a tiny model on drawn scenes with transformers' generate."""
    root = tmp_path_factory.mktemp("kill")
    corpus = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3
    build_tiny_qwen(
        root / "model", corpus, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4,
        vision_hidden_size=32, vision_intermediate_size=48, vision_depth=2, vision_num_heads=2,
    )  # fmt: skip
    plain = {
        "steps": STEPS,
        "threads": 1,
        "model": {"path": str(root / "model")},
        "data": {"num_eval": 4},
        "rollout": {"sampler": "hf", "prompts_per_step": 4, "group_size": 4, "sampling": {"max_completion_tokens": 24}},
        "optim": {"lr": 1e-3},
        "evaluation": {"every": 3},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def start(recipe, out):
    command = [sys.executable, "-m", "balcaprl", "train", str(recipe), "--output_dir", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors.decode()


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    out = recipe.parent / "whole"
    began = time.monotonic()
    status, errors = finish(start(recipe, out))
    assert status == 0, errors
    return out, time.monotonic() - began


def assert_same_run(out, expected):
    weights, whole = (load_file(list_checkpoints(path)[-1] / "model.safetensors") for path in (out, expected))
    assert list_checkpoints(out)[-1].name == f"step_{STEPS:08d}"
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    for name in ("metrics.jsonl", "evaluations.jsonl", "completions.jsonl", "eval_captions.jsonl"):
        lines, others = (
            [{k: v for k, v in line.items() if is_reproducible(k)} for line in read_jsonl(path / name)]
            for path in (out, expected)
        )
        assert lines == others, name


def test_kill_at_random_moments_and_resume(recipe, uninterrupted):
    expected, seconds = uninterrupted
    out = recipe.parent / "killed"
    rng = random.Random(0)
    reached = []
    for _ in range(NUM_KILLS):
        process = start(recipe, out)
        try:
            # Start-up is most of so short a run: look for moments while it trains, too.
            process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        reached.append(len(read_jsonl(out / "metrics.jsonl")) if (out / "metrics.jsonl").exists() else 0)
    status, errors = finish(start(recipe, out))
    assert status == 0, errors
    assert_same_run(out, expected)
    assert any(reached), reached


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(recipe, uninterrupted, number):
    expected, _ = uninterrupted
    out = recipe.parent / f"signal-{number}"
    process = start(recipe, out)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    status, errors = finish(process)
    assert status == 128 + number, errors
    steps = len(read_jsonl(out / "metrics.jsonl"))
    assert 0 < steps < STEPS
    assert list_checkpoints(out)[-1].name == f"step_{steps:08d}"
    status, errors = finish(start(recipe, out))
    assert status == 0, errors
    assert_same_run(out, expected)
