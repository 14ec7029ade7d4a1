"""Real vLLM beside other kinds of policies: untied, bfloat16, LoRA, no images; and through whole training runs."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from vllm_runs import CORPUS, SMALL, NoisyJudge, largest_difference, make_sample, run, run_config

from balcaprl.checkpoints.checkpoint import list_checkpoints
from balcaprl.config import OptimConfig, SamplingConfig
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.policy import Group, Policy
from balcaprl.reporting.metrics import read_jsonl
from balcaprl.rollout.vllm.rollout import VLLMRollout
from balcaprl.training.optim import PolicyOptimizer
from balcaprl.training.trainer import Trainer

pytest.importorskip("vllm", reason="vLLM is an optional extra")
SAMPLING = SamplingConfig(max_completion_tokens=10)


def one_update(policy, groups, optimizer):
    group = groups[0]
    completions = [torch.tensor(r.completion.token_ids) for r in group.rollouts]
    packed = policy.pack([Group(group.prompt.prompt_ids, completions, group.prompt.image_inputs)])
    (-policy.logprobs(packed).mean()).backward()
    assert optimizer.step()["grad_norm"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_untied_head_and_half_precision_with_master_weights(tmp_path, dtype):
    folder = build_tiny_qwen(tmp_path, CORPUS, tie_word_embeddings=False, **SMALL)
    policy = Policy.from_pretrained(folder, device="cpu", dtype=dtype)
    prompts = [policy.prepare(make_sample(i)) for i in range(2)]
    sampler = VLLMRollout(policy)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    optimizer = PolicyOptimizer(policy.model.named_parameters(), OptimConfig(lr=1e-2), 10)
    try:
        first = sampler.generate(prompts, 2, SAMPLING, seed=0)
        assert largest_difference(policy, first) < tolerance
        for step in range(3):
            one_update(policy, sampler.generate(prompts[:1], 2, SAMPLING, seed=step), optimizer)
            report = sampler.sync(step + 1)
            assert (report.strategy, report.bytes_copied) == ("shared", 0)
        groups = sampler.generate(prompts, 2, SAMPLING, seed=0)
        assert largest_difference(policy, groups) < tolerance
        assert groups[0].policy_version == 3
        state = optimizer.state()
        masters = {name.removeprefix("master."): t for name, t in state.items() if name.startswith("master.")}
        assert bool(masters) == (dtype == "bfloat16")
        for name, parameter in policy.model.named_parameters():
            if name in masters:
                assert torch.equal(parameter, masters[name].bfloat16()), name
    finally:
        sampler.close()


@pytest.mark.parametrize("sync", ["auto", "reload"])
def test_an_adapter_reaches_the_engine(tmp_path, sync):
    """By default only what it changes is written; a reload brings everything."""
    stock = Policy.from_pretrained(build_tiny_qwen(tmp_path, CORPUS, **SMALL), device="cpu")
    peft = pytest.importorskip("peft", reason="peft is an optional package")  # wants what loading a policy has mended
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj", "qkv"]
    model = peft.get_peft_model(stock.model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    policy = Policy.from_model(model, stock.processor)
    prompts = [policy.prepare(make_sample(i)) for i in range(2)]
    sampler = VLLMRollout(policy, sync=sync)
    optimizer = PolicyOptimizer(policy.model.named_parameters(), OptimConfig(lr=1e-1), 10)
    try:
        groups = sampler.generate(prompts, 2, SAMPLING, seed=0)
        assert largest_difference(policy, groups) < 1e-5
        for step in range(2):
            one_update(policy, sampler.generate(prompts[:1], 2, SAMPLING, seed=step), optimizer)
            assert largest_difference(policy, groups) > 1e-3, "the change must be visible"
            report = sampler.sync(step + 1)
            groups = sampler.generate(prompts, 2, SAMPLING, seed=0)
            assert largest_difference(policy, groups) < 1e-5
        assert report.strategy == {"auto": "adapter"}.get(sync, sync)
        if sync == "auto":
            assert report.bytes_copied == bytes_of_adapted(sampler._engine.plan(), targets)
    finally:
        sampler.close()


def bytes_of_adapted(plan, targets):
    """Of the matrices with an adapter; all others must lie in the engine's memory."""
    adapted = {n for n in plan.parts if any(f".{t}.base_layer.weight" in n for t in targets)}
    assert len(adapted) == 2 * 4 + 2 * 3, "text layers, and tower blocks with an MLP of their own"
    for name in set(plan.parts) - adapted:
        assert plan.parameters[name].data_ptr() == plan.alias(name).data_ptr(), "frozen weights are shared"
    return sum(4 * plan.parameters[n].numel() for n in adapted)


def test_a_policy_without_images(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = Policy.from_pretrained(build_tiny_qwen(tmp_path, CORPUS, **SMALL), device="cpu").tokenizer
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    policy = Policy.from_model(model, tokenizer)
    from balcaprl.types import Prompt

    ids = tokenizer("Describe the image.", return_tensors="pt").input_ids[0]
    prompt = Prompt(make_sample(0), ids, {}, None, "Describe the image.")
    sampler = VLLMRollout(policy)
    try:
        assert largest_difference(policy, sampler.generate([prompt], 4, SAMPLING, seed=0)) < 1e-5
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
        assert sampler.sync(1).strategy == "shared"
        assert largest_difference(policy, sampler.generate([prompt], 4, SAMPLING, seed=0)) < 1e-5
    finally:
        sampler.close()


# ---------------------------------------------------------------------------------------------------- memory


def test_memory_that_is_too_short_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    policy = Policy.from_pretrained(build_tiny_qwen(tmp_path, CORPUS, **SMALL), device="cpu")
    prompts = [policy.prepare(make_sample(0))]
    with pytest.raises(ValueError, match=r"rollout\.vllm_memory_gib: 1e-06 GiB are too little for one completion"):
        VLLMRollout(policy, memory_gib=1e-6).generate(prompts, 2, SAMPLING, seed=0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(ValueError, match=r"memory: one completion takes .* GiB of keys and values"):
        VLLMRollout(policy).generate(prompts, 2, SAMPLING, seed=0)


# ---------------------------------------------------------------------------------------------------- training runs


def test_a_run_shares_weights_resumes_and_leaves_whole_checkpoints(tmp_path):
    folder = build_tiny_qwen(tmp_path / "model", CORPUS, **SMALL)
    trainer = run(run_config(folder, tmp_path / "run", steps=2))
    assert trainer.resumed_from is None
    resumed = run(run_config(folder, tmp_path / "run", steps=4))
    assert resumed.resumed_from == 2
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["sync/bytes"] == 0
        assert line["sync/tensors"] > 50
        assert abs(line["sampling_kl"]) < 1e-2  # the banned ids' probability, of random weights
        assert line["sampler_tokens_per_second"] > 0
        assert line["update_tokens_per_second"] > 0
    saved = Policy.from_pretrained(list_checkpoints(tmp_path / "run")[-1], device="cpu").model.named_parameters()
    assert all(
        torch.equal(parameter, live)
        for (_, parameter), live in zip(saved, resumed.policy.model.parameters(), strict=True)
    )


def test_one_step_behind(tmp_path, caplog):
    """The sampler has weights of its own, one update old; the loss corrects for it; the run ends and resumes."""
    folder = build_tiny_qwen(tmp_path / "model", CORPUS, **SMALL)
    seen = []
    config = run_config(
        folder,
        tmp_path / "run",
        steps=3,
        rollout={"max_staleness": 1},
        loss={"sampling_ratio_cap": 2.0},
        optim={"lr": 1e-2},
    )
    with caplog.at_level(logging.INFO, logger="balcaprl"):
        trainer = Trainer(config, judge=NoisyJudge())
        original = trainer.update_policy
        trainer.update_policy = lambda groups: (seen.append(groups[0].policy_version), original(groups))[1]
        try:
            trainer.train()
        finally:
            trainer.close()
    assert seen == [0, 0, 1]
    assert any("weights reach vLLM by inplace: the policy changes while vLLM samples" in m for m in caplog.messages)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["sync/bytes"] > 0
    assert abs(lines[2]["sampling_gap/max"]) > abs(lines[0]["sampling_gap/max"]), "one update lies between the two"
    assert run(run_config(
        folder, tmp_path / "run", steps=4, rollout={"max_staleness": 1}, loss={"sampling_ratio_cap": 2.0}, optim={"lr": 1e-2}
    )).resumed_from == 3  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals_while_vllm_samples(tmp_path, number):
    """Ctrl-C ends after the step; kill -9 loses no saved step: the same command goes on."""
    folder = build_tiny_qwen(tmp_path / "model", CORPUS, **SMALL)
    recipe = tmp_path / "recipe.yaml"
    plain = run_config(folder, tmp_path / "run", steps=400, checkpoint={"every": 1}).model_dump(mode="json")
    recipe.write_text(yaml.safe_dump(plain))
    command = [sys.executable, "-m", "balcaprl", "train", str(recipe)]

    def start(*more):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)

    process = start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(read_jsonl(metrics)) < 2):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -9), errors.decode()[-2000:]
    reached = int(list_checkpoints(tmp_path / "run")[-1].name.removeprefix("step_"))
    assert reached >= 1
    again = start("--steps", str(reached + 1))
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors.decode()[-2000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == reached + 1
    assert [line["step"] for line in read_jsonl(metrics)] == list(range(1, reached + 2))
