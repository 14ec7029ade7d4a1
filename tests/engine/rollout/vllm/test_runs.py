"""Whole training runs on real vLLM: they repeat bit for bit, leak nothing, and survive being killed in a sync.

Tests marked ``slow`` kill in the sync of every strategy, not only in the one whose sync can be half done.
"""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file
from vllm_runs import CORPUS, SMALL, NoisyJudge, run, run_config

from balcaprl.checkpoints.checkpoint import list_checkpoints
from balcaprl.config import TrainConfig
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.reporting.metrics import is_reproducible, read_jsonl
from balcaprl.training.trainer import Trainer

pytest.importorskip("vllm", reason="vLLM is an optional extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_qwen(tmp_path_factory.mktemp("model"), CORPUS, **SMALL)


def run_elsewhere(config, sabotage=""):
    """The same in a process of its own, after ``sabotage``; its exit status and errors."""
    code = "import sys, json; from vllm_runs import NoisyJudge; from balcaprl.config import TrainConfig\n"
    code += "from balcaprl.training.trainer import Trainer\n" + sabotage
    code += "\ntrainer = Trainer(TrainConfig.model_validate(json.loads(sys.argv[1])), judge=NoisyJudge())\n"
    code += "trainer.train(); trainer.close()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, json.dumps(config.model_dump(mode="json"))]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    return done.returncode, done.stderr[-2000:]


def curve(out):
    """Every figure of a run that two runs of one seed must share."""
    return [{k: v for k, v in line.items() if is_reproducible(k)} for line in read_jsonl(out / "metrics.jsonl")]


def assert_same_outcome(out, expected):
    assert (out / "completions.jsonl").read_bytes() == (expected / "completions.jsonl").read_bytes()
    first, second = (load_file(list_checkpoints(each)[-1] / "model.safetensors") for each in (out, expected))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(one_thread(folder, out))
    return out


def one_thread(folder, out, **changes) -> TrainConfig:
    return run_config(folder, out, steps=6, threads=1, checkpoint={"every": 1}, **changes)


def test_three_runs_of_one_seed_are_equal_bit_for_bit(folder, uninterrupted, tmp_path):
    """Whatever ran in the process before; that another process changes nothing is seen below, as it goes on."""
    for name in ("second", "third"):
        run(one_thread(folder, tmp_path / name))
        assert curve(tmp_path / name) == curve(uninterrupted)
        assert_same_outcome(tmp_path / name, uninterrupted)
    run(one_thread(folder, tmp_path / "other", seed=1))
    assert curve(tmp_path / "other") != curve(uninterrupted)


KILLED_IN_THE_SYNC = {
    "shared": """
from balcaprl.rollout.vllm.engine import VLLMEngine
original = VLLMEngine.drop_caches
VLLMEngine.drop_caches = lambda self: die() if due() else original(self)
""",
    "inplace": """
from balcaprl.rollout import weights
original = weights.copy_all
def half(targets, sources):
    original(targets[::2], sources[::2])
    die()
weights.copy_all = lambda targets, sources: half(targets, sources) if due() else original(targets, sources)
""",
    "reload": """
from balcaprl.rollout.vllm import engine as vllm_engine
original = vllm_engine._named_tensors
class Half(dict):
    def items(self):
        for index, item in enumerate(super().items()):
            yield item if index < len(self) // 2 else die()
vllm_engine._named_tensors = lambda policy: Half(original(policy)) if due() else original(policy)
""",
}
COUNT = """
import itertools, os, signal
calls = itertools.count(1)
due = lambda: next(calls) == 4
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "strategy",
    ["inplace", pytest.param("shared", marks=pytest.mark.slow), pytest.param("reload", marks=pytest.mark.slow)],
)
def test_kill_9_during_a_sync_loses_no_step_and_corrupts_no_weights(folder, uninterrupted, tmp_path, strategy):
    """Half of the weights have arrived, or none of the caches was dropped: the run goes on and ends with the same bits."""
    config = one_thread(folder, tmp_path, rollout={"sync": strategy})
    status, errors = run_elsewhere(config, COUNT + KILLED_IN_THE_SYNC[strategy])
    assert status == -9, errors
    saved = [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path)]
    assert saved[-1] in (2, 3), "the fourth call is in the sync of the third or fourth step"
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == saved[-1]
    assert run(config).resumed_from == saved[-1]
    assert [without_sampler(line) for line in curve(tmp_path)] == [
        without_sampler(line) for line in curve(uninterrupted)
    ]
    assert_same_outcome(tmp_path, uninterrupted)


def without_sampler(line):
    """What the sampler says of itself may differ in the last bits: its batches are others just after a start."""
    return {key: value for key, value in line.items() if not key.startswith(("sync/", "sampling_"))}


def test_two_hundred_steps_leak_nothing(folder, tmp_path):
    """Every step has new images, new weights, and the same memory and file handles."""
    config = run_config(folder, tmp_path, steps=200, data={"num_eval": 0}, checkpoint={"every": 0})
    trainer = Trainer(config, judge=NoisyJudge())
    process, log_step, memory, files = psutil.Process(), trainer.log_step, [], []

    def log_and_look(*step):
        log_step(*step)
        memory.append(process.memory_info().rss)
        files.append(process.num_fds())

    trainer.log_step = log_and_look
    try:
        trainer.train()
        held = trainer.sampler._engine.cached_entries()
    finally:
        trainer.close()
    assert len(memory) == 200
    assert memory[-1] - memory[50] < 20 << 20
    assert files[-1] == files[50]
    assert not any(held.values())
