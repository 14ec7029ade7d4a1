"""What differs between the supported model families: the image call, the positions, and the special ids.

Everything else is alike in transformers: ``model.model.language_model`` runs on embeddings, and
``get_input_embeddings`` / ``get_output_embeddings`` name the two ends. Adding a family adds one class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class UnsupportedFamilyError(ValueError):
    """The checkpoint's ``model_type`` is none of the supported ones."""


class Family(ABC):
    """One model family. Methods take the stock transformers model; A is the number of position axes."""

    model_types: ClassVar[tuple[str, ...]]
    """Values of ``config.model_type`` that it serves."""

    def image_token_id(self, config: Any) -> int:
        """Id of the placeholder that an image's features replace."""
        return int(config.image_token_id)

    @abstractmethod
    def num_image_tokens(self, config: Any, image_inputs: dict[str, Tensor]) -> int:
        """Placeholders that the images of one prompt need."""

    @abstractmethod
    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> Tensor:
        """Features (N, D) of all images, in order, one row per placeholder."""

    @abstractmethod
    def prompt_positions(self, model: Any, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """Positions (A, P) of the prompt (P,). A completion goes on at their maximum + 1, alike on all axes."""

    @abstractmethod
    def position_ids(self, positions: Tensor) -> Tensor:
        """Positions (A, rows, length) in the form that the text model takes."""

    @abstractmethod
    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """Ids that a completion must never hold: they would ask for images that are not there."""

    def published_name(self, name: str) -> str:
        """The name that vLLM knows a parameter by: the published checkpoints' where transformers has renamed it."""
        return name

    @abstractmethod
    def vision_modules(self, model: Any) -> list[nn.Module]:
        """What ``freeze_vision`` freezes: the image tower, not the projection into the text model."""


class QwenVL(Family):
    """Qwen2-VL and Qwen2.5-VL: any image size, three rotary axes (time, height, width)."""

    model_types = ("qwen2_5_vl", "qwen2_vl")

    def num_image_tokens(self, config: Any, image_inputs: dict[str, Tensor]) -> int:
        """See ``Family``: every merged block of patches is a token."""
        grid = image_inputs.get("image_grid_thw")
        if grid is None:
            return 0
        return int(grid.prod(-1).sum()) // config.vision_config.spatial_merge_size**2

    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> Tensor:
        """See ``Family``."""
        output = model.model.get_image_features(
            image_inputs["pixel_values"], image_inputs["image_grid_thw"], return_dict=True
        )
        return torch.cat(list(output.pooler_output))

    def prompt_positions(self, model: Any, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """See ``Family``: (3, P), as the model itself counts them."""
        is_image = (prompt_ids == self.image_token_id(model.config)).int()
        grid = image_inputs.get("image_grid_thw")
        positions, _ = model.model.get_rope_index(prompt_ids[None], is_image[None], image_grid_thw=grid)
        return positions[:, 0]

    def position_ids(self, positions: Tensor) -> Tensor:
        """See ``Family``: (3, rows, length)."""
        return positions

    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """See ``Family``: image, video, and the marks around them."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return tuple(sorted({int(getattr(config, name)) for name in names}))

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """See ``Family``. The merger is the projection, and stays trainable."""
        visual = model.model.visual
        return [visual.patch_embed, visual.blocks]


class Llava(Family):
    """LLaVA-1.5: a CLIP tower of one fixed image size, one position axis."""

    model_types = ("llava",)

    def num_image_tokens(self, config: Any, image_inputs: dict[str, Tensor]) -> int:
        """See ``Family``: one per patch, and one for the class feature under the ``full`` strategy."""
        pixels = image_inputs.get("pixel_values")
        if pixels is None:
            return 0
        patch = config.vision_config.patch_size
        extra = int(config.vision_feature_select_strategy == "full")
        return pixels.shape[0] * ((pixels.shape[-2] // patch) * (pixels.shape[-1] // patch) + extra)

    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> Tensor:
        """See ``Family``."""
        output = model.model.get_image_features(
            pixel_values=image_inputs["pixel_values"],
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            return_dict=True,
        )
        return torch.cat(list(output.pooler_output))

    def prompt_positions(self, model: Any, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """See ``Family``: (1, P), counted from 0."""
        return torch.arange(prompt_ids.shape[0], device=prompt_ids.device)[None]

    def position_ids(self, positions: Tensor) -> Tensor:
        """See ``Family``: (rows, length)."""
        return positions[0]

    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """See ``Family``."""
        return (self.image_token_id(config),)

    def published_name(self, name: str) -> str:
        """See ``Family``: transformers 5 dropped a level of CLIP's names, in memory and in what it saves."""
        tower = "model.vision_tower."
        if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
            return f"{tower}vision_model.{name.removeprefix(tower)}"
        return name

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """See ``Family``."""
        return [model.model.vision_tower]


_FAMILIES: tuple[Family, ...] = (QwenVL(), Llava())


def family_of(config: Any) -> Family:
    """The family that serves a transformers configuration.

    Raises:
        UnsupportedFamilyError: Names the ``model_type`` and those that are supported.
    """
    for family in _FAMILIES:
        if config.model_type in family.model_types:
            return family
    supported = ", ".join(name for family in _FAMILIES for name in family.model_types)
    raise UnsupportedFamilyError(
        f"model_type {config.model_type!r} is not supported; supported are {supported}. "
        "A family is one class in balcaprl/policy/families.py"
    )
