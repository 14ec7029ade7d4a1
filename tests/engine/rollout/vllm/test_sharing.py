"""One set of weights, of every structure: each parameter lies in vLLM's own memory, and no second copy is held."""

import ctypes
import gc

import psutil
import pytest
import torch
from vllm_runs import CORPUS, SMALL, largest_difference, make_sample, perturb, token_ids

from balcaprl.config import SamplingConfig
from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.policy import Group, Policy
from balcaprl.rollout.vllm.rollout import VLLMRollout

pytest.importorskip("vllm", reason="vLLM is an optional extra")
SAMPLING = SamplingConfig(max_completion_tokens=10)
BUILDERS = {"qwen": build_tiny_qwen, "llava": build_tiny_llava}
THIRTY_MILLION = {"hidden_size": 512, "intermediate_size": 1408, "num_layers": 9, "num_heads": 8}
"""Sizes of so many parameters, beside which the rest of the process is small."""


def engine_memory(engine):
    """(first byte, byte after the last) of each of vLLM's own parameters, found without the plan."""
    storages = [p.untyped_storage() for p in engine.model.parameters()]
    return sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})


def outside(policy, engine):
    """Parameters that do not lie in vLLM's memory."""
    spans = engine_memory(engine)
    return {
        name
        for name, p in policy.model.named_parameters()
        if not any(low <= p.data_ptr() and p.data_ptr() + p.numel() * p.element_size() <= high for low, high in spans)
    }


def without_gradient(policy, groups):
    """Parameters that the log-probabilities of these completions do not depend on."""
    rollouts = [
        Group(g.prompt.prompt_ids, [torch.tensor(r.completion.token_ids) for r in g.rollouts], g.prompt.image_inputs)
        for g in groups
    ]
    policy.logprobs(policy.pack(rollouts)).sum().backward()
    unused = {name for name, p in policy.model.named_parameters() if p.grad is None or not p.grad.any()}
    policy.model.zero_grad(set_to_none=True)
    return unused


CASES = [
    ("qwen", True, "shared"),
    ("qwen", False, "shared"),
    ("qwen", False, "inplace"),
    ("qwen", False, "reload"),
    ("llava", True, "shared"),
    ("llava", False, "shared"),
    ("llava", False, "inplace"),
    ("llava", False, "reload"),
]


@pytest.mark.parametrize(("family", "tied", "strategy"), CASES)
def test_every_structure_is_served_by_every_strategy(tmp_path, family, tied, strategy):
    """All parameters, biases among them, and then the head alone."""
    size = {"num_layers": 2} if family == "llava" else SMALL
    policy = Policy.from_pretrained(BUILDERS[family](tmp_path, CORPUS, tie_word_embeddings=tied, **size), device="cpu")
    perturb(policy, "bias")  # which random models have at zero
    prompts = [policy.prepare(make_sample(i)) for i in range(2)]
    sampler = VLLMRollout(policy, sync=strategy)
    try:
        groups = sampler.generate(prompts, 2, SAMPLING, seed=0)
        assert largest_difference(policy, groups) < 1e-5
        names = {name for name, _ in policy.model.named_parameters()}
        assert sum("bias" in name for name in names) >= 6
        if strategy == "shared":
            # vLLM leaves out LLaVA's last tower layer, which has no say in the trainer's log-probabilities either.
            left_out = outside(policy, sampler._engine)
            assert left_out <= without_gradient(policy, groups)
            assert all(family == "llava" and ("layers.3." in n or "post_layernorm" in n) for n in left_out)
        else:
            assert outside(policy, sampler._engine) == names
        for version, part in enumerate(["", "embed_tokens" if tied else "lm_head"], start=1):
            perturb(policy, part)
            assert largest_difference(policy, groups) > 1e-3, "the change must be visible"
            report = sampler.sync(version)
            assert report.strategy == strategy
            assert (report.bytes_copied == 0) == (strategy == "shared")
            before, groups = groups, sampler.generate(prompts, 2, SAMPLING, seed=0)
            assert largest_difference(policy, groups) < 1e-5
            assert token_ids(groups) != token_ids(before)
    finally:
        sampler.close()


def resident_bytes():
    """Of this process, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.fixture(scope="module")
def vllm_is_loaded(tmp_path_factory):
    """Its code and first-use buffers are in memory: what is measured from now on is weights."""
    policy = Policy.from_pretrained(build_tiny_qwen(tmp_path_factory.mktemp("first"), CORPUS, **SMALL), device="cpu")
    sampler = VLLMRollout(policy, max_num_seqs=1)
    sampler.generate([policy.prepare(make_sample(0))], 1, SAMPLING, seed=0)
    sampler.close()


@pytest.mark.parametrize(("strategy", "copies"), [("shared", 1), ("inplace", 2)])
def test_the_process_holds_one_copy_of_shared_weights(tmp_path, vllm_is_loaded, strategy, copies):
    """Beside it, that the measure would see a second one."""
    folder = build_tiny_qwen(tmp_path, CORPUS, num_kv_heads=2, vision_depth=2, **THIRTY_MILLION)
    before = resident_bytes()
    policy = Policy.from_pretrained(folder, device="cpu")
    num_bytes = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    sampler = VLLMRollout(policy, max_num_seqs=1, sync=strategy)
    try:
        sampler.generate([policy.prepare(make_sample(0))], 1, SAMPLING, seed=0)
        perturb(policy)
        sampler.sync(1)
        sampler.generate([policy.prepare(make_sample(0))], 1, SAMPLING, seed=0)
        held = (resident_bytes() - before) / num_bytes
        assert copies - 0.2 < held < copies + 0.5
    finally:
        sampler.close()
