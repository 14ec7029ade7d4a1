"""Merges the adapter of a checkpoint and its base model into one stock folder.

Also checks whether a model is the one that an adapter was trained on. The merged folder needs neither peft nor this
package. Sums are computed in float32 and rounded once to the data type in which the base is stored. The user names the
base model. What the adapter's own files say about it is shown and compared, but never decides what is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from balcaprl.assets import demo_model_path
from balcaprl.checkpoints.checkpoint import digest_of_base, new_folder
from balcaprl.checkpoints.weight_digest import is_of_base
from balcaprl.files.ownership import claim_file, refuse_filled_folder
from balcaprl.logtext import printable
from balcaprl.policy.stock import check_family, load_stock, processor_of_adapter, quiet_peft, with_adapter
from balcaprl.policy.weight_files import (
    ADAPTER_CONFIG,
    ModelFilesError,
    is_adapter,
    model_folder,
    quantisation,
    read_json,
)
from balcaprl.rollout.adapters import has_split_head

logger = logging.getLogger(__name__)

_ADVICE = "Nothing is left of the attempt: make room, or name another folder"


def merge_checkpoint(checkpoint: str | Path, out: Path, base: str | Path | None) -> None:
    """Write a stock transformers folder of a base with a checkpoint's adapter merged in.

    Args:
        checkpoint: a folder in which a run, or peft, saved a LoRA adapter; or a hub id.
        out: the folder to write; it must be absent or empty. Afterwards it is complete, or nothing was written.
        base: the model that the adapter belongs to: a folder, a hub id, or ``demo``.

    Raises:
        ModelFilesError: ``checkpoint`` holds no adapter, ``base`` is not the adapter's model or is quantised, or either
            of the two is damaged.
        ValueError: ``base`` is None.
        ForeignPathError, PathInUseError: ``out`` holds something, or another process writes it.
        SaveError: the disk is full or cannot be written.
    """
    out = out.resolve()
    refuse_filled_folder(out, option="OUT")
    adapter = model_folder(checkpoint, accept=check_family, option="CHECKPOINT")
    if not is_adapter(adapter):
        raise ModelFilesError(
            f"{adapter} holds a whole model: it is a stock transformers folder already, and there is nothing to merge"
        )
    if base is None:
        raise ValueError(
            f"{adapter} holds an adapter alone: name the model that it belongs to with --base, a folder or a hub id "
            f"({_says(adapter)}, which is not followed)"
        )
    with claim_file(out, option="OUT"):
        model, processor = merged_model(adapter, demo_model_path() if str(base) == "demo" else base)
        with new_folder(out, out.with_name(f".{out.name}.balcaprl-partial"), _ADVICE) as partial:
            model.save_pretrained(partial)
            processor.save_pretrained(partial)


def merged_model(adapter: Path, base: str | Path) -> tuple[Any, Any]:
    """The stock model with an adapter merged in, in the data types of ``base``, and its processor.

    ``adapter`` is a folder that ``model_folder`` has checked.

    Raises:
        ModelFilesError: for the reasons of ``merge_checkpoint``.
    """
    folder = model_folder(base, accept=check_family, option="--base")
    if is_adapter(folder):
        raise ModelFilesError(f"--base: {folder} holds an adapter too: merge that one into its own base first")
    method = quantisation(folder)
    if method is not None:
        raise ModelFilesError(
            f"--base: {folder} is quantised ({printable(method)}), and a sum with the adapter could not be stored in it: give "
            "the model in 16 or 32 bits"
        )
    model, processor = load_stock(folder, "auto", "sdpa")
    processor = processor_of_adapter(adapter, model, processor)
    stored = {name: tensor.dtype for name, tensor in _tensors(model)}
    dtype = model.dtype
    adapted = with_adapter(model.float(), adapter)
    refuse_other_base(adapted.get_base_model(), adapter, str(base))
    merged = merge_adapter(adapted)
    with torch.no_grad():
        for name, tensor in _tensors(merged):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(stored.get(name, dtype))
    return merged, processor


def merge_adapter(adapted: Any) -> Any:
    """Add the active adapter of a peft model to the weights beneath it, in place, and return the stock model.

    If head and embedding are tied and the adapter changes at least one of them, they get separate weights.

    Raises:
        ModelFilesError: the adapter holds values that are not finite, or a bias for a layer that has none.
    """
    stock = adapted.get_base_model()
    if has_split_head(stock):
        _untie(stock)
    try:
        with quiet_peft():
            return adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:  # raised by peft
        raise ModelFilesError(f"the adapter cannot be merged: {error}") from error


def refuse_other_base(model: nn.Module, checkpoint: Path, base: str) -> None:
    """Refuse a model that the adapter of a checkpoint was not trained on; log a warning if that cannot be decided.

    Args:
        model: the stock model, which may carry the adapter. A model that is not in float32 is never refused, because a
            difference may come from rounding.
        checkpoint: folder that holds the adapter.
        base: name of the model in messages, as the user wrote it.

    Raises:
        ModelFilesError: the weights differ from those that the adapter was trained on.
    """
    digest = digest_of_base(checkpoint)
    if digest is None:
        logger.warning(
            "%s does not tell whether it belongs to %s: only names and shapes of its tensors are compared (%s)",
            checkpoint,
            base,
            _says(checkpoint),
        )
    elif not is_of_base(model, digest):
        if any(parameter.dtype is not torch.float32 for parameter in model.parameters()):
            logger.warning("%s: in 16 bits it cannot be told whether its adapter belongs to %s", checkpoint, base)
            return
        raise ModelFilesError(
            f"{checkpoint}: its adapter was trained on another model than {base}: the weights beneath it differ "
            f"({_says(checkpoint)})"
        )


def _says(adapter: Path) -> str:
    """Text for messages: how the adapter's own configuration names its base."""
    config = read_json(adapter / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return f"{ADAPTER_CONFIG} says {printable(repr(name))[:200]}" if name else f"{ADAPTER_CONFIG} names none"


def _untie(stock: Any) -> None:
    """Give a tied head and embedding separate weights, so that an adapter on one of them can be merged."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in stock.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    for _, *others in owners.values():
        for module, name in others:
            weight = getattr(module, name)
            setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    stock.config.tie_word_embeddings = False
    stock.config.get_text_config().tie_word_embeddings = False


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
