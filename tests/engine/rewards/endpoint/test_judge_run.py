"""Whole training runs with a judge model behind an endpoint: faults, a planted key, an endpoint that dies, a budget."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from scripted_judge import FAULTS, ScriptedServer

from balcaprl.checkpoints.checkpoint import list_checkpoints
from balcaprl.cli.main import main
from balcaprl.config import TrainConfig
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.reporting.metrics import read_jsonl
from balcaprl.rewards import GroupScorer
from balcaprl.training.trainer import Trainer
from balcaprl.training.update import PolicyUpdate
from balcaprl.types import JudgeStoppedError

CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3
KEY = "sk-planted-4c0ffee5-0123456789abcdef"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return build_tiny_qwen(
        folder, [*CORPUS, *["Describe the image."] * 2], hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4,
        vision_hidden_size=32, vision_intermediate_size=48, vision_depth=2, vision_num_heads=2,
    )  # fmt: skip


def plain_config(tiny_model, out, server, steps=3, **endpoint):
    return {
        "output_dir": str(out),
        "steps": steps,
        "model": {"path": str(tiny_model)},
        "data": {"num_eval": 0},
        "rollout": {"sampler": "hf", "prompts_per_step": 2, "group_size": 3, "sampling": {"max_completion_tokens": 12}},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
        "reward": {"judge": "endpoint", "protocol": {"model": "judge"}},
        "endpoint": {
            "servers": [{"url": server.url, "api_key_env": "TEST_JUDGE_KEY", "input_price": 1.0}],
            "cache": str(out / "cache.db"), "timeout_s": 2.0, "retry_wait_s": 0.01, "max_retry_wait_s": 0.05,
            "breaker_wait_s": 0.05, "max_attempts": 8, "required_share": 0.9, "grace_s": 0.2, "patience_s": 20, **endpoint,
        },
    }  # fmt: skip


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)


def run(plain):
    trainer = Trainer(TrainConfig.model_validate(plain))
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def test_a_run_with_every_fault_finishes_and_the_key_is_found_nowhere(tiny_model, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    out = tmp_path / "run"
    # Those that hang for as long as the client waits are few: that is long, so that no sound reply takes as much.
    faults = dict.fromkeys(FAULTS, 0.025) | {"timeout": 0.01, "slow_drip": 0.01}
    with ScriptedServer(faults=faults, hang_s=120.0, seed=3, keep_bodies=True) as server:
        trainer = run(plain_config(tiny_model, out, server, steps=6))
        assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
        assert sum(server.counts[fault] for fault in FAULTS) > 10
    lines = read_jsonl(out / "metrics.jsonl")
    assert len(lines) == 6
    assert all(torch.isfinite(p).all() for p in trainer.policy.model.parameters())
    for line in lines:
        failed = sum(v for k, v in line.items() if k.startswith("judge/failed_"))
        assert line["judge/attempts"] == line["judge/valid"] + failed
        assert line["num_missing_scores"] <= 0.1 * 18 + 1
    assert json.loads((out / "judge_usage.json").read_text())["prompt_tokens"] > 0
    captured = capfd.readouterr()
    for text in (caplog.text, captured.out, captured.err):
        assert KEY not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_sixteen_steps_learn_while_every_fault_is_drawn_at_a_fifth(tiny_model, tmp_path):
    """All but one of 44 replies are faulty: no NaN reaches the weights, they are learnt, and every step's counters add up."""
    waits = {"timeout_s": 1.5, "retry_wait_s": 0.0, "breaker_wait_s": 0.01, "grace_s": 0.0, "patience_s": 60}
    faults = dict.fromkeys(FAULTS, 0.2) | {"timeout": 0.02, "slow_drip": 0.02}
    with ScriptedServer(faults=faults, independent=True, hang_s=120.0, seed=4) as server:
        plain = plain_config(tiny_model, tmp_path / "run", server, steps=16, required_share=0.3, **waits)
        plain["rollout"]["prompts_per_step"] = 1
        plain["reward"] |= {"required_share": 0, "max_flat_steps": 0}  # either would end such a run
        trainer = run(plain)
        assert not server.problems
        assert sum(server.counts[fault] for fault in FAULTS) > 0.94 * server.counts["requests"]
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 16
    for line in lines:
        failed = sum(v for k, v in line.items() if k.startswith("judge/failed_"))
        assert line["judge/attempts"] == line["judge/valid"] + failed
        ends = ("cached", "shared", "valid", "given_up", "cancelled")
        assert line["judge/calls"] == sum(line[f"judge/{name}"] for name in ends)
        assert line["num_missing_scores"] <= 6  # of 9: a share of .3 needs three
        assert line.get("num_nonfinite_updates", 0.0) == 0
    before = load_file(tiny_model / "model.safetensors")
    after = weights(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(p).all() for p in trainer.policy.model.parameters())


@pytest.mark.parametrize("judge", ["endpoint", "scene"])
def test_the_update_begins_while_a_judge_still_works(tiny_model, tmp_path, monkeypatch, judge):
    """One that works in the background; else nothing would be gained."""
    order = []
    for owner, name in ((PolicyUpdate, "begin"), (GroupScorer, "finish"), (PolicyUpdate, "run")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, original=original: (order.append(name), original(*a))[1])
    with ScriptedServer() as server:
        plain = plain_config(tiny_model, tmp_path / "run", server, steps=2)
        plain["reward"]["judge"] = judge
        run(plain)
    expected = {"endpoint": ["begin", "finish", "run"], "scene": ["finish", "run"]}
    assert order == 2 * expected[judge]


def test_the_key_is_not_told_by_errors(tiny_model, tmp_path, capfd):
    """The server answers every request with its own headers; the endpoint is dead to us."""
    out = tmp_path / "run"
    with ScriptedServer(faults={"server_error": 1.0}) as server:
        plain = plain_config(tiny_model, out, server, patience_s=0.5)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps(plain))
        assert main(["train", str(recipe)]) == 1
    told = capfd.readouterr()
    assert "no valid reply of a judge server for 0.5 s" in told.err
    assert "server_error" in told.err
    assert "The run is saved at step 0" in told.err
    assert KEY not in told.err + told.out
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def weights(out):
    return load_file(list_checkpoints(out)[-1] / "model.safetensors")


def test_an_endpoint_that_dies_ends_the_run_saved_and_it_goes_on_as_if_nothing_was(tiny_model, tmp_path):
    """The judge dies in step 3; resumed with another server, the run equals one that was never interrupted, bit for bit."""
    with ScriptedServer() as server:
        run(plain_config(tiny_model, tmp_path / "whole", server, steps=4))
    with ScriptedServer() as server:
        plain = plain_config(tiny_model, tmp_path / "parts", server, steps=4, patience_s=0.5)
        trainer = Trainer(TrainConfig.model_validate(plain))
        original = trainer.sample_groups

        def dies():
            if trainer.step == 2:
                server.faults = {"server_error": 1.0}
            return original()

        trainer.sample_groups = dies
        with pytest.raises(JudgeStoppedError, match="The run is saved at step 2"):
            trainer.train()
        trainer.close()
    assert len(read_jsonl(tmp_path / "parts" / "metrics.jsonl")) == 2
    with ScriptedServer() as server:
        resumed = run(plain_config(tiny_model, tmp_path / "parts", server, steps=4))
        assert resumed.resumed_from == 2
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_spent_budget_ends_the_run_saved_and_more_of_it_goes_on(tiny_model, tmp_path):
    out = tmp_path / "run"
    with ScriptedServer() as server:
        with pytest.raises(JudgeStoppedError, match=r"raise it to go on\. The run is saved at step"):
            run(plain_config(tiny_model, out, server, steps=8, token_budget=8000))
        stopped_at = len(read_jsonl(out / "metrics.jsonl"))
        assert 0 < stopped_at < 8
        assert sum(server.usage.values()) <= 8000
        trainer = run(plain_config(tiny_model, out, server, steps=8, token_budget=10**9))
        assert trainer.resumed_from == stopped_at
        told = json.loads((out / "judge_usage.json").read_text())
        assert told["prompt_tokens"] + told["completion_tokens"] == sum(server.usage.values())


def test_custom_columns_are_trained_on_and_logged(tiny_model, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def brevity(sample, caption):\n    return 1 / (1 + len(caption))\n")
    with ScriptedServer() as server:
        plain = plain_config(tiny_model, tmp_path / "run", server, steps=2)
        plain["reward"] |= {
            "custom": [{"name": "brevity", "source": f"{path}:brevity", "weight": 0.5}],
            "conditions": [{"reward": "brevity", "on": "linguistic", "at_least": 0.1}],
        }
        run(plain)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < line["reward/brevity"] <= 1 for line in lines)
    assert lines[0]["custom/missing_brevity"] == 0
    assert "correlation/precision_brevity" in lines[0]
    completion = read_jsonl(tmp_path / "run" / "completions.jsonl")[0]
    assert not math.isnan(completion["extra"]["brevity"])
