"""Which models are taken, which are refused and why; what families that are not known take for each token and image."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from balcaprl.policy import Group, Policy, UnsupportedFamilyError
from balcaprl.policy.layers.fused import stock_layers
from balcaprl.policy.registry import family_of
from balcaprl.torchvision_compat import ensure_importable

ensure_importable()
import transformers as hf  # noqa: E402

VOCAB, IMAGE = 200, 199
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
PINS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


def make_policy(model_class, config, spread=0.1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():  # attention is nearly even in a fresh model, and its masks hardly show
                parameter += spread * torch.randn_like(parameter)
    return Policy.from_model(model, SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def completions(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 180, (n,), generator=generator) for n in lengths]


def stock_logprobs(policy, groups, **per_token):
    """What transformers says of one unpadded sequence at a time; ``per_token`` makes an input from (prompt ids, row ids)."""
    parts = []
    for group in groups:
        images = {key: value for key, value in group.image_inputs.items() if key not in per_token}
        for completion in group.completions:
            ids = torch.cat([group.prompt_ids, completion])[None]
            extra = {key: make(group.prompt_ids, ids) for key, make in per_token.items()}
            with stock_layers(policy.model):
                output = policy.model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **images, **extra
                )
            logprobs = output.logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            parts.append(logprobs.gather(-1, completion[:, None])[:, 0])
    return torch.cat(parts)


def assert_equal(policy, groups, expected, sharing="auto"):
    """Values and gradients."""
    found = policy.logprobs(policy.pack(groups, sharing))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = []
    for logprobs in (expected, found):
        policy.model.zero_grad()
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None})
    largest = max(float(each.norm()) for each in gradients[0].values())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-4 * max(float(gradient.norm()), 0.01 * largest), name


# ------------------------------------------------------------------------------------------------- values for each token


def gemma3():
    vision = {**SIGLIP, "patch_size": 7}
    config = hf.Gemma3Config(
        vision_config=vision, text_config={"model_type": "gemma3_text", "head_dim": 16, **TEXT}, mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=198, eoi_token_index=197,
    )  # fmt: skip
    return make_policy(hf.Gemma3ForConditionalGeneration, config)


def paligemma():
    vision = {**SIGLIP, "projection_dim": 32, "num_image_tokens": 4}
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config={"model_type": "gemma", "head_dim": 16, **TEXT}, image_token_index=IMAGE,
        projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return make_policy(hf.PaliGemmaForConditionalGeneration, config)


PER_TOKEN = {
    "gemma3": (gemma3, lambda prompt, ids: (ids == IMAGE).long()),
    "paligemma": (paligemma, lambda prompt, ids: (torch.arange(ids.shape[1]) >= len(prompt)).long()[None]),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_what_belongs_to_each_token_goes_on_over_the_completion(name):
    make, rule = PER_TOKEN[name]
    policy = make()
    groups = []
    for seed, lengths in enumerate([(5, 2), (3,)]):
        ids = torch.tensor([7, 198, *[IMAGE] * 4, 197, 8, *range(20, 20 + seed)])
        images = {"pixel_values": random(1, 3, 28, 28, seed=seed), "token_type_ids": rule(ids, ids[None])}
        groups.append(Group(ids, completions(*lengths, seed=seed), images))
    expected = stock_logprobs(policy, groups, token_type_ids=rule)
    assert_equal(policy, groups, expected)
    causal = stock_logprobs(policy, groups, token_type_ids=lambda prompt, ids: None)
    assert (expected - causal).abs().max() > 1e-2, "it must matter"
    lacking = {"pixel_values": groups[0].image_inputs["pixel_values"]}
    with pytest.raises(ValueError, match=r"tells tokens of images by token_type_ids"):
        policy.pack([replace(groups[0], image_inputs=lacking)])


def test_a_value_for_each_token_that_nobody_can_go_on_with_is_refused():
    policy = gemma3()
    ids = torch.tensor([7, 198, *[IMAGE] * 4, 197, 8])
    images = {"pixel_values": random(1, 3, 28, 28), "token_type_ids": (ids == IMAGE).long()[None]}
    group = Group(ids, completions(3), {**images, "chunk_ids": torch.zeros(1, len(ids), dtype=torch.long)})
    with pytest.raises(ValueError, match=r"'gemma3' takes chunk_ids for each token"):
        policy.pack([group])


# ------------------------------------------------------------------------------------------------- images


LLAVAS = {
    "siglip": (SIGLIP, "full", -1, 4),
    "siglip, one dropped": (SIGLIP, "default", -1, 3),
    "clip": (CLIP, "default", -2, 4),
    "clip with its class feature": (CLIP, "full", -2, 5),
    "several layers": (CLIP, "default", [-2, -3], 4),
}


@pytest.mark.parametrize("kind", LLAVAS)
def test_a_llava_asks_its_tower_for_the_number_of_features(kind):
    vision, strategy, layer, count = LLAVAS[kind]
    config = hf.LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_index=IMAGE, image_seq_length=count,
        vision_feature_layer=layer, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    policy = make_policy(hf.LlavaForConditionalGeneration, config, spread=0)
    groups = [
        Group(
            torch.tensor([7, *[IMAGE] * count * number, 8]),
            completions(4, 2),
            {"pixel_values": random(number, 3, 28, 28, seed=number)},
        )
        for number in (1, 2)
    ]
    for sharing in ("shared", "repeated"):
        assert_equal(policy, groups, stock_logprobs(policy, groups), sharing)
    torn = replace(groups[0], prompt_ids=groups[0].prompt_ids[1:-1].repeat(2))
    with pytest.raises(ValueError, match=f"holds {2 * count} image placeholders .* make {count} features"):
        policy.pack([torn])


def llava_next(vision=CLIP, strategy="default"):
    config = hf.LlavaNextConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_index=IMAGE,
        image_grid_pinpoints=PINS, vision_feature_layer=-2, vision_feature_select_strategy=strategy, image_seq_length=4,
    )  # fmt: skip
    return make_policy(hf.LlavaNextForConditionalGeneration, config, spread=0)


def tiles_of(policy, sizes, seed):
    """Pictures of (height, width) as their processor hands them over, and the features that the stock model makes."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    counts = [image_size_to_num_patches(list(size), PINS, 28) for size in sizes]
    pixels = random(len(sizes), max(counts), 3, 28, 28, seed=seed)
    for image, count in zip(pixels, counts, strict=True):
        image[count:] = 0
    images = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        rows = policy.family.image_features(policy.stock_model, images).embeds
    return images, len(rows)


SHAPES = [(28, 28), (100, 28), (28, 90), (56, 56), (40, 55), (84, 84)]


@pytest.mark.parametrize("sharing", ["shared", "repeated"])
def test_images_in_different_numbers_of_tiles_meet_in_one_batch(sharing):
    policy = llava_next()
    groups = []
    for seed, sizes in enumerate([*([shape] for shape in SHAPES), SHAPES[1:3]]):
        images, count = tiles_of(policy, sizes, seed)
        assert policy.family.num_image_tokens(policy.model, images) == count
        groups.append(Group(torch.tensor([7, *[IMAGE] * count, 8]), completions(3, 2, seed=seed), images, f"s{seed}"))
    assert len({g.image_inputs["pixel_values"].shape for g in groups}) > 2
    assert_equal(policy, groups, stock_logprobs(policy, groups), sharing)
    torn = replace(groups[1], prompt_ids=groups[1].prompt_ids[2:])
    with pytest.raises(ValueError, match=r"\(s1\): the prompt holds \d+ image placeholders .* features"):
        policy.pack([groups[0], torn])


def test_a_family_that_is_not_known_runs_images_of_other_shapes_apart():
    vision = {"model_type": "pixtral", **TOWER, "head_dim": 16}
    config = hf.LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_index=IMAGE, image_seq_length=4,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    policy = make_policy(hf.LlavaForConditionalGeneration, config, spread=0)
    assert not policy.family.is_known, "a Pixtral tower takes images of any size"
    groups = [
        Group(
            torch.tensor([7, *[IMAGE] * (height * width), 8]),
            completions(3, 1),
            {
                "pixel_values": random(1, 3, 14 * height, 14 * width),
                "image_sizes": torch.tensor([[14 * height, 14 * width]]),
            },
        )
        for height, width in ((2, 2), (1, 2), (2, 1))
    ]
    assert_equal(policy, groups, stock_logprobs(policy, groups))


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("florence2", "encoder-decoder"),
        ("blip-2", "encoder-decoder"),
        ("instructblip", "encoder-decoder"),
        ("pix2struct", "encoder-decoder"),
        ("udop", "encoder-decoder"),
        ("t5gemma2", "encoder-decoder"),
        ("mllama", "cross-attention"),
        ("idefics", "cross-attention"),
    ],
)
def test_models_that_are_no_single_decoder_are_refused_before_they_are_loaded(name, why, tmp_path):
    hf.AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFamilyError, match=rf"'{name}' is not supported: .*{why}"):
        Policy.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "llava_next", "llava_onevision", "internvl", "idefics3"])
def test_single_decoders_are_taken(name):
    assert family_of(hf.AutoConfig.for_model(name))
