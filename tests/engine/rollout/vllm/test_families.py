"""Real vLLM beside LLaVA's other towers and tiles, and adapters on heads: names, numbers of features, weights after a sync."""

import pytest
import torch
from vllm_runs import CORPUS, SMALL, largest_difference, make_sample, perturb

from balcaprl.config import SamplingConfig
from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.policy import Policy
from balcaprl.rollout import HFRollout
from balcaprl.rollout.server import ServerRollout
from balcaprl.rollout.vllm.rollout import VLLMRollout

pytest.importorskip("vllm", reason="vLLM is an optional extra")
SAMPLING = SamplingConfig(max_completion_tokens=8)
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 112,
    "patch_size": 14,
}  # fmt: skip
PINS = [[112, 224], [224, 112], [224, 224]]
SIZES = [(112, 112), (330, 112), (112, 330), (200, 120)]


def build(kind, folder):
    """A checkpoint of another LLaVA, with the tokenizer and template of the tiny one."""
    import transformers as hf

    base = Policy.from_pretrained(build_tiny_llava(folder / "base", CORPUS, num_heads=6), device="cpu")
    tokenizer, text = base.tokenizer, base.model.config.text_config.to_dict() | {"num_hidden_layers": 2}
    image = base.model.config.image_token_id
    common = {"text_config": text, "image_token_index": image, "image_seq_length": 64, "tie_word_embeddings": False}
    processing = {"tokenizer": tokenizer, "patch_size": 14, "chat_template": base.processor.chat_template}
    torch.manual_seed(0)
    if kind == "llava_next":
        vision = {"model_type": "clip_vision_model", **TOWER}
        config = hf.LlavaNextConfig(vision_config=vision, image_grid_pinpoints=PINS, vision_feature_layer=-2, **common)
        model = hf.LlavaNextForConditionalGeneration(config)
        images = hf.LlavaNextImageProcessor(
            size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}, image_grid_pinpoints=PINS
        )
        processor = hf.LlavaNextProcessor(
            image_processor=images,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **processing,
        )
    else:
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
        config = hf.LlavaConfig(
            vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy="full", **common
        )
        model = hf.LlavaForConditionalGeneration(config)
        processor = hf.LlavaProcessor(
            image_processor=hf.SiglipImageProcessor(size={"height": 112, "width": 112}),
            vision_feature_select_strategy="full", num_additional_image_tokens=0, **processing,
        )  # fmt: skip
    model.generation_config = base.model.generation_config
    model.save_pretrained(folder / kind)
    processor.save_pretrained(folder / kind)
    return Policy.from_pretrained(folder / kind, device="cpu")


@pytest.mark.parametrize("kind", ["llava_next", "llava_siglip"])
def test_other_llavas_share_their_weights(tmp_path, kind):
    policy = build(kind, tmp_path)
    prompts = [policy.prepare(make_sample(seed, size)) for seed, size in enumerate(SIZES)]
    assert (len({len(prompt.prompt_ids) for prompt in prompts}) > 1) == (kind == "llava_next")
    assert largest_difference(policy, HFRollout(policy).generate(prompts, 2, SAMPLING, seed=0)) < 1e-5
    sampler = VLLMRollout(policy)
    try:
        assert largest_difference(policy, sampler.generate(prompts, 2, SAMPLING, seed=0)) < 1e-5
        perturb(policy)
        assert sampler.sync(1).strategy == "shared"
        assert largest_difference(policy, sampler.generate(prompts, 2, SAMPLING, seed=0)) < 1e-5
    finally:
        sampler.close()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_parts_a_tied_head_reaches_the_engine(tmp_path, target):
    stock = Policy.from_pretrained(build_tiny_qwen(tmp_path, CORPUS, **SMALL), device="cpu")
    peft = pytest.importorskip("peft", reason="peft is an optional package")  # wants what loading a policy has mended
    config = peft.LoraConfig(r=4, target_modules=["q_proj", target], init_lora_weights=False)
    policy = Policy.from_model(peft.get_peft_model(stock.model, config), stock.processor)
    prompts = [policy.prepare(make_sample(seed)) for seed in range(2)]
    sampler = VLLMRollout(policy)
    try:
        groups = sampler.generate(prompts, 2, SAMPLING, seed=0)
        assert largest_difference(policy, groups) < 1e-5
        perturb(policy, "lora_")
        assert largest_difference(policy, groups) > 1e-3, "the change must be visible"
        assert sampler.sync(1).strategy == "reload"
        assert largest_difference(policy, sampler.generate(prompts, 2, SAMPLING, seed=0)) < 1e-5
    finally:
        sampler.close()
    with pytest.raises(ValueError, match="parts its head from the embedding"):
        ServerRollout(policy, url="http://127.0.0.1:1", weights_dir=tmp_path)
