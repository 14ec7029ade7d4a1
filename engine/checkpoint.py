"""Checkpoints: a stock transformers folder plus the trainer's state, complete or absent.

``checkpoints/step_00000050/`` opens in ``AutoModelForImageTextToText`` and in vLLM like any published model; an adapter's
opens in stock peft, and ``merge.py`` makes a whole model of it. Beside the model lie ``trainer/optimizer.safetensors``,
``trainer_state.json`` and ``manifest.json``. A checkpoint is written under another name, its manifest last, flushed to disk,
and renamed: a kill at any moment leaves the previous one whole. Before one is resumed from, every file is compared with the
manifest; one that is damaged is put aside under another name, and the newest whole one taken.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from balcaprl import manifest
from balcaprl.config import STATE_FILE
from balcaprl.policy.weight_files import check_folder

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT = 1
"""Of ``trainer_state.json``. States without one are of earlier versions, which wrote no manifest either."""
# In a folder of its own: vLLM takes every safetensors file beside the model for a part of the model.
_TENSORS = Path("trainer") / "optimizer.safetensors"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial_"
_DAMAGED = "damaged_"
_KEYS: dict[str, type] = {"step": int, "policy_version": int, "data": dict, "config": dict, "origin": dict}
_MAX_STATE_BYTES = 64 << 20
_ADVICE = (
    "Checkpoints before it are as they were; make room or choose another output_dir, and start the same command again to go "
    "on from the newest"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be gone on from; the message names it, the file and the fault."""


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True)
class TrainerState:
    """What a run needs to go on exactly where it was."""

    step: int
    policy_version: int
    data: dict[str, Any]
    """The data cursor."""
    config: dict[str, Any]
    """The run's configuration, as plain values."""
    tensors: dict[str, torch.Tensor]
    """Optimiser state, and torch's random state under ``rng``."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the run began with beyond its configuration; see ``resume.py``."""
    format: int = FORMAT
    """0 for a state of an earlier version, which has no manifest to be compared with."""


def save_checkpoint(
    output_dir: Path, state: TrainerState, save_model: Callable[[Path], object], keep: int | None
) -> Path:
    """Write one checkpoint and drop all but the ``keep`` newest.

    Args:
        output_dir: the run folder.
        state: the trainer's state.
        save_model: writes the stock model folder to the path it is given.
        keep: checkpoints to keep; None: all.

    Raises:
        SaveError: the disk is full or cannot be written; nothing is left of the attempt.
    """
    parent = output_dir / FOLDER
    final = parent / f"step_{state.step:08d}"
    if final in list_checkpoints(output_dir):
        return final  # this step is saved already, as when a run ends on a step that was due
    partial = parent / f"{_PARTIAL}{final.name}"
    with new_folder(final, partial, _ADVICE):
        save_model(partial)
        (partial / _TENSORS).parent.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, partial / _TENSORS)
        plain = {"format": FORMAT, **{key: getattr(state, key) for key in _KEYS}}
        (partial / STATE_FILE).write_text(json.dumps(plain, indent=2) + "\n")
        manifest.write_manifest(partial)
    if keep is not None:
        for old in list_checkpoints(output_dir)[:-keep]:
            _remove(old)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; by their names, whole or not."""
    parent = output_dir / FOLDER
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def newest_whole(output_dir: Path) -> tuple[Path, TrainerState] | None:
    """The newest checkpoint that is whole, and its state; None where a run has none at all.

    Newer ones that are damaged are renamed, with a warning each, so that they neither count as saved steps nor push whole
    ones out.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged; they are left as they are.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            state = load_state(checkpoint)
        except CheckpointError as error:
            damaged.append((checkpoint, str(error)))
            continue
        for path, reason in damaged:
            aside = _set_aside(path)
            logger.warning("%s. It is now called %s, and the run goes on from %s", reason, aside.name, checkpoint.name)
        return checkpoint, state
    if damaged:
        raise CheckpointError(
            f"{output_dir} has checkpoints, and none of them can be resumed from: "
            + "; ".join(reason for _, reason in damaged)
            + ". Nothing was changed: restore one of them, or choose another output_dir"
        )
    return None


def load_state(checkpoint: Path) -> TrainerState:
    """The trainer's state of a checkpoint whose files are all as they were saved.

    Raises:
        CheckpointError: the folder holds no trainer state, or is damaged.
    """
    for needed in (STATE_FILE, str(_TENSORS)):
        if not (checkpoint / needed).is_file():
            raise CheckpointError(f"{checkpoint} holds no trainer state ({needed} is missing)")
    try:
        has_manifest = (checkpoint / manifest.MANIFEST).is_file()
        wrong = manifest.faults(checkpoint) if has_manifest else []
        if wrong:
            raise ValueError("; ".join(wrong[:8]))
        plain = _read_plain(checkpoint / STATE_FILE)
        if has_manifest != bool(plain["format"]):
            raise ValueError(f"{manifest.MANIFEST} {'is of another version' if has_manifest else 'is missing'}")
        if f"step_{plain['step']:08d}" != checkpoint.name and _NAME.fullmatch(checkpoint.name):
            raise ValueError(f"{STATE_FILE} is of step {plain['step']}")
        check_folder(checkpoint, hashes=False)
        tensors = _read_tensors(checkpoint / _TENSORS)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}") from error
    if not has_manifest:
        logger.warning("%s was written by an earlier version, without a manifest: damage cannot be told", checkpoint)
    return TrainerState(tensors=tensors, **plain)


def digest_of_base(checkpoint: Path) -> str | None:
    """What an adapter's checkpoint keeps to tell the model beneath it by; None where it has none, as of adapters of others.

    Raises:
        CheckpointError: its state cannot be read.
    """
    if not (checkpoint / STATE_FILE).is_file():
        return None
    try:
        base = _read_plain(checkpoint / STATE_FILE)["origin"].get("base")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}") from error
    return base if isinstance(base, str) else None


def clear_partial_checkpoints(output_dir: Path) -> None:
    """Remove what saves that were killed left behind; only for who holds the run folder."""
    for partial in (output_dir / FOLDER).glob(f"{_PARTIAL}*"):
        size = sum(path.lstat().st_size for path in partial.rglob("*"))
        try:
            shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()
            logger.info("removed %s (%.3f GiB), which an interrupted save had left", partial, size / 2**30)
        except OSError as error:
            logger.warning("%s, left by an interrupted save, cannot be removed: %s", partial, error)


@contextmanager
def new_folder(final: Path, partial: Path, advice: str) -> Iterator[Path]:
    """Put the folder ``partial``, which is written within, in place as ``final`` at the end, flushed to disk.

    Args:
        final: does not exist, or is an empty folder.
        partial: its name until then, in the same folder; what lies there is removed.
        advice: what to do when the disk is full or cannot be written.

    Raises:
        SaveError: it could not be written; nothing is left of the attempt.
    """
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _fsync_tree(partial)
        os.replace(partial, final)
        _fsync(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or str(error)
            raise SaveError(f"{final} could not be saved: {reason} ({_free(final)}). {advice}") from error
        raise


def _free(path: Path) -> str:
    existing = next((parent for parent in path.parents if parent.exists()), Path("/"))
    try:
        return f"{shutil.disk_usage(existing).free / 2**30:.2f} GiB are free there"
    except OSError:
        return "the free space is unknown"


def _read_plain(path: Path) -> dict[str, Any]:
    """The state's plain values, each of its type."""
    if path.stat().st_size > _MAX_STATE_BYTES:
        raise ValueError(f"{path.name} has more than {_MAX_STATE_BYTES >> 20} MiB")
    try:
        plain = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is no valid JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path.name} holds no object")
    plain = {"origin": {}, "format": 0, **plain} if "format" not in plain else plain
    if plain["format"] not in (0, FORMAT):
        raise ValueError(f"{path.name} has format {plain['format']!r}, and this version of balcaprl reads {FORMAT}")
    if plain.keys() != {"format", *_KEYS}:
        missing, unknown = sorted({"format", *_KEYS} - plain.keys()), sorted(plain.keys() - {"format", *_KEYS})
        what = [f"lacks {name}" for name in missing] + [f"has the unknown key {name!r:.80}" for name in unknown]
        raise ValueError(f"{path.name} {', '.join(what[:5])}")
    for key, kind in _KEYS.items():
        if type(plain[key]) is not kind or (kind is int and plain[key] < 0):
            raise ValueError(f"{path.name}: {key} is {plain[key]!r:.80}, expected {kind.__name__}")
    return plain


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{_TENSORS} is damaged or cut off: {error}") from error
    rng = tensors.get("rng")
    if rng is None or rng.dtype != torch.uint8 or rng.shape != torch.get_rng_state().shape:
        what = "lacks rng, torch's random state" if rng is None else "has an rng that is no random state of torch's"
        raise ValueError(f"{_TENSORS} {what}")
    return tensors


def _set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that no run takes for one of its own."""
    names = (f"{_DAMAGED}{checkpoint.name}{suffix}" for suffix in ("", *(f"_{n}" for n in range(2, 1000))))
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    os.replace(checkpoint, aside)
    return aside


def _remove(old: Path) -> None:
    """Drop a checkpoint that is no longer kept, under a name that a kill in the middle does no harm to."""
    doomed = old.with_name(f"{_PARTIAL}old_{old.name}")
    try:
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("%s, which is no longer kept, cannot be removed: %s", old, error)


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
