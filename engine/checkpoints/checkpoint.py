"""Checkpoints: a stock transformers folder plus the trainer's state, either complete or absent.

``checkpoints/step_00000050/`` opens in ``AutoModelForImageTextToText`` and in vLLM like any published model. The
checkpoint of an adapter opens in stock peft, and ``merge.py`` makes a whole model of it. Beside the model lie
``trainer/optimizer.safetensors``, ``trainer_state.json`` and ``manifest.json``.

A checkpoint is written under a temporary name with its manifest last, flushed to disk, and then renamed. A process that
is killed at any moment therefore leaves the previous checkpoint whole. Before a run resumes from a checkpoint, every
file is compared with the manifest. A damaged checkpoint is renamed, and the run resumes from the newest whole one.
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

from balcaprl.config import STATE_FILE
from balcaprl.files import manifest
from balcaprl.policy.weight_files import check_folder

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT = 1
"""Version of ``trainer_state.json``. Files without a version come from earlier versions of balcaprl, which wrote no
manifest either."""
# The optimiser state has its own folder because vLLM loads every safetensors file beside the model as part of the
# model.
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
    """A run cannot resume from a checkpoint; the message names the checkpoint, the file and the fault."""


class SaveError(OSError):
    """A checkpoint or model folder could not be written; folders that were written before are unchanged."""


@dataclass(frozen=True)
class TrainerState:
    """Everything that a run needs to continue exactly where it stopped."""

    step: int
    policy_version: int
    data: dict[str, Any]
    """Position in the training data, as plain values."""
    config: dict[str, Any]
    """The run's configuration, as plain values."""
    tensors: dict[str, torch.Tensor]
    """State of the optimiser, and torch's random state under the key ``rng``."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the run began with beyond its configuration; see ``resume.py``."""
    format: int = FORMAT
    """Version of the state file. 0 marks a state of an earlier version, which has no manifest to compare the files
    with."""


def save_checkpoint(
    output_dir: Path, state: TrainerState, save_model: Callable[[Path], object], keep: int | None
) -> Path:
    """Write one checkpoint, remove all but the ``keep`` newest, and return the path of the new one.

    Args:
        output_dir: the run folder.
        state: the trainer's state.
        save_model: function that writes the stock model folder to the path that it is given.
        keep: number of checkpoints to keep; None keeps all.

    Raises:
        SaveError: the disk is full or cannot be written; the partial checkpoint is removed.
    """
    parent = output_dir / FOLDER
    final = parent / f"step_{state.step:08d}"
    if final in list_checkpoints(output_dir):
        return final  # already saved: the run ended on a step at which a save was due
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
    """Checkpoint folders of a run, oldest first, found by their names only: some may be damaged."""
    parent = output_dir / FOLDER
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def newest_whole(output_dir: Path) -> tuple[Path, TrainerState] | None:
    """The newest undamaged checkpoint and its state; None if the run has no checkpoints.

    Newer checkpoints that are damaged are renamed, with a warning for each. They then do not count as saved steps, and
    do not displace whole checkpoints from the ones that are kept.

    Raises:
        CheckpointError: the run has checkpoints, and all of them are damaged; they are left unchanged.
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
    """Read the trainer's state of a checkpoint, after a check that all files are as they were saved.

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
    """Digest of the model that a checkpoint's adapter was trained on; None if the checkpoint does not record one.

    Adapters that other programs wrote record none.

    Raises:
        CheckpointError: the trainer state cannot be read, or is not the one that was saved.
    """
    damage = manifest.damage(checkpoint, lambda name: name == STATE_FILE)
    if damage is not None:
        raise CheckpointError(f"{checkpoint}: {damage}")
    if not (checkpoint / STATE_FILE).is_file():
        return None
    try:
        base = _read_plain(checkpoint / STATE_FILE)["origin"].get("base")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}") from error
    return base if isinstance(base, str) else None


def clear_partial_checkpoints(output_dir: Path) -> None:
    """Remove what interrupted saves left behind; the caller must hold the claim on the run folder."""
    for partial in (output_dir / FOLDER).glob(f"{_PARTIAL}*"):
        size = sum(path.lstat().st_size for path in partial.rglob("*"))
        try:
            shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()
            logger.info("removed %s (%.3f GiB), which an interrupted save had left", partial, size / 2**30)
        except OSError as error:
            logger.warning("%s, left by an interrupted save, cannot be removed: %s", partial, error)


@contextmanager
def new_folder(final: Path, partial: Path, advice: str) -> Iterator[Path]:
    """Let the caller write the folder ``partial``, then flush it to disk and rename it to ``final``.

    Args:
        final: path of the finished folder; nothing may be there, except an empty folder.
        partial: temporary path in the same parent folder; anything that lies there is removed.
        advice: last part of the error message: what the user can do if the disk is full or cannot be written.

    Raises:
        SaveError: the folder could not be written; the partial folder is removed.
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
    """Read the plain values of a state file, and check their keys and types."""
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
    """Rename a damaged checkpoint so that no run takes it for one of its own; return the new path."""
    names = (f"{_DAMAGED}{checkpoint.name}{suffix}" for suffix in ("", *(f"_{n}" for n in range(2, 1000))))
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    os.replace(checkpoint, aside)
    return aside


def _remove(old: Path) -> None:
    """Remove a checkpoint that is no longer kept.

    It is renamed first, so that a kill during the removal does not leave an incomplete checkpoint under its own name.
    """
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
