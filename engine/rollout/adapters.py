"""Serves policies that train adapters (LoRA, by peft): the engine runs the base model with the adapters merged in.

Frozen weights are shared with the engine, as in ``weights.py``. For an adapted matrix the trainer keeps the base, and
the engine keeps base + adapter. A sync recomputes that sum, writes it into the engine's tensor, and copies the weights
that cannot be shared. The engine needs no support for adapters and pays nothing for them while sampling. This works for
every layer that peft can adapt, including those of the image tower. peft itself is never imported: its layers are
recognised by their attributes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from balcaprl.policy.head import adapter_delta, is_more_than_a_matrix
from balcaprl.rollout.weights import Part, StaleWeightsError, WeightPlan, copy_all

_ADAPTER_PARTS = re.compile(r"\.lora_\w+\.|\.lora_embedding_[AB]\.|\.original_module\.")
_WRAPPERS = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")


def served_name(name: str) -> str | None:
    """Return the stock model's name for a parameter; None for parameters that exist only because of an adapter."""
    return None if _ADAPTER_PARTS.search(name) else _WRAPPERS.sub("", name)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every layer that has an adapter, with its name.

    Raises:
        ValueError: an adapter does more than add a matrix (DoRA, biases).
    """
    for name, module in model.named_modules():
        if not (hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")):
            continue
        if is_more_than_a_matrix(module):
            raise ValueError(f"model: the adapter of {name} is more than an added matrix (DoRA, bias); use plain LoRA")
        yield name, module


def delta_of(module: Any) -> Tensor | None:
    """Sum what the active adapters add to a layer's weight, without gradient; None if they add nothing."""
    delta = adapter_delta(module)
    return None if delta is None else delta.detach()


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the stock model's tensors by stock name, with adapters merged in; tensors without any are not copied."""
    tensors = {served_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
    deltas = {f"{served_name(f'{name}.weight')}": delta_of(module) for name, module in adapted_modules(model)}
    return {
        name: tensor if deltas.get(name) is None else tensor + deltas[name].to(tensor.dtype)  # type: ignore[union-attr]
        for name, tensor in tensors.items()
        if name is not None
    }


def has_split_head(model: nn.Module) -> bool:
    """Whether head and embedding are tied in the stock model but differ because one of them has an adapter."""
    config: Any = model.config
    tied = config.tie_word_embeddings or config.get_text_config().tie_word_embeddings
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    return bool(tied) and any(hasattr(end, "base_layer") or hasattr(end, "modules_to_save") for end in ends)


class AdapterMerge:
    """Strategy ``adapter``: frozen weights are shared, and adapted ones are merged; see the module's docstring."""

    name = "adapter"

    def __init__(self, plan: WeightPlan, model: nn.Module, *, share_trained: bool) -> None:
        """Share the weights that can be shared, and merge the adapters for the first time.

        Args:
            plan: the plan for all parameters of ``model``.
            model: the stock model with its adapters.
            share_trained: also share weights that are trained in addition to the adapters; otherwise they are copied.
        """
        self._plan = plan
        self._adapted = {f"{name}.base_layer.weight": module for name, module in adapted_modules(model)}
        self._shared: dict[str, int] = {}
        self._copied: list[str] = []
        for name in plan.parts:
            if name in self._adapted:
                continue
            parameter, alias = plan.parameters[name], plan.alias(name)
            same_kind = alias is not None and alias.dtype == parameter.dtype and alias.device == parameter.device
            if alias is not None and same_kind and (share_trained or not parameter.requires_grad):
                parameter.data = alias
                self._shared[name] = alias.data_ptr()
            else:
                self._copied.append(name)
        self.push(0)

    @torch.no_grad()
    def push(self, policy_version: int) -> tuple[int, int]:
        """Merge the adapters again, and copy what is not shared. See ``SyncStrategy``."""
        for name, address in self._shared.items():
            if self._plan.parameters[name].data_ptr() != address:
                raise StaleWeightsError(f"{name} no longer lies in the engine's memory; change weights in place only")
        self._plan.check_storage()
        num_bytes = 0
        for name in (*self._adapted, *self._copied):
            if name in self._plan.parts:
                num_bytes += self._write(name)
        return len(self._adapted) + len(self._copied), num_bytes

    def detach(self, *, copy: bool) -> None:
        """Give shared parameters their own memory if ``copy`` asks for it. See ``SyncStrategy``."""
        if copy:
            for name in self._shared:
                self._plan.parameters[name].data = self._plan.parameters[name].detach().clone()

    def _write(self, name: str) -> int:
        """Write the trainer's value of one parameter into the engine; returns the number of bytes written."""
        value = self._plan.parameters[name].detach()
        delta = delta_of(self._adapted[name]) if name in self._adapted else None
        if delta is not None:
            value = (value + delta.to(value.dtype)).contiguous()
        parts: list[Part] = self._plan.parts[name]
        sources = [part.source(value) for part in parts]
        copy_all([part.target for part in parts], sources)
        for part, source in zip(parts, sources, strict=True):
            place = tuple(size // 2 for size in part.shape)
            if part.target[place].item() != source[place].to(part.target.dtype).item():
                raise StaleWeightsError(f"the engine still holds old values for {name}: the sync did not reach it")
        return sum(part.target.numel() * part.target.element_size() for part in parts)
