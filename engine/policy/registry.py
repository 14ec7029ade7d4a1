"""Which family serves a checkpoint, and which checkpoints are refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

from balcaprl.policy.families import (
    Family,
    Llava,
    LlavaNext,
    Qwen3VL,
    QwenVL,
    TextOnly,
    Unknown,
    UnsupportedFamilyError,
)

logger = logging.getLogger(__name__)

_FAMILIES: tuple[Family, ...] = (QwenVL(), Qwen3VL(), Llava(), LlavaNext(), TextOnly())
_FIXED_SIZE_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Tower types that the LLaVA classes support; other towers, such as Pixtral's, take images of any size."""


def family_of(config: Any) -> Family:
    """Return the family that serves a transformers configuration.

    A vision-language model that is not listed gets ``Unknown`` and a warning that names it: it can be trained, but
    without the savings of shared prompts.

    Raises:
        UnsupportedFamilyError: No family serves it. The message names its ``model_type``, and the supported ones if it
            is no vision-language model.
    """
    for family in _FAMILIES:
        if config.model_type in family.model_types and not _has_other_tower(config, family):
            return family
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    supported = ", ".join(name for family in _FAMILIES for name in family.model_types)
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        _refuse_other_decoders(config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type])
        logger.warning(
            "model_type %r is not one of %s: each completion runs with its own copy of prompt and images",
            config.model_type,
            supported,
        )
        return Unknown()
    raise UnsupportedFamilyError(
        f"model_type {config.model_type!r} is not supported; supported are {supported}, and, more slowly, the "
        "image-text-to-text models of transformers. A family is one class in balcaprl/policy/families.py"
    )


def _has_other_tower(config: Any, family: Family) -> bool:
    return isinstance(family, Llava) and config.vision_config.model_type not in _FIXED_SIZE_TOWERS


_DECODER_INPUTS = ("decoder_input_ids", "encoder_outputs")
_CROSS_ATTENTION = (
    "cross_attention_mask",
    "cross_attention_states",
    "image_attention_mask",
    "image_encoder_embeddings",
)


def _refuse_other_decoders(config: Any, class_name: Any) -> None:
    """Raise UnsupportedFamilyError for a model that does not read prompt, images and completion as one sequence."""
    import transformers

    names = class_name if isinstance(class_name, (list, tuple)) else [class_name]
    inputs: Iterable[str] = inspect.signature(getattr(transformers, names[0]).forward).parameters
    told = f"model_type {config.model_type!r} is not supported: "
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "decoder"))]
    if any(getattr(part, "is_encoder_decoder", False) for part in parts) or any(x in inputs for x in _DECODER_INPUTS):
        raise UnsupportedFamilyError(
            told
            + "its prompt goes through an encoder and its completion through a decoder (encoder-decoder), and a policy here is "
            "one decoder that reads both as one sequence"
        )
    if any(x in inputs for x in _CROSS_ATTENTION):
        raise UnsupportedFamilyError(
            told
            + "its text layers look at the image by cross-attention, and a policy here reads image tokens in its prompt"
        )
