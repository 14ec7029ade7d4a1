"""Small policies of every family with random weights, and groups for them."""

from types import SimpleNamespace

import torch

from balcaprl.policy import Group, Policy
from balcaprl.torchvision_compat import ensure_importable

ensure_importable()
import transformers as hf  # noqa: E402

VOCAB, HIDDEN, IMAGE = 96, 48, 5
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}


def mrope(sections, **more):
    return {"rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4, **more}}


def qwen25_vl(tied):
    """Windowed attention in the first two blocks of the tower."""
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [2],
    }  # fmt: skip
    text = TEXT | mrope([2, 2, 2]) | {"tie_word_embeddings": tied}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **QWEN_IDS)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl(tied):
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": HIDDEN, "patch_size": 14}
    text = TEXT | mrope([2, 2, 2]) | {"tie_word_embeddings": tied}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **QWEN_IDS)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen3_vl(tied):
    """Features of two inner tower layers join the decoder."""
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN, "patch_size": 14,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = TEXT | mrope([4, 2, 2], mrope_interleaved=True) | {"head_dim": 16, "tie_word_embeddings": tied}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **QWEN_IDS)
    return hf.Qwen3VLForConditionalGeneration(config)


def llava(tied):
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 42, "patch_size": 14,
    }  # fmt: skip
    text = {"model_type": "llama", "tie_word_embeddings": tied, **TEXT}
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=9, vision_feature_layer=-2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def text_only(name):
    def build(tied):
        config = getattr(hf, f"{name}Config")(**TEXT, tie_word_embeddings=tied)
        return getattr(hf, f"{name}ForCausalLM")(config)

    return build


FAMILIES = {
    "qwen2_5_vl": qwen25_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "llava": llava,
    "llama": text_only("Llama"),
    "qwen2": text_only("Qwen2"),
    "qwen3": text_only("Qwen3"),
}


def make_policy(name, dtype=torch.float32, tied=False, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[name](tied).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too: a fresh model's are all alike
                parameter += 0.05 * torch.randn_like(parameter)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    return Policy.from_model(model, processor, **options)


def make_images(policy, sizes, generator):
    """Image tensors for images of the given sizes, and their placeholders between marks."""
    kind, dtype = policy.model.config.model_type, policy.dtype
    if not sizes:
        return {}, []
    if kind == "llava":
        pixels = torch.randn(len(sizes), 3, 42, 42, generator=generator, dtype=dtype)
        return {"pixel_values": pixels}, [IMAGE] * 9 * len(sizes)
    grid = torch.tensor([[1, height, width] for height, width in sizes])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=generator, dtype=dtype)
    ids = [token for h, w in sizes for token in [3, *[IMAGE] * (h * w // 4), 4]]
    return {"pixel_values": pixels, "image_grid_thw": grid}, ids


def make_group(policy, sizes, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    if not hasattr(policy.model.config, "vision_config"):
        sizes = []
    image_inputs, image_ids = make_images(policy, sizes, generator)
    words = torch.randint(10, VOCAB, (5 + seed % 3,), generator=generator).tolist()
    completions = [torch.randint(10, VOCAB, (n,), generator=generator) for n in lengths]
    return Group(torch.tensor([words[0], *image_ids, *words[1:]]), completions, image_inputs, f"sample-{seed}")


def make_groups(policy, seed=0):
    """Ragged and empty completions, several images, none, different sizes, G = 1, and a group of empty ones alone."""
    return [
        make_group(policy, [(8, 8)], [5, 1, 0, 7], 10 * seed),
        make_group(policy, [(4, 6), (6, 4)], [3, 2], 10 * seed + 1),
        make_group(policy, [(4, 4)], [0, 0], 10 * seed + 2),
        make_group(policy, [], [4, 4], 10 * seed + 3),
        make_group(policy, [(6, 10)], [6], 10 * seed + 4),
    ]
