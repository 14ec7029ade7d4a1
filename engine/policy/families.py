"""What differs between the supported model families: the image call, the positions, and the special ids.

Everything else is the same across transformers: a text model runs on embeddings, and ``get_input_embeddings`` and
``get_output_embeddings`` return the input and output embeddings. A new family needs one new class in this module, and
an entry in ``registry.py``. Methods take the stock model itself, never a peft model around it.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from balcaprl.policy.layers.attention import calling_once_for_segments
from balcaprl.policy.layers.tower_indices import PREFIX, tower_inputs
from balcaprl.policy.packing import is_per_token

logger = logging.getLogger(__name__)


class UnsupportedFamilyError(ValueError):
    """The checkpoint's ``model_type`` is not supported, and is not that of a vision-language model with one decoder."""


class ImageFeatures(NamedTuple):
    """What the text model gets for N image tokens, with all images one after the other."""

    embeds: Tensor
    """Features (N, D), one row per placeholder. Before projection: (N, tower width), or (N, rows, tower width) if
    several tower rows are merged into one token."""
    deepstack: tuple[Tensor, ...] = ()
    """Features shaped like ``embeds``, added to the hidden states after the first decoder layers (Qwen3-VL)."""


_SHORTENED_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Family(ABC):
    """One model family. Methods take the stock transformers model; A is the number of position axes."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """Values of ``config.model_type`` that the family serves."""
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    """Name of the transformers class that loads the family's checkpoints."""
    is_known: ClassVar[bool] = True
    """Whether the text model can run on packed embeddings; otherwise the whole model runs on repeated rows."""
    token_wise_parts: ClassVar[tuple[str, ...]] = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
    """Names, within a decoder layer, of modules that treat each token separately, and whose result affects only that
    token's output; the last layer computes them only for tokens that are read."""

    def text_model(self, model: Any) -> Any:
        """Return the decoder, which runs on embeddings."""
        return model.model.language_model

    def image_token_id(self, config: Any) -> int:
        """Return the id of the placeholder that image features replace; -1 where the model takes no images."""
        return int(config.image_token_id)

    @abstractmethod
    def num_image_tokens(self, model: Any, image_inputs: dict[str, Tensor]) -> int | None:
        """Count the placeholders that the images of one prompt need; None where the number is not known.

        Raises:
            ValueError: The image tensors do not fit together; the message says how.
        """

    @abstractmethod
    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> ImageFeatures:
        """Compute the features of all images, in order."""

    def prepared_images(self, model: Any, image_inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of ``image_features`` with what can be computed from them once, for all uses of a batch.

        Pixels are on the device of the model, sizes on the CPU. ``image_features`` takes inputs and result alike.
        """
        return image_inputs

    @abstractmethod
    def prompt_positions(self, model: Any, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """Compute the positions (A, P) of a prompt (P,). A completion continues at their maximum + 1 on every axis."""

    @abstractmethod
    def position_ids(self, positions: Tensor) -> Tensor:
        """Convert positions (A, rows, length) to the form that the text model takes."""

    @abstractmethod
    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """Return the ids that a completion must never contain: they would ask for images that are not there."""

    def published_name(self, config: Any, name: str) -> str:
        """Return the name by which vLLM knows a parameter: the one in published checkpoints if transformers renamed it.

        transformers 5 dropped one level from the names of CLIP and SigLIP towers, both in memory and in saved files.
        """
        tower = "model.vision_tower."
        kind = getattr(getattr(config, "vision_config", None), "model_type", None)
        lacks = name.startswith(tower) and not name.startswith(f"{tower}vision_model.")
        return f"{tower}vision_model.{name.removeprefix(tower)}" if kind in _SHORTENED_TOWERS and lacks else name

    @abstractmethod
    def vision_modules(self, model: Any) -> list[nn.Module]:
        """Return what ``freeze_vision`` freezes: the image tower, but not its projection into the text model."""

    def projections(self, model: Any) -> list[tuple[nn.Module, str]]:
        """Return (parent, name) of each projection: that for ``ImageFeatures.embeds``, then those for ``deepstack``."""
        return []

    def projected_rows(self, config: Any) -> int:
        """Return how many tower rows a projection merges into one image token."""
        return 1


class QwenVL(Family):
    """Qwen2-VL and Qwen2.5-VL: any image size, three rotary axes (time, height, width)."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_vl")

    def num_image_tokens(self, model: Any, image_inputs: dict[str, Tensor]) -> int:
        """Count the image tokens, one for each merged block of patches. See ``Family``."""
        grid, pixels = image_inputs.get("image_grid_thw"), image_inputs.get("pixel_values")
        if grid is None and pixels is None:
            return 0
        if grid is None or pixels is None:
            raise ValueError("image_grid_thw and pixel_values come together; one of them is missing")
        patches = int(grid.prod(-1).sum())
        if pixels.shape[0] != patches:
            raise ValueError(
                f"image_grid_thw {grid.tolist()} tells of {patches} patches, but pixel_values has {pixels.shape[0]}"
            )
        return patches // self.projected_rows(model.config)

    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> ImageFeatures:
        """Compute the features of all images, with one attention call per segment length. See ``Family``."""
        inputs = self.prepared_images(model, image_inputs)
        with calling_once_for_segments(model.model.visual.config):
            output = model.model.get_image_features(**inputs, return_dict=True)
        deepstack = tuple(torch.cat(list(each)) for each in getattr(output, "deepstack_features", None) or ())
        return ImageFeatures(torch.cat(list(output.pooler_output)), deepstack)

    def prepared_images(self, model: Any, image_inputs: dict[str, Any]) -> dict[str, Any]:
        """Add what the tower would otherwise derive from the grid. See ``Family``."""
        pixels, grid = image_inputs.get("pixel_values"), image_inputs.get("image_grid_thw")
        if pixels is None or grid is None or f"{PREFIX}position_ids" in image_inputs:
            return image_inputs
        return image_inputs | tower_inputs(model.model.visual, grid, pixels.device)

    def prompt_positions(self, model: Any, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """Compute the positions (3, P) with the model's own ``get_rope_index``. See ``Family``."""
        is_image = (prompt_ids == self.image_token_id(model.config)).int()
        grid = image_inputs.get("image_grid_thw")
        positions, _ = model.model.get_rope_index(prompt_ids[None], is_image[None], image_grid_thw=grid)
        return positions[:, 0]

    def position_ids(self, positions: Tensor) -> Tensor:
        """Return the positions (3, rows, length) unchanged. See ``Family``."""
        return positions

    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """Return the ids of image and video tokens and of the marks around them. See ``Family``."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return tuple(sorted({int(getattr(config, name)) for name in names}))

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """Return the tower without its merger, which is the projection and stays trainable. See ``Family``."""
        visual = model.model.visual
        return [visual.patch_embed, visual.blocks]

    def projections(self, model: Any) -> list[tuple[nn.Module, str]]:
        """Return the merger as the only projection. See ``Family``."""
        return [(model.model.visual, "merger")]

    def projected_rows(self, config: Any) -> int:
        """Return the number of rows in one merged block. See ``Family``."""
        return int(config.vision_config.spatial_merge_size) ** 2


class Qwen3VL(QwenVL):
    """Qwen3-VL: like Qwen2.5-VL, with features of inner tower layers added after the first decoder layers."""

    model_types = ("qwen3_vl",)

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """Return the modules of ``QwenVL`` and the tower's position embedding. See ``Family``."""
        return [*super().vision_modules(model), model.model.visual.pos_embed]

    def projections(self, model: Any) -> list[tuple[nn.Module, str]]:
        """Return the merger, then those of the inner tower layers. See ``Family``."""
        mergers = model.model.visual.deepstack_merger_list
        return [*super().projections(model), *((mergers, str(index)) for index in range(len(mergers)))]


class OneAxis(Family):
    """Common base of families whose positions are counted from 0 on one axis."""

    def prompt_positions(self, model: Any, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """Return the positions (1, P), counted from 0. See ``Family``."""
        return torch.arange(prompt_ids.shape[0], device=prompt_ids.device)[None]

    def position_ids(self, positions: Tensor) -> Tensor:
        """Return the positions (rows, length) of the only axis. See ``Family``."""
        return positions[0]


class Llava(OneAxis):
    """LLaVA-1.5: a tower with one fixed image size (CLIP, SigLIP) and one position axis."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def num_image_tokens(self, model: Any, image_inputs: dict[str, Tensor]) -> int:
        """Count the features of all images; each image has equally many. See ``Family``."""
        pixels = image_inputs.get("pixel_values")
        return 0 if pixels is None else pixels.shape[0] * self._tokens_per_image(model)

    def _tokens_per_image(self, model: Any) -> int:
        """Count the features of one image or tile, from the tower's own count, which includes any class feature."""
        rows = int(model.model.vision_tower.embeddings.num_positions)
        return rows - int(model.config.vision_feature_select_strategy == "default")  # "default" drops the first feature

    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> ImageFeatures:
        """Compute the projected features of all images. See ``Family``."""
        output = model.model.get_image_features(
            pixel_values=image_inputs["pixel_values"],
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            return_dict=True,
        )
        return ImageFeatures(torch.cat(list(output.pooler_output)))

    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """Return the image placeholder's id. See ``Family``."""
        return (self.image_token_id(config),)

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """Return the image tower. See ``Family``."""
        return [model.model.vision_tower]

    def projections(self, model: Any) -> list[tuple[nn.Module, str]]:
        """Return the projector as the only projection. See ``Family``."""
        return [(model.model, "multi_modal_projector")]


class LlavaNext(Llava):
    """LLaVA-NeXT: like LLaVA-1.5, on the whole image shrunk to one tile, and on tiles that are cut from it."""

    model_types = ("llava_next",)

    def num_image_tokens(self, model: Any, image_inputs: dict[str, Tensor]) -> int:
        """Count the image tokens with the model's own code for tiles, row ends and cut edges. See ``Family``.

        That code runs on zeros of width 1 in place of the features.
        """
        pixels, sizes = image_inputs.get("pixel_values"), image_inputs.get("image_sizes")
        if pixels is None and sizes is None:
            return 0
        if pixels is None or sizes is None:
            raise ValueError("pixel_values and image_sizes come together; one of them is missing")
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = model.config
        rows, sizes = self._tokens_per_image(model), sizes.cpu()
        tiles = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in sizes
        ]
        _, lengths = model.model.pack_image_features(
            [torch.zeros(count, rows, 1) for count in tiles],
            sizes,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=torch.zeros(1),
        )
        return int(lengths.sum())

    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> ImageFeatures:
        """Compute the projected features of all images and their tiles. See ``Family``."""
        output = model.model.get_image_features(
            pixel_values=image_inputs["pixel_values"],
            image_sizes=image_inputs["image_sizes"],
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            return_dict=True,
        )
        return ImageFeatures(torch.cat(list(output.pooler_output)))


class TextOnly(OneAxis):
    """Llama, Qwen2 and Qwen3 without images."""

    model_types = ("llama", "qwen2", "qwen3")
    auto_class = "AutoModelForCausalLM"

    def text_model(self, model: Any) -> Any:
        """Return the decoder, which is the whole base model here. See ``Family``."""
        return model.model

    def image_token_id(self, config: Any) -> int:
        """Return -1, because there are no images. See ``Family``."""
        return -1

    def num_image_tokens(self, model: Any, image_inputs: dict[str, Tensor]) -> int:
        """Return 0, or raise ValueError for image inputs. See ``Family``."""
        if image_inputs:
            raise ValueError(f"model_type {model.config.model_type!r} takes no images, got {sorted(image_inputs)}")
        return 0

    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> ImageFeatures:
        """Raise ValueError, because there are no images. See ``Family``."""
        raise ValueError(f"model_type {model.config.model_type!r} takes no images")

    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """Return no ids. See ``Family``."""
        return ()

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """Return no modules. See ``Family``."""
        return []


class Unknown(OneAxis):
    """Any other vision-language model of transformers: it runs whole, with a copy of the images for each completion."""

    is_known = False

    def image_token_id(self, config: Any) -> int:
        """Return the placeholder's id under either name that configurations use; -1 without one. See ``Family``."""
        for name in ("image_token_id", "image_token_index"):
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
        return -1

    def num_image_tokens(self, model: Any, image_inputs: dict[str, Tensor]) -> None:
        """Return None: the number is not known, and the model itself checks it. See ``Family``."""

    def whole_inputs(self, model: Any, prompt_ids: Tensor, inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """Make the model inputs, other than ids and mask, for a row (1, length) of a prompt (P,) and a completion.

        Images stay as they are. Per-token inputs are extended over the completion as the model's own ``generate`` does.

        Raises:
            ValueError: The prompt has images but not the ``token_type_ids`` that the model needs with them, or the
                model does not extend one of the per-token inputs in ``generate``.
        """
        per_token = {key: value for key, value in inputs.items() if is_per_token(key, value, len(prompt_ids))}
        images = {key: value for key, value in inputs.items() if key not in per_token}
        parameters = inspect.signature(model.model.forward).parameters
        if "mm_token_type_ids" in parameters and "mm_token_type_ids" not in per_token:
            per_token["mm_token_type_ids"] = (prompt_ids == self.image_token_id(model.config)).int()[None]
        if "token_type_ids" in parameters and "token_type_ids" not in per_token:
            per_token["token_type_ids"] = torch.zeros(1, len(prompt_ids), dtype=torch.long)
            if images:
                raise ValueError(
                    f"model_type {model.config.model_type!r} tells tokens of images by token_type_ids: take all of "
                    "image_inputs from policy.prepare, or put the processor's token_type_ids there"
                )
        one_more = model._update_model_kwargs_for_generation({}, dict(per_token))
        for key, value in per_token.items():
            grown = one_more[key]
            if grown.shape[-1] != value.shape[-1] + 1:
                raise ValueError(
                    f"model_type {model.config.model_type!r} takes {key} for each token, and how that goes on over a "
                    "completion is not known"
                )
            per_token[key] = torch.cat([value, grown[:, -1:].expand(-1, length - value.shape[-1])], 1)
        return images | per_token

    def image_features(self, model: Any, image_inputs: dict[str, Tensor]) -> ImageFeatures:
        """Raise UnsupportedFamilyError: how image features enter the text model is not known. See ``Family``."""
        raise UnsupportedFamilyError(
            f"model_type {model.config.model_type!r}: how images enter its text model is not known; sample with vLLM, or "
            "add a class to balcaprl/policy/families.py"
        )

    def banned_token_ids(self, config: Any) -> tuple[int, ...]:
        """Return every id that the configuration names as an image, video, vision or audio token. See ``Family``."""
        found = set()
        for name, value in config.to_dict().items():
            media = any(kind in name for kind in ("image", "video", "vision", "audio"))
            if media and name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
                found.add(value)
        return tuple(sorted(found))

    def vision_modules(self, model: Any) -> list[nn.Module]:
        """Return the towers under the names that transformers' models use. See ``Family``.

        Raises:
            UnsupportedFamilyError: The model has no tower under any of these names.
        """
        towers = [getattr(model.model, name, None) for name in ("visual", "vision_tower", "vision_model")]
        found = [tower for tower in towers if tower is not None]
        if not found:
            raise UnsupportedFamilyError(
                f"freeze_vision: model_type {model.config.model_type!r} has no image tower under a name that is known"
            )
        return found
