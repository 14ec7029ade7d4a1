"""One rule for all samplers: the policy's ends and the stop texts end a completion, and ids that are no tokens never come."""

import math
from importlib.util import find_spec

import pytest
import torch
from vllm_runs import CORPUS, SMALL, largest_difference, make_sample

from balcaprl.config import SamplingConfig
from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.policy import Group, Policy
from balcaprl.rollout import HFRollout
from balcaprl.rollout.probe import sampler_logprobs
from balcaprl.rollout.server import ServerRollout
from balcaprl.rollout.vllm.rollout import VLLMRollout

SAMPLERS = [
    "hf",
    pytest.param("vllm", marks=pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is an optional extra")),
]
LLAVA = {
    "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "vision_hidden_size": 32,
    "vision_intermediate_size": 48, "vision_num_layers": 2, "vision_num_heads": 2, "image_size": 56,
}  # fmt: skip


def tiny_policy(tmp_path, family="qwen"):
    build, sizes = {"qwen": (build_tiny_qwen, SMALL), "llava": (build_tiny_llava, LLAVA)}[family]
    return Policy.from_pretrained(build(tmp_path / family, CORPUS, **sizes), device="cpu")


def sample(name, policy, prompts, group_size, sampling, **options):
    sampler = {"hf": HFRollout, "vllm": VLLMRollout}[name](policy)
    try:
        return sampler.generate(prompts, group_size, sampling, seed=0, **options)
    finally:
        sampler.close()


def favour(policy, prompt, token_ids, share):
    """Give some ids together about this share of the first token's probability."""
    with torch.no_grad():
        hidden = policy.hidden_states(
            policy.pack([Group(prompt.prompt_ids, [torch.tensor([9])], prompt.image_inputs)])
        )[0]
        head = policy.lm_head_weight
        others = torch.logsumexp(head @ hidden, 0)
        logit = others + math.log(share / (1 - share) / len(token_ids))
        head[token_ids] = logit * hidden / hidden.square().sum()


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_policys_own_ends_end_a_completion(tmp_path, name, monkeypatch):
    policy = tiny_policy(tmp_path)
    other, end = policy.tokenizer.eos_token_id, policy.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", end)
    assert policy.eos_token_ids == (end,) != (other,)
    prompts = [policy.prepare(make_sample(i)) for i in range(2)]
    with torch.no_grad():  # both are sampled often, after any token
        policy.lm_head_weight[[other, end]] = 0
        policy.lm_head_weight.mul_(0.5)
    groups = sample(name, policy, prompts, 16, SamplingConfig(max_completion_tokens=200))
    completions = [r.completion for g in groups for r in g.rollouts]
    assert any(other in c.token_ids[:-1] for c in completions), "the tokenizer's end, which is none of the policy's"
    for completion in completions:
        assert end not in completion.token_ids[:-1]
        assert completion.finished == (completion.token_ids[-1] == end)
        assert completion.finished or len(completion.token_ids) == 200
    assert any(c.finished for c in completions)
    assert largest_difference(policy, groups) < 1e-4


@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_that_only_pad_the_head_are_never_sampled(tmp_path, name, family):
    policy = tiny_policy(tmp_path, family)
    prompt = policy.prepare(make_sample(0))
    rows = policy.lm_head_weight.shape[0]
    padding = list(range(len(policy.tokenizer), rows))
    assert padding
    assert policy.num_tokens == len(policy.tokenizer)
    assert set(padding) < set(policy.banned_token_ids)
    favour(policy, prompt, padding, 0.9)
    for greedy in (False, True):
        (group,) = sample(name, policy, [prompt], 16, SamplingConfig(max_completion_tokens=6), greedy=greedy)
        sampled = {i for r in group.rollouts for i in r.completion.token_ids}
        assert max(sampled) < len(policy.tokenizer)
        assert largest_difference(policy, [group]) < 1e-4


def test_an_update_trains_the_distribution_that_is_sampled(tmp_path):
    """Without the padding, whatever its probability: the sampler's log-probabilities are the update's."""
    policy = tiny_policy(tmp_path)
    prompt = policy.prepare(make_sample(0))
    favour(policy, prompt, list(range(policy.num_tokens, policy.lm_head_weight.shape[0])), 0.5)
    group = Group(prompt.prompt_ids, [torch.tensor([300, 301, 302])], prompt.image_inputs)
    packed = policy.pack([group])
    sampled = sampler_logprobs(policy, group)
    with torch.no_grad():
        of_update = policy.logprobs(packed, exclude_padding=True)
        of_model = policy.logprobs(packed)
        images = sum(
            policy.sampled_head.logits(policy.hidden_states(packed)).softmax(-1)[:, i] for i in policy.image_token_ids
        )
    torch.testing.assert_close(of_update - torch.log1p(-images), sampled, rtol=1e-4, atol=1e-4)
    assert (of_model - of_update)[0] < math.log(0.6)


def test_ids_that_no_token_has_are_banned_wherever_they_are(tmp_path):
    policy = tiny_policy(tmp_path)
    vocabulary = policy.tokenizer.get_vocab()
    hole = max(vocabulary.values()) - 3
    policy.processor.tokenizer = type(
        "Tokenizer", (), {"get_vocab": lambda self: {text: i for text, i in vocabulary.items() if i != hole}}
    )()
    assert hole in policy.banned_token_ids
    assert policy.num_tokens == max(vocabulary.values()) + 1


def test_a_server_is_told_the_same_rule(tmp_path):
    policy = tiny_policy(tmp_path)
    sampler = ServerRollout(policy, url="http://127.0.0.1:1", weights_dir=tmp_path)
    params = sampler._request(policy.prepare(make_sample(0)), 2, SamplingConfig(), 0)["sampling_params"]
    assert params["ignore_eos"] is True
    assert params["stop_token_ids"] == list(policy.eos_token_ids)
    assert set(params["logit_bias"]) == {str(i) for i in policy.banned_token_ids}
    sampler.close()
