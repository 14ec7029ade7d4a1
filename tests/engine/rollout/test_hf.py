"""Sampling with transformers: what is sampled, what is reported, and that nothing outside is touched."""

import numpy as np
import pytest
import torch
from PIL import Image

from balcaprl.config import SamplingConfig, TrainConfig
from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.policy import Group, Policy
from balcaprl.rollout import HFRollout, Sampler, make_sampler
from balcaprl.rollout.hf import _Decoder
from balcaprl.types import Sample

CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3
SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "vision_hidden_size": 32}
SIZES = [(112, 112), (168, 84), (84, 112)]


@pytest.fixture(scope="module", params=["qwen", "llava"])
def policy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen":
        build_tiny_qwen(folder, CORPUS, vision_depth=2, **SMALL)
    else:
        build_tiny_llava(folder, CORPUS, num_kv_heads=2, image_size=56, **SMALL)
    return Policy.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.prepare(make_sample(i, size)) for i, size in enumerate(SIZES)]


def make_sample(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    text = "Describe the image." + " A small red circle." * seed
    return Sample(f"s{seed}", lambda: Image.fromarray(pixels), "A red circle.", text)


def token_ids(groups):
    return [[rollout.completion.token_ids for rollout in group.rollouts] for group in groups]


def trainer_logprobs(policy, groups, temperature):
    packed = policy.pack(
        [
            Group(
                g.prompt.prompt_ids,
                [torch.tensor(r.completion.token_ids) for r in g.rollouts],
                g.prompt.image_inputs,
            )
            for g in groups
        ]
    )
    with torch.no_grad():
        return policy.logprobs(packed, temperature, exclude_banned=True)


def test_group_structure_and_logprobs(policy, prompts):
    sampling = SamplingConfig(temperature=0.8, max_completion_tokens=12)
    groups = HFRollout(policy).generate(prompts, 3, sampling, seed=1)
    assert [g.prompt.sample.sample_id for g in groups] == ["s0", "s1", "s2"]
    assert [len(g.rollouts) for g in groups] == [3, 3, 3]
    completions = [r.completion for g in groups for r in g.rollouts]
    for completion in completions:
        ended = completion.token_ids[-1] in policy.eos_token_ids
        assert completion.finished == ended
        assert ended or len(completion.token_ids) == 12
        assert not set(completion.token_ids[:-1]) & set(policy.eos_token_ids)
        assert completion.text == policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    sampled = torch.tensor([lp for c in completions for lp in c.sampling_logprobs])
    torch.testing.assert_close(sampled, trainer_logprobs(policy, groups, 0.8), atol=1e-5, rtol=1e-5)


def test_greedy_equals_transformers_generate(policy, prompts):
    groups = HFRollout(policy).generate(prompts, 1, SamplingConfig(max_completion_tokens=10), seed=0, greedy=True)
    for prompt, group in zip(prompts, groups, strict=True):
        ids = prompt.prompt_ids[None]
        extra = dict(prompt.image_inputs)
        if policy.model.config.model_type != "llava":
            extra["mm_token_type_ids"] = (ids == policy.model.config.image_token_id).int()
        expected = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            suppress_tokens=list(policy.banned_token_ids),
            **extra,
        )
        assert group.rollouts[0].completion.token_ids == expected[0, ids.shape[1] :].tolist()


def test_seed_decides_and_the_global_state_stays(policy, prompts):
    sampler, sampling = HFRollout(policy), SamplingConfig(max_completion_tokens=8)
    before = torch.random.get_rng_state()
    first, again, other = (token_ids(sampler.generate(prompts, 2, sampling, seed=s)) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0][0] != first[0][1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_samples_follow_the_distribution(policy, prompts):
    num_samples = 4000
    sampling = SamplingConfig(max_completion_tokens=1, temperature=0.5)
    (group,) = HFRollout(policy).generate(prompts[:1], num_samples, sampling, seed=3)
    completions = [r.completion for r in group.rollouts]
    claimed = {c.token_ids[0]: np.exp(c.sampling_logprobs[0]) for c in completions}
    counts = {token: sum(c.token_ids[0] == token for c in completions) for token in claimed}
    for token, probability in claimed.items():
        deviation = np.sqrt(num_samples * probability * (1 - probability))
        assert abs(counts[token] - num_samples * probability) < 5 * deviation + 1


def test_banned_ids_are_never_sampled(policy, prompts):
    head = policy.lm_head_weight
    saved = head.detach().clone()
    hidden = policy.hidden_states(
        policy.pack([Group(prompts[0].prompt_ids, [torch.tensor([9])], prompts[0].image_inputs)])
    )
    try:
        with torch.no_grad():
            head[list(policy.image_token_ids)] = 50 * hidden[0] / hidden[0].norm()
        (result,) = HFRollout(policy).generate(prompts[:1], 16, SamplingConfig(max_completion_tokens=4), seed=0)
    finally:
        with torch.no_grad():
            head.copy_(saved)
    sampled = {i for r in result.rollouts for i in r.completion.token_ids}
    assert not sampled & set(policy.image_token_ids)


def test_eos_ends_a_completion(policy, prompts, monkeypatch):
    sampling = SamplingConfig(max_completion_tokens=10)
    (group,) = HFRollout(policy).generate(prompts[:1], 1, sampling, seed=0)
    ids = group.rollouts[0].completion.token_ids
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", ids[3])
    (group,) = HFRollout(policy).generate(prompts[:1], 1, sampling, seed=0)
    completion = group.rollouts[0].completion
    assert completion.token_ids == ids[: ids.index(ids[3]) + 1]
    assert len(completion.sampling_logprobs) == len(completion.token_ids)
    assert completion.finished


def test_a_completion_comes_as_soon_as_it_ends(policy, prompts, monkeypatch):
    """Not when the last of all ends: the judge works on it meanwhile."""
    sampling = SamplingConfig(max_completion_tokens=10)
    rows = [ids for group in token_ids(HFRollout(policy).generate(prompts, 2, sampling, seed=0)) for ids in group]
    end = rows[2][3]
    ends = [row.index(end) if end in row else 9 for row in rows]
    assert ends[2] < max(ends)
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", end)
    steps, advance = [], _Decoder.advance
    monkeypatch.setattr(_Decoder, "advance", lambda *given: steps.append(0) or advance(*given))
    arrived = []
    for draw in HFRollout(policy).stream(prompts, 2, sampling, seed=0):
        row = 2 * draw.prompt + draw.position
        arrived.append((len(steps), row))
        assert draw.rollout.completion.token_ids == rows[row][: ends[row] + 1]
    assert arrived == sorted((ends[row], row) for row in range(6))


def test_bad_requests(policy, prompts):
    with pytest.raises(ValueError, match="at least one prompt"):
        HFRollout(policy).generate([], 1, SamplingConfig(), seed=0)
    with pytest.raises(ValueError, match="group_size"):
        HFRollout(policy).generate(prompts, 0, SamplingConfig(), seed=0)


def test_make_sampler_and_sync(policy):
    sampler = make_sampler(TrainConfig.model_validate({"rollout": {"sampler": "hf"}}), policy)
    assert isinstance(sampler, Sampler)
    assert sampler.name == "hf"
    report = sampler.sync(7)
    assert (report.bytes_copied, report.policy_version) == (0, 7)
    sampler.close()
