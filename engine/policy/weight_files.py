"""Checks what may be loaded as a model, before any library opens it: only tensors in safetensors files of one folder.

Every folder is treated as untrusted data. Pickled weights run code when they are read, ``auto_map`` names code that
comes with the folder, and an index or a link can lead out of the folder. Each of these is refused with a message that
names it. Pickles beside safetensors are allowed, because they are never opened and most published folders have both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from balcaprl.files import manifest
from balcaprl.files.model_path import ModelFilesError, refuse_no_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROCESSOR_CONFIG = "processor_config.json"
TRAINER_FILES = ("trainer_state.json", "trainer/")
"""Files and folders of a checkpoint that hold the trainer's state; no model is loaded from them. Code that reads one of
them must itself compare it with the manifest."""
_READ = {".json", ".jinja", ".model", ".txt", ".safetensors"}
_FOREIGN_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".npz"}
_SETTINGS = ["*.json", "*.jinja", "*.model", "*.txt"]
_MAX_JSON_BYTES = 64 << 20


def model_folder(
    path_or_id: str | Path,
    *,
    verify: bool = True,
    accept: Callable[[Path], None] = lambda folder: None,
    option: str = "model.path",
) -> Path:
    """Return a model's folder after checking its files; for a hub id, missing files are downloaded first.

    Args:
        path_or_id: a transformers folder or a hub id.
        verify: also compare the files with the manifest of a checkpoint that has one.
        accept: function that gets the folder once it holds the configuration, before weights are downloaded; it raises
            for a model that is not wanted.
        option: name of the option in which the user gave the model, for messages.

    Raises:
        ModelFilesError: there is no such model, or part of its folder must not be loaded.
    """
    refuse_no_model(path_or_id, option=option)
    folder = Path(path_or_id).expanduser()
    from_hub = not folder.exists()
    if from_hub:
        folder = _downloaded(str(path_or_id), _SETTINGS, option)
    _refuse(folder, _setting_faults(folder))
    accept(folder)
    if from_hub:
        folder = _downloaded(str(path_or_id), [*_SETTINGS, "model*.safetensors", ADAPTER_WEIGHTS], option)
    check_folder(folder, hashes=verify)
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter (LoRA) without the model that the adapter belongs to."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def quantisation(folder: Path) -> str | None:
    """Return the method by which the weights of a checked model folder are quantised; None if they are not."""
    config = read_json(folder / "config.json")
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    found = next((s["quantization_config"] for s in sections if s.get("quantization_config")), None)
    if found is None:
        return None
    return str(found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found)[:80]


def check_folder(folder: Path, *, hashes: bool = True) -> None:
    """Refuse a model folder that is incomplete, or that holds something that must not be loaded.

    Args:
        folder: the folder of a model or an adapter.
        hashes: also compare its files with the manifest, if there is one.

    Raises:
        ModelFilesError: the folder is refused; the message names folder, file and fault.
    """
    _refuse(folder, chain(_setting_faults(folder), _weight_faults(folder, hashes)))


def read_json(path: Path) -> Any:
    """Read a JSON file of a model folder.

    Raises:
        ValueError: the file is too large or is not JSON; the message names the file.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no valid JSON: {error}") from error


def _refuse(folder: Path, faults: Iterator[str]) -> None:
    """Raise ModelFilesError for the first fault, or for an error met while looking for faults."""
    try:
        fault = next(faults, None)
    except (OSError, ValueError, RecursionError) as error:
        fault = str(error)
    if fault is not None:
        raise ModelFilesError(f"{folder}: {fault}")


def _setting_faults(folder: Path) -> Iterator[str]:
    """Yield the faults of links and JSON files, without looking at weights."""
    yield from _linked_out(folder)
    yield from _code(folder)
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        yield "config.json is missing: it is no folder of a transformers model"


def _weight_faults(folder: Path, hashes: bool) -> Iterator[str]:
    damage = manifest.damage(folder, lambda name: not name.startswith(TRAINER_FILES)) if hashes else None
    if damage is not None:
        yield damage
    if (folder / ADAPTER_CONFIG).is_file() and not is_adapter(folder):
        yield f"it holds a whole model and an adapter ({ADAPTER_CONFIG}): move one of them to a folder of its own"
    names = [ADAPTER_WEIGHTS] if is_adapter(folder) else list(_weight_files(folder))
    foreign = sorted(path.name for path in folder.iterdir() if path.suffix in _FOREIGN_WEIGHTS)
    for name in names:
        if not (folder / name).is_file():
            if foreign:
                yield (
                    f"{', '.join(foreign[:3])}: weights that are not safetensors are refused, as reading them can run code; "
                    f"there is no {name}. Convert them where you trust them: load with transformers, then save_pretrained"
                )
            yield f"{name} is missing"
        fault = _unreadable(folder / name)
        if fault is not None:
            yield f"{name} is damaged or cut off: {fault}"


def _linked_out(folder: Path) -> Iterator[str]:
    """Yield links that leave the folder; links from a hub snapshot to its own repository's blobs are allowed."""
    root = folder.resolve()
    allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix in _READ:
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                yield f"{path.name} is a link that leads out of the folder, to {target}: put the file itself there"


def _code(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*config*.json")):
        if _mentions(read_json(path), "auto_map"):
            yield (
                f"{path.name} names code that comes with the model (auto_map), and such code is never run: take a model that "
                "transformers knows by itself, or remove the key if it knows this one"
            )


def _mentions(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return bool(value.get(key)) or any(_mentions(each, key) for each in value.values())
    return isinstance(value, list) and any(_mentions(each, key) for each in value)


def _weight_files(folder: Path) -> Iterator[str]:
    """Yield the names of the files from which transformers would read the weights.

    Raises:
        ValueError: a name leads out of the folder or to another kind of file, or the index has no ``weight_map``.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    chosen = config.get("transformers_weights") if isinstance(config, dict) else None
    if chosen is not None:
        yield _plain_name(chosen, "config.json (transformers_weights)")
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict) or not parts:
            raise ValueError(f"{INDEX} has no weight_map")
        yield from sorted({_plain_name(name, INDEX) for name in parts.values()})
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        yield WEIGHTS


def _plain_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
        raise ValueError(
            f"{where} names {str(name)[:200]!r}: expected the name of a safetensors file in the same folder"
        )
    return name


def _unreadable(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return None if file.keys() else "it holds no tensor"
    except (SafetensorError, OSError) as error:
        return str(error)


def _downloaded(repository: str, patterns: list[str], option: str) -> Path:
    """Return a model's folder in the local hub cache, after downloading what the cache lacks."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # hub client, HTTP library and disk each raise errors of their own
        reason = next(iter(str(error).strip().splitlines()), "")[:300]
        raise ModelFilesError(
            f"{option}: {repository} is no folder here, and cannot be had from the Hugging Face hub: "
            f"{type(error).__name__}: {reason}. Check the name and the network; without one, download it elsewhere (hf "
            f"download {repository}), and give the folder as {option}; or set HF_HOME to a cache that has "
            "it, and HF_HUB_OFFLINE=1"
        ) from error
