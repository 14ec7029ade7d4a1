"""The forward pass over a packed batch: embeddings with image features in their places, then the text model.

A model whose parts are not known runs whole, with a copy of the images for each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balcaprl.policy.families import ImageFeatures
from balcaprl.policy.layers.attention import SHARED_PREFIX, using_attention
from balcaprl.policy.layers.deepstack import adding_at
from balcaprl.policy.layers.last_layer import reading_only
from balcaprl.policy.layers.tower import frozen_tower_features, is_frozen
from balcaprl.policy.packing import PackedBatch

if TYPE_CHECKING:
    from balcaprl.policy.policy import Policy


def last_hidden_states(policy: Policy, packed: PackedBatch) -> Tensor:
    """Run the model on the rows of a packed batch, in its layout; returns last hidden states (N, L, D)."""
    return _by_parts(policy, packed) if policy.family.is_known else _whole(policy, packed)


def text_inputs(
    policy: Policy,
    tokens: Tensor,
    image_index: Tensor,
    feature_index: Tensor,
    image_inputs: dict[str, Tensor],
    tower_cache: dict[Any, ImageFeatures] | None = None,
) -> dict[str, Any]:
    """Make the text model's inputs for rows of tokens (N, L): embeddings (N, L, D), with image features in place.

    Args:
        policy: The policy whose model, of a known family, gets the inputs.
        tokens: LongTensor (N, L): the ids of the rows.
        image_index: LongTensor (I,): places of the placeholders in the flattened rows, ascending.
        feature_index: LongTensor (I,): the feature row of each placeholder. The image tower runs once per image,
            however many rows share the image.
        image_inputs: Image tensors of all images.
        tower_cache: Cache of the tower's output for these images, if they are used more than once: a frozen tower then
            runs only once.
    """
    embeds = policy.model.get_input_embeddings()(tokens)
    if not image_index.numel():
        return {"inputs_embeds": embeds}
    features = _image_features(policy, image_inputs, tower_cache)
    rows = features.embeds.to(embeds.dtype).index_select(0, feature_index)
    inputs = {"inputs_embeds": embeds.flatten(0, 1).index_copy(0, image_index, rows).view_as(embeds)}
    if features.deepstack:
        mask = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device)
        inputs["visual_pos_masks"] = mask.index_fill(0, image_index, True).view_as(tokens)
        inputs["deepstack_visual_embeds"] = [x.index_select(0, feature_index) for x in features.deepstack]
    return inputs


def _image_features(
    policy: Policy, image_inputs: dict[str, Tensor], cache: dict[Any, ImageFeatures] | None
) -> ImageFeatures:
    model, family = policy.stock_model, policy.family
    if cache is not None and family.projections(model) and is_frozen(family.vision_modules(model)):
        return frozen_tower_features(family, model, image_inputs, cache)
    return family.image_features(model, image_inputs)


def _by_parts(policy: Policy, packed: PackedBatch) -> Tensor:
    """Run the text model on embeddings."""
    text_model = policy.text_model
    inputs = text_inputs(
        policy, packed.tokens, packed.image_index, packed.feature_index, packed.image_inputs, packed.tower_cache
    )
    inputs |= {"position_ids": policy.family.position_ids(packed.positions), "use_cache": False}
    with adding_at(text_model, packed.image_index):
        if packed.prefix_layout is None:
            return text_model(**inputs, attention_mask=packed.attention_mask).last_hidden_state
        reading = reading_only(text_model.layers[-1], policy.family.token_wise_parts, packed.read)
        with using_attention(text_model.config, SHARED_PREFIX), reading:
            return text_model(**inputs, attention_mask=None, prefix_layout=packed.prefix_layout).last_hidden_state


def _whole(policy: Policy, packed: PackedBatch) -> Tensor:
    """Run a model whose parts are not known, with a copy of the images for each row."""
    assert packed.attention_mask is not None  # unknown families always get the repeated layout
    model, parts, begin = policy.stock_model.model, [], 0
    for block in packed.blocks:
        rows = slice(begin, begin + block.num_rows)
        tokens, mask = packed.tokens[rows], packed.attention_mask[rows]
        output = model(input_ids=tokens, attention_mask=mask, use_cache=False, **block.inputs)
        parts.append(output.last_hidden_state)
        begin = rows.stop
    return torch.cat(parts)
