"""The policy: a stock transformers vision-language model that also makes prompts, batches and log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from balcaprl.policy.agreement import check_agreement
from balcaprl.policy.families import Family, Unknown
from balcaprl.policy.forward import last_hidden_states
from balcaprl.policy.head import Head, LogitRule, head_module, known_ids
from balcaprl.policy.layers.attention import checkpointing, enable_checkpointing, register, sharing_obstacle
from balcaprl.policy.layers.fused import fuse_layers, unfuse_layers
from balcaprl.policy.layers.tower import is_frozen
from balcaprl.policy.packing import (
    Group,
    PackedBatch,
    check_group,
    check_same_dtypes,
    is_per_token,
    label,
    pack_rows,
    pack_shared,
)
from balcaprl.policy.parts import saved_tokens
from balcaprl.policy.record_text import RecordText
from balcaprl.policy.registry import family_of
from balcaprl.policy.stock import (
    check_family,
    load_stock,
    processor_of_adapter,
    quiet_peft,
    torch_device,
    torch_dtype,
    with_adapter,
)
from balcaprl.policy.weight_files import is_adapter, model_folder
from balcaprl.types import Prompt, PromptError, Sample

logger = logging.getLogger(__name__)

_NOT_IMAGE_INPUTS = ("input_ids", "attention_mask", "labels")
Sharing = Literal["auto", "shared", "repeated"]
"""Whether a group's prompt goes through the model once (``shared``) or once per completion (``repeated``)."""
MIN_SAVING = 1.3
"""Smallest ratio of ``saved_tokens`` at which ``auto`` shares prompts. Below it, the many small attention calls of a
packed batch cost about as much as sharing saves. This holds for the demo's model on one CPU core, where attention takes
the largest share of the time."""


class Policy:
    """A vision-language model, its processor, and what its family needs.

    ``model`` stays a stock transformers model in evaluation mode, which disables dropout but not gradients. Optimisers
    take ``model.parameters()``. A peft model is used as it is, because its adapters act inside the stock model. Make a
    policy with ``from_pretrained`` or ``from_model``.
    """

    def __init__(self, model: Any, processor: Any, family: Family) -> None:
        """Store the parts without checking them; use ``from_pretrained`` or ``from_model`` instead."""
        self.model = model.eval()
        self.processor = processor
        self.family = family
        self.autocast_dtype: torch.dtype | None = None
        self.logit_rule = LogitRule()
        self._obstacle: str | None = None
        self._ids: tuple[Any, tuple[int, tuple[int, ...]]] = (None, (0, ()))
        register()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "auto",
        attention: str = "sdpa",
        freeze_vision: bool = False,
        fused_layers: bool = True,
        base: str | Path | None = None,
        verify: bool = True,
    ) -> Policy:
        """Load a stock checkpoint, only from safetensors files and without any code that comes with it.

        Args:
            path_or_id: A transformers folder or hub id; or, together with ``base``, a folder in which peft saved an
                adapter.
            dtype: Data type of the weights, as a torch dtype or its name.
            device: Device of the weights; ``auto`` takes the first CUDA device, or the CPU if there is none.
            attention: Name of transformers' attention implementation.
            freeze_vision: Keep the image tower fixed (its projection into the text model stays trainable).
            fused_layers: Run layers on faster code where it computes the same; see ``layers/fused.py``.
            base: The model that an adapter belongs to; the base named in the adapter's own files is ignored.
            verify: Also compare the files with the manifest, if the folder has one.

        Raises:
            UnsupportedFamilyError: ``families.py`` does not support the model, or the model is not a single decoder.
            PolicyMismatchError: The policy would not compute what the model computes; see ``from_model``.
            ModelFilesError: The folder is damaged or holds what must not be loaded, or the hub cannot be reached.
            ValueError: torch has no such dtype, or an adapter comes without ``base``.
        """
        weights_dtype, weights_device = torch_dtype(dtype), torch_device(device)
        folder = model_folder(path_or_id, verify=verify, accept=check_family)
        if is_adapter(folder):
            if base is None:
                raise ValueError(f"{folder} holds an adapter alone: name the model that it belongs to (model.path)")
            stock = cls.from_pretrained(base, dtype=dtype, device=device, attention=attention)
            model: Any = with_adapter(stock.model, folder)
            processor = processor_of_adapter(folder, stock.model, stock.processor)
        else:
            model, processor = load_stock(folder, weights_dtype, attention)
        model.to(weights_device)
        return cls.from_model(model, processor, freeze_vision=freeze_vision, fused_layers=fused_layers)

    @classmethod
    def from_model(
        cls, model: Any, processor: Any, *, freeze_vision: bool = False, fused_layers: bool = True
    ) -> Policy:
        """Wrap a stock model that is already in memory, without copying it; arguments are as for ``from_pretrained``.

        Raises:
            UnsupportedFamilyError: ``families.py`` does not support the model, or the model is not a single decoder.
            PolicyMismatchError: The policy does not compute what the model itself computes, or the chat template does
                not show the model its image. The message says how, and what may cause it.
        """
        policy = cls(model, processor, family_of(model.config))
        if freeze_vision:
            for module in policy.family.vision_modules(policy.stock_model):
                module.requires_grad_(False)
        if fused_layers:
            fuse_layers(policy.stock_model)
        check_agreement(policy)
        return policy

    @property
    def stock_model(self) -> Any:
        """The transformers model itself, without the peft model that may be wrapped around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def text_model(self) -> Any:
        """The decoder, which runs on embeddings."""
        return self.family.text_model(self.stock_model)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.lm_head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.lm_head_weight.dtype

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; for models without images, the processor itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def lm_head_weight(self) -> Tensor:
        """The head's own weight (V, D) without adapters, shared by tied embeddings; use ``head`` to compute logits."""
        return self.model.get_output_embeddings().weight

    @property
    def head(self) -> Head:
        """The head that turns hidden states into log-probabilities over all V rows, as the model itself does."""
        return Head(head_module(self.model), self.logit_rule, self.lm_head_weight.shape[0])

    @property
    def sampled_head(self) -> Head:
        """``head`` without the padding rows; this distribution is sampled from and trained."""
        return Head(head_module(self.model), self.logit_rule, self.num_tokens)

    @property
    def num_parameters(self) -> int:
        """Number of all parameters, with tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids of image and video tokens and of the marks around them, which ask for images that are not there."""
        return self.family.banned_token_ids(self.model.config)

    @property
    def num_tokens(self) -> int:
        """The tokenizer's highest id plus 1, at most V; head rows from this one on are padding, never sampled."""
        return min(self._known_ids[0], self.lm_head_weight.shape[0])

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """All ids that samplers must ban: ``image_token_ids`` and the ids without a token."""
        padding = range(self.num_tokens, self.lm_head_weight.shape[0])
        return tuple(sorted({*self.image_token_ids, *self._known_ids[1], *padding}))

    @property
    def _known_ids(self) -> tuple[int, tuple[int, ...]]:
        tokenizer = self.tokenizer
        if self._ids[0] is not tokenizer:  # cached, because reading a whole vocabulary is slow
            self._ids = tokenizer, known_ids(tokenizer)
        return self._ids[1]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: from the generation config, else the text model, else the tokenizer.

        All samplers stop at these ids and at no others.
        """
        candidates = (
            self.model.generation_config.eos_token_id,
            self.model.config.get_text_config().eos_token_id,
            self.tokenizer.eos_token_id,
        )
        for ids in candidates:
            if ids is not None and ids != []:
                return tuple(map(int, ids)) if isinstance(ids, (list, tuple)) else (int(ids),)
        raise ValueError("the checkpoint names no end-of-sequence id: set eos_token_id in generation_config.json")

    @property
    def pad_token_id(self) -> int:
        """Id that fills rows; it is never attended to."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_token_ids[0])

    def count_tokens(self, text: str) -> int:
        """Count the policy's tokens in a text, without special tokens."""
        return self.record_text.count_tokens(text)

    @cached_property
    def record_text(self) -> RecordText:
        """The object that finds control tokens in dataset text and counts the text's tokens."""
        return RecordText(self.processor, self.tokenizer)

    def prepare(self, sample: Sample) -> Prompt:
        """Make a prompt from a sample with the chat template and the processor; this runs once per prompt.

        Raises:
            ImageError: ``sample.load_image`` cannot load the image.
            PromptError: The instruction contains a control token.
        """
        token = self.record_text.control_token(sample.instruction)
        if token is not None:
            raise PromptError(f"its instruction holds the control token {token!r}")
        image = sample.load_image()
        text, inputs = self.process(image, sample.instruction)
        prompt_ids = inputs["input_ids"][0]
        return Prompt(sample, prompt_ids, self.image_inputs(prompt_ids, inputs), image, text)

    def process(self, image: Any, instruction: str) -> tuple[str, Mapping[str, Any]]:
        """Return the chat-templated text, and the processor's outputs for this text and the image, ids included."""
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # Some templates already begin with the start token; the tokenizer must not add a second one.
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos and text.startswith(bos))
        return text, self.processor(
            text=[text], images=[image], return_tensors="pt", add_special_tokens=add_special_tokens
        )

    def image_inputs(self, prompt_ids: Tensor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Select the processor's outputs that a prompt (P,) keeps besides its ids.

        Per-token inputs are dropped for a known family, whose class makes them itself; any other family keeps them with
        the images.
        """
        kept = {key: value for key, value in inputs.items() if key not in _NOT_IMAGE_INPUTS}
        if not self.family.is_known:
            return kept
        return {key: value for key, value in kept.items() if not is_per_token(key, value, len(prompt_ids))}

    def pack(self, groups: Sequence[Group], sharing: Sharing = "auto") -> PackedBatch:
        """Pack groups into one batch for the forward pass, on the policy's device.

        Args:
            groups: At least one group.
            sharing: ``auto`` shares prompts if the model can and ``saved_tokens`` is at least ``MIN_SAVING``.

        Raises:
            ValueError: There are no groups, a shape or dtype is wrong, images do not match their prompt, a sequence
                exceeds the model's context, or ``shared`` is asked for and the model cannot share prompts. The message
                names the group where one is at fault.
        """
        if not groups:
            raise ValueError("pack needs at least one group")
        config, family = self.model.config, self.family
        image_token_id = family.image_token_id(config)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        for index, group in enumerate(groups):
            check_group(index, group, image_token_id, self._num_image_tokens(index, group), context)
        check_same_dtypes(groups)
        shares = self._shares(groups, sharing)
        positions = [self.prompt_positions(group.prompt_ids, group.image_inputs) for group in groups]
        if shares:
            packed = pack_shared(groups, positions, image_token_id, self.device)
        else:
            extend = self._whole_inputs if isinstance(family, Unknown) else None
            packed = pack_rows(groups, positions, image_token_id, self.pad_token_id, self.device, extend=extend)
        return replace(packed, image_inputs=family.prepared_images(self.stock_model, packed.image_inputs))

    def _whole_inputs(self, group: Group, length: int) -> dict[str, Tensor]:
        assert isinstance(self.family, Unknown)
        return self.family.whole_inputs(self.stock_model, group.prompt_ids, group.image_inputs, length)

    def shares_prompts(self, prompts: Sequence[int], completions: Sequence[Sequence[int]], sharing: Sharing) -> bool:
        """Whether groups of these lengths are packed with each prompt once.

        If the model cannot share prompts, one warning says why.

        Args:
            prompts: Length of each group's prompt, in tokens.
            completions: Lengths of each group's completions, in tokens, without empty ones.
            sharing: The layout that is asked for.

        Raises:
            ValueError: ``shared`` is asked for and the model cannot share prompts.
        """
        if sharing == "repeated":
            return False
        longest = max((p + max(c, default=0) for p, c in zip(prompts, completions, strict=True)), default=0)
        obstacle = self.sharing_obstacle(longest)
        if obstacle is not None and sharing == "shared":
            raise ValueError(f"sharing: model_type {self.model.config.model_type!r} cannot share prompts: {obstacle}")
        if obstacle is not None and obstacle != self._obstacle:
            self._obstacle = obstacle  # logged once, and again only if the obstacle changes
            logger.warning("%s repeats prompts: %s", self.model.config.model_type, obstacle)
        return obstacle is None and (sharing == "shared" or saved_tokens(prompts, completions) >= MIN_SAVING)

    def sharing_obstacle(self, longest: int) -> str | None:
        """Why prompts cannot be shared if the longest sequence has ``longest`` tokens; None if they can be shared."""
        if not self.family.is_known:
            return "its family is not known"
        return sharing_obstacle(self.text_model.config, longest)

    def _shares(self, groups: Sequence[Group], sharing: Sharing) -> bool:
        lengths = [[len(c) for c in group.completions if len(c)] for group in groups]
        return self.shares_prompts([len(group.prompt_ids) for group in groups], lengths, sharing)

    def _num_image_tokens(self, index: int, group: Group) -> int | None:
        try:
            return self.family.num_image_tokens(self.stock_model, group.image_inputs)
        except ValueError as error:
            raise ValueError(f"{label(index, group)}.image_inputs: {error}") from None

    def prompt_positions(self, prompt_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """Compute the rotary positions (A, P) of a prompt (P,), on the CPU."""
        on_cpu = {key: value.cpu() for key, value in image_inputs.items() if key != "pixel_values"}
        return self.family.prompt_positions(self.stock_model, prompt_ids.cpu(), on_cpu)

    def hidden_states(self, packed: PackedBatch) -> Tensor:
        """Compute last hidden states (T, D) at the positions that predict each completion token; differentiable."""
        if not packed.num_targets:
            return self.lm_head_weight[:0]
        with self.autocast(), checkpointing(self.model) if torch.is_grad_enabled() else nullcontext():
            rows = last_hidden_states(self, packed)
        return rows.flatten(0, 1).index_select(0, packed.predict_index)

    def logprobs(
        self,
        packed: PackedBatch,
        temperature: float = 1.0,
        *,
        exclude_banned: bool = False,
        exclude_padding: bool = False,
    ) -> Tensor:
        """Compute the log-probabilities (T,) of the completion tokens; differentiable.

        Args:
            packed: A batch from ``pack``.
            temperature: Number by which the logits are divided.
            exclude_banned: Use the distribution that samplers draw from, without ``banned_token_ids``. The difference
                is -log(1 - their probability): negligible for a trained captioner, but not for random weights.
            exclude_padding: Leave out only the head's padding rows, as an update does; this costs nothing.
        """
        hidden, banned = self.hidden_states(packed), self.banned_token_ids if exclude_banned else ()
        head = self.sampled_head if exclude_padding else self.head
        with self.autocast():
            return head.logprobs(hidden, packed.targets, temperature, banned)

    # ------------------------------------------------------------------------------------------------ how it computes

    def autocast(self) -> AbstractContextManager:
        """Return a context in which matrix products use ``autocast_dtype``, but weights and sums do not.

        The context has no effect where ``autocast_dtype`` is None.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Let ``hidden_states`` keep only the inputs of layers; its backward recomputes the rest."""
        tower = getattr(self.stock_model.config, "vision_config", None)
        enable_checkpointing(self.stock_model, self.text_model.config, *([] if tower is None else [tower]))

    def compile_layers(self) -> None:
        """Compile each decoder layer with ``torch.compile``, for batches of any size.

        The layers get their stock code back first, because the compiler fuses operations itself.
        """
        for layer in self.text_model.layers:
            unfuse_layers(layer)
            layer.compile(dynamic=True)

    def share_frozen_tower(self, other: Policy) -> None:
        """Replace the image tower by the identical, frozen one of ``other``: one copy that runs once per batch.

        Raises:
            ValueError: The tower of ``other`` is trained, or there is none.
        """
        towers = [policy.family.vision_modules(policy.stock_model) for policy in (self, other)]
        if not is_frozen(towers[1]):
            raise ValueError("other: its image tower is trained, or there is none; only a frozen one can be shared")
        shared = dict(zip(map(id, towers[0]), towers[1], strict=True))
        for parent in list(self.stock_model.modules()):
            for name, child in parent._modules.items():
                if id(child) in shared:
                    parent._modules[name] = shared[id(child)]

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Switch the adapters off within the context, which gives the reference policy if only adapters are trained.

        Raises:
            ValueError: ``model`` is not a peft model.
        """
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError("model: it has no adapter to disable; load a frozen copy as reference instead")
        with self.model.disable_adapter():
            yield

    def save(self, folder: str | Path) -> None:
        """Write a stock checkpoint folder: safetensors, configuration, generation config, processor and tokenizer."""
        with quiet_peft():
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
