"""Builds tiny stock checkpoints from their configuration; nothing is downloaded.

Each builder writes a folder that plain ``AutoModelForImageTextToText``, ``AutoProcessor`` and vLLM load like any
published checkpoint. The folder holds random weights, a byte-level BPE tokenizer trained on the caller's corpus, a
processor and a chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from balcaprl.torchvision_compat import ensure_importable

_QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
_QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAVA_SPECIALS = ["<pad>", "<s>", "</s>", "<image>"]
_LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PATCH = 14
"""Edge length of a patch, in pixels."""
_TEMPLATE_WORD_COUNT = 1000
"""How many times the words of the chat templates are added to the tokenizer's training text, whatever the corpus."""
_VOCAB_MULTIPLE = 64
"""The number of embedding rows is rounded up to a multiple of this, as in published checkpoints."""
_ModelParts = tuple[Any, Any, Any]
"""The class of a transformers model, its configuration and its generation configuration."""


def build_tiny_qwen(
    folder: str | Path,
    corpus: Iterable[str] | Tokenizer,
    *,
    max_vocab_size: int = 2048,
    hidden_size: int = 192,
    intermediate_size: int = 512,
    num_layers: int = 4,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    vision_hidden_size: int = 128,
    vision_intermediate_size: int = 352,
    vision_depth: int = 3,
    vision_num_heads: int = 4,
    full_attention: bool = True,
    max_pixels: int = 448 * 448,
    max_positions: int = 4096,
    tie_word_embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a Qwen2.5-VL with a few million random parameters, and return its folder.

    Patches are 14 x 14 px, and 2 x 2 patches make one token: an image of 112 x 112 px becomes 16 image tokens. A word
    that the corpus contains at least twice after a space becomes one token together with the space, as long as
    ``max_vocab_size`` has room. The number of embedding rows is rounded up to a multiple of 64. With
    ``full_attention`` every block of the tower sees the whole image; otherwise only the last block does, and the others
    see windows of 112 px. The processor shrinks images with more than ``max_pixels`` pixels. ``seed`` determines the
    weights, and the global random state stays unchanged.

    Raises:
        ValueError: A size is not a multiple of the size that must divide it.
    """
    _require_divisible(hidden_size=hidden_size, num_heads=num_heads)
    _require_divisible(num_heads=num_heads, num_kv_heads=num_kv_heads)
    _require_divisible(vision_hidden_size=vision_hidden_size, vision_num_heads=vision_num_heads)
    if isinstance(corpus, Tokenizer):
        tokenizer = corpus
    else:
        tokenizer = _train_tokenizer(corpus, _QWEN_SPECIALS, max_vocab_size)
    text = _text_config(tokenizer, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, max_positions)
    vision = {
        "depth": vision_depth,
        "hidden_size": vision_hidden_size,
        "intermediate_size": vision_intermediate_size,
        "num_heads": vision_num_heads,
        "out_hidden_size": hidden_size,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(range(vision_depth)) if full_attention else [vision_depth - 1],
    }
    _save_random_model(Path(folder), *_qwen_parts(tokenizer, text, vision, tie_word_embeddings), dtype, seed)
    _save_qwen_processor(Path(folder), tokenizer, max_pixels)
    return Path(folder)


def build_tiny_llava(
    folder: str | Path,
    corpus: Iterable[str],
    *,
    max_vocab_size: int = 2048,
    hidden_size: int = 192,
    intermediate_size: int = 512,
    num_layers: int = 4,
    num_heads: int = 6,
    num_kv_heads: int = 6,
    vision_hidden_size: int = 128,
    vision_intermediate_size: int = 256,
    vision_num_layers: int = 4,
    vision_num_heads: int = 4,
    image_size: int = 112,
    max_positions: int = 4096,
    tie_word_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a LLaVA-1.5 (CLIP tower, projector, Llama) with a few million random parameters, and return its folder.

    Every image is resized and cropped to a square with edge ``image_size``, and each patch of 14 x 14 px becomes one
    token. The features come from the second-to-last tower layer, as in the published models, so the last layer is never
    trained. The tokenizer, the seed and the errors are as for ``build_tiny_qwen``.
    """
    _require_divisible(hidden_size=hidden_size, num_heads=num_heads)
    _require_divisible(num_heads=num_heads, num_kv_heads=num_kv_heads)
    _require_divisible(vision_hidden_size=vision_hidden_size, vision_num_heads=vision_num_heads)
    _require_divisible(image_size=image_size, patch_size=_PATCH)
    tokenizer = _train_tokenizer(corpus, _LLAVA_SPECIALS, max_vocab_size)
    # Llama's tokenizer puts its start token before every text.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    text = _text_config(tokenizer, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, max_positions)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": vision_hidden_size,
        "intermediate_size": vision_intermediate_size,
        "num_hidden_layers": vision_num_layers,
        "num_attention_heads": vision_num_heads,
        "image_size": image_size,
        "patch_size": _PATCH,
    }
    _save_random_model(Path(folder), *_llava_parts(tokenizer, text, vision, tie_word_embeddings), dtype, seed)
    _save_llava_processor(Path(folder), tokenizer, image_size)
    return Path(folder)


def _text_config(
    tokenizer: Tokenizer,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    max_positions: int,
) -> dict[str, Any]:
    """Make the configuration fields that the text models of both families share."""
    return {
        "vocab_size": -(-tokenizer.get_vocab_size() // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": max_positions,
    }


def _qwen_parts(tokenizer: Tokenizer, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> _ModelParts:
    ensure_importable()
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    special = _special_ids(tokenizer, _QWEN_SPECIALS)
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    # The published models give time, height and width 2/8, 3/8 and 3/8 of the rotary frequencies.
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    text |= {
        "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
        "tie_word_embeddings": tied,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    generation_config = GenerationConfig(
        eos_token_id=[special["<|im_end|>"], special["<|endoftext|>"]], pad_token_id=special["<|endoftext|>"]
    )
    return Qwen2_5_VLForConditionalGeneration, config, generation_config


def _llava_parts(tokenizer: Tokenizer, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> _ModelParts:
    ensure_importable()
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    special = _special_ids(tokenizer, _LLAVA_SPECIALS)
    ids = {"bos_token_id": special["<s>"], "eos_token_id": special["</s>"], "pad_token_id": special["<pad>"]}
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", "tie_word_embeddings": tied, **text, **ids},
        image_token_index=special["<image>"],
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )
    return LlavaForConditionalGeneration, config, GenerationConfig(**ids)


def _special_ids(tokenizer: Tokenizer, names: list[str]) -> dict[str, Any]:
    return {name: tokenizer.token_to_id(name) for name in names}


def _save_random_model(
    folder: Path, model_class: Any, config: Any, generation_config: Any, dtype: torch.dtype, seed: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
    model.generation_config = generation_config
    model.save_pretrained(folder)


def _train_tokenizer(corpus: Iterable[str], specials: list[str], max_vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; merging stops early once every word of the corpus is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_template_words(corpus), trainer)
    return tokenizer


def _with_template_words(corpus: Iterable[str]) -> Iterator[str]:
    """Yield the corpus, then the chat templates' words, which should be single tokens because every prompt has them."""
    if isinstance(corpus, str):
        raise ValueError("corpus must be several texts, not one string")
    yield from corpus
    for _ in range(_TEMPLATE_WORD_COUNT):
        yield "user\nassistant\nUSER: ASSISTANT:"


def _require_divisible(**sizes: int) -> None:
    (name, value), (by_name, by) = sizes.items()
    if value % by:
        raise ValueError(f"{name} ({value}) must be a multiple of {by_name} ({by})")


def _save_qwen_processor(folder: Path, tokenizer: Tokenizer, max_pixels: int) -> None:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_QWEN_SPECIALS,
        padding_side="left",
    )
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=max_pixels),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_QWEN_TEMPLATE,
    ).save_pretrained(folder)


def _save_llava_processor(folder: Path, tokenizer: Tokenizer, image_size: int) -> None:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=fast,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_TEMPLATE,
    ).save_pretrained(folder)
