"""Loads stock models and adapters from checked folders, and checkpoints into a policy that is already in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file

from balcaprl.policy.families import UnsupportedFamilyError
from balcaprl.policy.registry import family_of
from balcaprl.policy.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PROCESSOR_CONFIG,
    ModelFilesError,
    check_folder,
    is_adapter,
    read_json,
)
from balcaprl.torchvision_compat import ensure_importable

if TYPE_CHECKING:
    from balcaprl.policy.policy import Policy

_PLAIN_INITS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that leave the model's own weights unchanged."""

_HARMLESS_OF_PEFT = (
    "The PEFT config's `base_model_name_or_path` was renamed",  # refuse_other_base compares the weights instead
    "Model has `tie_word_embeddings=True` and a tied layer",  # merging unties them, and only safetensors are written
    "Setting `save_embedding_layers` to `True`",  # wanted: stock peft then opens the checkpoint
    "Adapter .* have invalid shape",  # true of every lora_bias; a shape that differs from the policy's is refused
)
"""Regular expressions for the beginnings of those peft warnings that ask nothing of a user of this package."""


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a torch dtype that may be given by its name.

    Raises:
        ValueError: torch has no such dtype.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or its name, such as float32 or bfloat16; got {dtype!r}")
    return found


def torch_device(device: str | torch.device) -> torch.device:
    """Return a torch device; ``auto`` is the first CUDA device, or the CPU if there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def check_family(folder: Path) -> None:
    """Refuse a folder whose configuration belongs to no supported family, before its weights are looked at.

    Raises:
        UnsupportedFamilyError: The configuration belongs to no supported family.
        ModelFilesError: transformers cannot read the configuration.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        ensure_importable()
        import transformers

        with _told_of(folder):
            family_of(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))


def load_stock(folder: Path, dtype: torch.dtype | Literal["auto"], attention: str) -> tuple[Any, Any]:
    """Load model and processor from a folder that ``weight_files.model_folder`` has checked.

    The ``dtype`` "auto" keeps the dtype of the folder's files.

    Raises:
        UnsupportedFamilyError: ``families.py`` does not support the model.
        ModelFilesError: The libraries cannot load the folder as a model, tensors are missing, or the tokenizer has more
            ids than the model embeds.
    """
    ensure_importable()
    import transformers

    with _told_of(folder):
        family = family_of(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
        model, loading = getattr(transformers, family.auto_class).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelFilesError(
            f"{folder}: {len(missing)} tensors are missing from the weights: {', '.join(missing[:5])}"
        )
    _refuse_more_ids(folder, processor, model)
    return model, processor


def processor_of_adapter(folder: Path, model: Any, of_base: Any) -> Any:
    """Return the processor saved beside an adapter, with which it was trained; without one, the base's processor.

    Raises:
        ModelFilesError: The saved processor cannot be loaded, or does not fit the model.
    """
    import transformers

    path = folder / PROCESSOR_CONFIG
    plain = read_json(path) if path.is_file() else None
    if not isinstance(plain, dict) or "processor_class" not in plain:
        return of_base
    with _told_of(folder, "has a processor that cannot be loaded"):
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if type(processor) is not type(of_base):
        kinds = (type(processor).__name__, type(of_base).__name__)
        raise ModelFilesError(f"{folder}: its processor is a {kinds[0]}, and that of its base a {kinds[1]}")
    _refuse_more_ids(folder, processor, model)
    return processor


def _refuse_more_ids(folder: Path, processor: Any, model: Any) -> None:
    num_ids, num_rows = len(getattr(processor, "tokenizer", processor)), model.get_input_embeddings().weight.shape[0]
    if num_ids > num_rows:
        raise ModelFilesError(
            f"{folder}: the tokenizer has {num_ids} ids and the model embeds {num_rows}: they do not belong together"
        )


def with_adapter(model: Any, folder: Path) -> Any:
    """Add the LoRA adapter of a checked folder to the stock model, ready for further training; needs peft.

    Raises:
        ModelFilesError: The adapter is of another kind, or belongs to another model.
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{folder} holds an adapter, which needs peft: install the extra lora") from error
    plain = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(plain, dict) or plain.get("peft_type") != "LORA":
        raise ModelFilesError(f"{folder}: {ADAPTER_CONFIG} is of no LoRA adapter (peft_type)")
    if plain.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ModelFilesError(
            f"{folder}: an adapter begun by {plain['init_lora_weights']} changes the model beneath it; merge it with peft first"
        )
    with _told_of(folder), quiet_peft():
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        adapted = peft.get_peft_model(model, config)
    load_adapter(adapted, folder)
    return adapted


def load_adapter(model: Any, folder: Path) -> None:
    """Load the adapter values of a checked folder into the adapter of a peft model, in place.

    Raises:
        ModelFilesError: The folder's adapter does not have the same tensors as the model's.
    """
    from peft import set_peft_model_state_dict

    saved = load_file(folder / ADAPTER_WEIGHTS)
    with _told_of(folder, "is not that of the policy"), quiet_peft():
        result: Any = set_peft_model_state_dict(model, saved, adapter_name=model.active_adapter)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lacking = sorted(trained & set(result.missing_keys))
    if lacking or result.unexpected_keys:
        what = f"lacks {lacking[0]}" if lacking else f"has {sorted(result.unexpected_keys)[0]}, and the policy does not"
        raise ModelFilesError(f"{folder}: its adapter is not that of the policy: it {what}")


@torch.no_grad()
def load_into(policy: Policy, folder: Path) -> None:
    """Load a checkpoint's weights into a policy in memory, in place, so that everything sharing its tensors sees them.

    Raises:
        ModelFilesError: The checkpoint is of another model, or of another kind (adapter or whole model).
    """
    check_folder(folder, hashes=False)
    adapted = hasattr(policy.model, "disable_adapter")
    if adapted != is_adapter(folder):
        kinds = ("a whole model", "an adapter")
        raise ModelFilesError(
            f"{folder} holds {kinds[is_adapter(folder)]}, and the policy that was passed trains {kinds[adapted]}: pass the "
            "same kind of policy as the run began with"
        )
    if adapted:
        load_adapter(policy.model, folder)
        return
    dtypes = {parameter.dtype for parameter in policy.model.parameters()}
    source, _ = load_stock(folder, dtypes.pop() if len(dtypes) == 1 else torch.float32, "sdpa")
    saved, current = source.state_dict(), policy.stock_model.state_dict()
    for name in sorted(saved.keys() ^ current.keys()):
        raise ModelFilesError(
            f"{folder} is of another model than the policy that was passed: only one of them has {name}"
        )
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise ModelFilesError(
                f"{folder} is of another model than the policy that was passed: {name} has shape "
                f"{tuple(saved[name].shape)} there, and {tuple(tensor.shape)} in the policy"
            )
    for name, tensor in current.items():
        tensor.copy_(saved[name])


def unsaved_parameters(model: Any) -> list[str]:
    """Return names of a peft model's trained parameters that its checkpoints leave out: those outside its adapters."""
    if not hasattr(model, "disable_adapter"):
        return []
    from peft import get_peft_model_state_dict

    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    return [n for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence those warnings of peft that ask nothing of the user; some contain unescaped text from the folder."""
    with warnings.catch_warnings():
        for beginning in _HARMLESS_OF_PEFT:
            warnings.filterwarnings("ignore", message=beginning, category=UserWarning)
        yield


@contextmanager
def _told_of(folder: Path, fault: str = "cannot be loaded as a model") -> Iterator[None]:
    """Turn a library's error into a ModelFilesError naming the folder; leave import and memory errors as they are."""
    try:
        yield
    except (UnsupportedFamilyError, ModelFilesError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # foreign configurations can make the libraries fail in any way
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        reason = " ".join(lines[:4])[:600]
        raise ModelFilesError(f"{folder}: it {fault}: {type(error).__name__}: {reason}") from error
