"""The packed forward equals the stock forward, one sequence at a time: values and every parameter's gradient."""

import numpy as np
import pytest
import torch
from PIL import Image

from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.policy import Group, Policy, UnsupportedFamilyError
from balcaprl.policy.layers.fused import stock_layers
from balcaprl.types import Sample

CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3
SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "vision_hidden_size": 32}
CASES = {
    "qwen-tied": (build_tiny_qwen, {"vision_depth": 2, "full_attention": False, "num_kv_heads": 2, **SMALL}),
    "qwen-untied": (build_tiny_qwen, {"vision_depth": 2, "tie_word_embeddings": False, **SMALL}),
    "llava-tied": (build_tiny_llava, {"tie_word_embeddings": True, "num_kv_heads": 2, "image_size": 56, **SMALL}),
    "llava-untied": (build_tiny_llava, {"num_kv_heads": 2, "image_size": 56, **SMALL}),
}


def make_image(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def make_sample(image, name="s"):
    return Sample(name, lambda: image, "A red circle.", "Describe the image.")


@pytest.fixture(scope="module", params=list(CASES))
def folder(request, tmp_path_factory):
    builder, sizes = CASES[request.param]
    return builder(tmp_path_factory.mktemp(request.param), CORPUS, **sizes)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def policy(request, folder):
    return Policy.from_pretrained(folder, dtype=request.param, device="cpu")


@pytest.fixture
def no_float32_islands(policy, monkeypatch):
    """transformers computes norms and rotary embeddings in float32 even inside a float64 model, and thus rounds the
    gradients of each row; the float64 comparison keeps them in float64, on both sides."""
    if policy.dtype != torch.float64:
        return
    to = torch.Tensor.to

    def keep_double(self, *args, **kwargs):
        args = tuple(torch.float64 if a == torch.float32 and self.dtype == torch.float64 else a for a in args)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep_double)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def completions(policy, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, last = 10, policy.num_tokens
    return [torch.randint(first, last, (length,), generator=generator) for length in lengths]


def group(policy, lengths, size=(112, 112), seed=0):
    prompt = policy.prepare(make_sample(make_image(*size, seed)))
    return Group(prompt.prompt_ids, completions(policy, lengths, seed), prompt.image_inputs)


def stock_logprobs(policy, groups):
    """What transformers itself says, one unpadded sequence at a time."""
    parts = []
    for each in groups:
        for completion in each.completions:
            ids = torch.cat([each.prompt_ids, completion])[None]
            extra = dict(each.image_inputs)
            if policy.model.config.model_type != "llava" and extra:
                extra["mm_token_type_ids"] = (ids == policy.model.config.image_token_id).int()
            with stock_layers(policy.model):
                logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
            start = len(each.prompt_ids) - 1
            logprobs = logits[start : start + len(completion)].log_softmax(-1)
            parts.append(logprobs.gather(-1, completion[:, None])[:, 0])
    return torch.cat(parts)


def gradients(policy, logprobs):
    policy.model.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def assert_equals_stock(policy, groups):
    tolerance = 1e-5 if policy.dtype == torch.float32 else 1e-10
    expected = stock_logprobs(policy, groups)
    expected_grads = gradients(policy, expected)
    actual = policy.logprobs(policy.pack(groups))
    assert actual.shape == expected.shape
    assert (actual - expected).norm() / expected.norm() < tolerance
    actual_grads = gradients(policy, actual)
    assert actual_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        # A key's bias shifts all scores of a query alike: its true gradient is 0, and only rounding is left of it.
        floor = 0.01 * max(g.norm() for g in expected_grads.values()) if name.endswith("k_proj.bias") else 1e-30
        assert (actual_grads[name] - grad).norm() / max(grad.norm(), floor) < tolerance, name


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([[5, 5, 5]], [(112, 112)]),
        ([[1, 7, 0, 4]], [(112, 112)]),
        ([[3]], [(112, 84)]),
        ([[2, 6], [0, 5, 1]], [(112, 112), (168, 84)]),
    ],
    ids=["equal", "ragged-and-empty", "one", "two-image-sizes"],
)
@pytest.mark.usefixtures("no_float32_islands")
def test_equals_the_stock_forward(policy, lengths, sizes):
    groups = [group(policy, each, size, seed) for seed, (each, size) in enumerate(zip(lengths, sizes, strict=True))]
    assert_equals_stock(policy, groups)


@pytest.mark.usefixtures("no_float32_islands")
def test_no_image_and_several_images(policy):
    first, second = (policy.prepare(make_sample(make_image(112, 84 + 28 * i, i))) for i in range(2))
    both = {key: torch.cat([value, second.image_inputs[key]]) for key, value in first.image_inputs.items()}
    groups = [
        Group(torch.cat([first.prompt_ids, second.prompt_ids]), completions(policy, [4, 2]), both),
        Group(torch.arange(20, 30), completions(policy, [3, 3]), {}),
        Group(second.prompt_ids, completions(policy, [2]), second.image_inputs),
    ]
    assert_equals_stock(policy, groups)


def test_image_tower_runs_once_per_image(policy, monkeypatch):
    seen = []
    original = policy.family.image_features
    monkeypatch.setattr(
        type(policy.family),
        "image_features",
        lambda self, model, inputs: seen.append(inputs["pixel_values"].shape[0]) or original(model, inputs),
    )
    groups = [group(policy, [2] * 8), group(policy, [2] * 8, seed=1)]
    policy.hidden_states(policy.pack(groups))
    assert seen == [sum(each.image_inputs["pixel_values"].shape[0] for each in groups)]


def test_layout_of_the_batch(policy):
    packed = policy.pack([group(policy, [2, 0]), group(policy, [3], seed=1)])
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.group_index.tolist() == [0, 0, 1]
    assert (packed.num_completions, packed.num_targets) == (3, 5)
    assert policy.hidden_states(packed).shape == (5, policy.lm_head_weight.shape[1])


def test_only_empty_completions_still_give_a_graph(policy):
    logprobs = policy.logprobs(policy.pack([group(policy, [0, 0])]))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()


def test_temperature_and_banned_ids(policy):
    packed = policy.pack([group(policy, [4, 3])])
    logits = policy.hidden_states(packed) @ policy.lm_head_weight.T / 0.7
    picked = packed.targets[:, None]
    plain = logits.log_softmax(-1).gather(-1, picked)[:, 0]
    torch.testing.assert_close(policy.logprobs(packed, 0.7), plain, rtol=1e-5, atol=1e-5)
    logits[:, list(policy.banned_token_ids)] = -torch.inf
    restricted = logits.log_softmax(-1).gather(-1, picked)[:, 0]
    actual = policy.logprobs(packed, 0.7, exclude_banned=True)
    torch.testing.assert_close(actual, restricted, rtol=1e-5, atol=1e-5)
    assert (restricted - plain).abs().max() > 1e-4, "random weights must tell the two apart"


def test_save_and_reload_keep_every_bit(policy, tmp_path):
    policy.save(tmp_path)
    again = Policy.from_pretrained(tmp_path, dtype=policy.dtype, device="cpu")
    assert again.num_parameters == policy.num_parameters
    assert again.eos_token_ids == policy.eos_token_ids
    for (name, a), (_, b) in zip(policy.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    prompts = [p.prepare(make_sample(make_image(112, 112, 0))) for p in (policy, again)]
    assert torch.equal(prompts[0].prompt_ids, prompts[1].prompt_ids)


def test_start_token_is_never_doubled(folder):
    policy = Policy.from_pretrained(folder, device="cpu")
    sample = make_sample(make_image(112, 112, 0))
    plain = policy.prepare(sample)
    if policy.tokenizer.bos_token is None:
        return
    template = policy.processor.chat_template
    policy.processor.chat_template = policy.tokenizer.bos_token + template
    assert torch.equal(policy.prepare(sample).prompt_ids, plain.prompt_ids)


def test_freeze_vision_leaves_the_projection(folder):
    policy = Policy.from_pretrained(folder, device="cpu", freeze_vision=True)
    frozen = {name for name, p in policy.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("visual" in name or "vision_tower" in name for name in frozen)
    grads = gradients(policy, policy.logprobs(policy.pack([group(policy, [3, 2])])))
    assert not frozen & grads.keys()
    assert any("merger" in name or "projector" in name for name in grads)


def test_banned_and_end_ids_come_from_the_checkpoint(folder):
    policy = Policy.from_pretrained(folder, device="cpu")
    tokens = set(policy.tokenizer.convert_ids_to_tokens(list(policy.image_token_ids)))
    assert tokens in ({"<image>"}, {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"})
    assert policy.tokenizer.eos_token_id in policy.eos_token_ids
    assert not set(policy.eos_token_ids) & set(policy.image_token_ids)


def test_mismatched_groups_are_named(folder):
    policy = Policy.from_pretrained(folder, device="cpu")
    good = group(policy, [2])
    with pytest.raises(ValueError, match=r"groups\[1\].*placeholders"):
        policy.pack([good, Group(good.prompt_ids[:-8].repeat(2), good.completions, good.image_inputs)])
    with pytest.raises(ValueError, match=r"groups\[0\].completions\[0\] must be a LongTensor"):
        policy.pack([Group(good.prompt_ids, [torch.zeros(2, 2)], good.image_inputs)])
    with pytest.raises(ValueError, match="at least one group"):
        policy.pack([])


def test_unknown_family_and_dtype_are_refused(tmp_path, folder):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFamilyError, match=r"'bert' is not supported; supported are qwen2_5_vl"):
        Policy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float33"):
        Policy.from_pretrained(folder, dtype="float33")
