"""The policy: a stock transformers vision-language model with the four calls that training needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balcaprl.kernels import linear_logprobs
from balcaprl.policy.families import Family, family_of
from balcaprl.policy.packing import Group, PackedBatch, check_group, pack_rows
from balcaprl.torchvision_compat import ensure_importable
from balcaprl.types import Prompt, Sample

_NOT_IMAGE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Policy:
    """A vision-language model, its processor, and what its family needs.

    The model stays a stock transformers model in evaluation mode (there is no dropout to switch off, and its gradients
    flow all the same), held in ``model``; optimisers take ``model.parameters()``. Make one with ``from_pretrained`` or
    ``from_model``.
    """

    def __init__(self, model: Any, processor: Any, family: Family) -> None:
        """Use ``from_pretrained`` or ``from_model``."""
        self.model = model.eval()
        self.processor = processor
        self.family = family

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "auto",
        attention: str = "sdpa",
        freeze_vision: bool = False,
    ) -> Policy:
        """Load a stock checkpoint.

        Args:
            path_or_id: A transformers folder or hub id.
            dtype: Of the weights, as a torch dtype or its name.
            device: ``auto`` takes the first CUDA device, else the CPU.
            attention: transformers' attention implementation.
            freeze_vision: Keep the image tower fixed (its projection into the text model stays trainable).

        Raises:
            UnsupportedFamilyError: For a family that ``families.py`` does not know.
            ValueError: For a dtype that torch does not have.
        """
        ensure_importable()
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        family_of(AutoConfig.from_pretrained(path_or_id))
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path_or_id, dtype=_torch_dtype(dtype), attn_implementation=attention
        )
        processor = AutoProcessor.from_pretrained(path_or_id)
        return cls.from_model(model.to(_torch_device(device)), processor, freeze_vision=freeze_vision)

    @classmethod
    def from_model(cls, model: Any, processor: Any, *, freeze_vision: bool = False) -> Policy:
        """Wrap a stock model that is already in memory; it is used, not copied.

        Raises:
            UnsupportedFamilyError: For a family that ``families.py`` does not know.
        """
        family = family_of(model.config)
        if freeze_vision:
            for module in family.vision_modules(model):
                module.requires_grad_(False)
        return cls(model, processor, family)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.lm_head_weight.dtype

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def lm_head_weight(self) -> Tensor:
        """The head (V, D); the embedding itself where the two are tied."""
        return self.model.get_output_embeddings().weight

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that samplers must ban: image, video, and the marks around them."""
        return self.family.banned_token_ids(self.model.config)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: those of the generation config, else of the text model, else the tokenizer's."""
        candidates = (
            self.model.generation_config.eos_token_id,
            self.model.config.get_text_config().eos_token_id,
            self.tokenizer.eos_token_id,
        )
        for ids in candidates:
            if ids is not None:
                return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
        raise ValueError("the checkpoint names no end-of-sequence id: set eos_token_id in generation_config.json")

    @property
    def pad_token_id(self) -> int:
        """Fills rows; never attended to."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_token_ids[0])

    def count_tokens(self, text: str) -> int:
        """Length of a text in the policy's tokens, without special ones."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prepare(self, sample: Sample) -> Prompt:
        """Apply the chat template and the processor, once for the whole life of the prompt.

        Raises:
            ImageError: From ``sample.load_image``.
        """
        image = sample.load_image()
        content = [{"type": "image"}, {"type": "text", "text": sample.instruction}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # Some templates begin with the start token themselves; the tokenizer must not add it again.
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos and text.startswith(bos))
        inputs = self.processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=add_special_tokens)
        image_inputs = {key: value for key, value in inputs.items() if key not in _NOT_IMAGE_INPUTS}
        return Prompt(sample, inputs["input_ids"][0], image_inputs, image, text)

    def pack(self, groups: Sequence[Group]) -> PackedBatch:
        """Lay groups out for the forward pass, on the policy's device.

        Raises:
            ValueError: For no groups, wrong shapes or dtypes, or images that do not match their prompt.
        """
        if not groups:
            raise ValueError("pack needs at least one group")
        config = self.model.config
        image_token_id = self.family.image_token_id(config)
        for index, group in enumerate(groups):
            check_group(index, group, image_token_id, self.family.num_image_tokens(config, group.image_inputs))
        positions = [self.prompt_positions(group.prompt_ids, group.image_inputs) for group in groups]
        return pack_rows(groups, positions, image_token_id, self.pad_token_id, self.device)

    def prompt_positions(self, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """Rotary positions (A, P) of a prompt (P,), on the CPU."""
        on_cpu = {key: value.cpu() for key, value in image_inputs.items() if key != "pixel_values"}
        return self.family.prompt_positions(self.model, prompt_ids.cpu(), on_cpu)

    def embed(self, tokens: Tensor, image_index: Tensor, feature_index: Tensor, image_inputs: dict) -> Tensor:
        """Embeddings (N, L, D) of rows of tokens (N, L), image features in place.

        ``image_index`` (I,) are the placeholders in the flattened rows, ``feature_index`` (I,) the feature of each.
        The image tower runs once per image, however many rows share it.
        """
        embeds = self.model.get_input_embeddings()(tokens)
        if not image_index.numel():
            return embeds
        features = self.family.image_features(self.model, image_inputs).to(embeds.dtype)
        flat = embeds.flatten(0, 1).index_copy(0, image_index, features[feature_index])
        return flat.view_as(embeds)

    def hidden_states(self, packed: PackedBatch) -> Tensor:
        """Last hidden states (T, D) at the positions that predict each completion token; differentiable."""
        if not packed.num_targets:
            return self.lm_head_weight[:0]
        output = self.model.model.language_model(
            inputs_embeds=self.embed(packed.tokens, packed.image_index, packed.feature_index, packed.image_inputs),
            position_ids=self.family.position_ids(packed.positions),
            attention_mask=packed.attention_mask,
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)[packed.predict_index]

    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_banned: bool = False) -> Tensor:
        """Log-probabilities (T,) of the completion tokens; differentiable.

        Args:
            packed: From ``pack``.
            temperature: Divides the logits.
            exclude_banned: Of the distribution that samplers draw from, from which ``image_token_ids`` are removed. The
                difference is -log(1 - their probability): nothing for a trained captioner, not for random weights.
        """
        hidden, weight = self.hidden_states(packed), self.lm_head_weight
        logprobs = linear_logprobs(hidden, weight, packed.targets, temperature=temperature).logprobs
        if not exclude_banned:
            return logprobs
        return logprobs - torch.log1p(-self._banned_mass(hidden, packed.targets, logprobs, temperature))

    def _banned_mass(self, hidden: Tensor, targets: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
        """Probability (T,) of all banned ids together; the softmax's normaliser follows from the targets' own."""
        weight = self.lm_head_weight
        banned = hidden @ weight[list(self.image_token_ids)].T / temperature
        log_normalizer = (hidden * weight[targets]).sum(-1) / temperature - logprobs
        return (banned - log_normalizer[:, None]).exp().sum(-1)

    def save(self, folder: str | Path) -> None:
        """Write a stock checkpoint folder: safetensors, configuration, generation config, processor, tokenizer."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or its name, such as float32 or bfloat16; got {dtype!r}")
    return found


def _torch_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
