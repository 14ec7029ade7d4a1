"""Checkpoints: a stock transformers folder plus the trainer's state, complete or absent.

``checkpoints/step_00000050/`` opens in ``AutoModelForImageTextToText`` and in vLLM like any published model. Beside the
model lie ``trainer/optimizer.safetensors`` and ``trainer_state.json``. A checkpoint is written under another name, flushed
to disk, and renamed: a kill at any moment leaves the previous one whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from balcaprl.config import STATE_FILE

FOLDER = "checkpoints"
# In a folder of its own: vLLM takes every safetensors file beside the model for a part of the model.
_TENSORS = Path("trainer") / "optimizer.safetensors"
_NAME = re.compile(r"step_(\d{8})")


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


def save_checkpoint(output_dir: Path, state: TrainerState, save_model: Callable[[Path], object], keep: int) -> Path:
    """Write one checkpoint and drop all but the ``keep`` newest.

    Args:
        output_dir: the run folder.
        state: the trainer's state.
        save_model: writes the stock model folder to the path it is given.
        keep: checkpoints to keep.
    """
    parent = output_dir / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step_{state.step:08d}"
    if final in list_checkpoints(output_dir):
        return final  # this step is saved already, as when a run ends on a step that was due
    partial = parent / f".partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial)
    (partial / _TENSORS).parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, partial / _TENSORS)
    plain = {
        "step": state.step,
        "policy_version": state.policy_version,
        "data": state.data,
        "config": state.config,
    }
    (partial / STATE_FILE).write_text(json.dumps(plain, indent=2) + "\n")
    _fsync_tree(partial)
    os.replace(partial, final)
    _fsync(parent)
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    parent = output_dir / FOLDER
    if not parent.is_dir():
        return []
    return sorted(p for p in parent.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def load_state(checkpoint: Path) -> TrainerState:
    """The trainer's state of a checkpoint.

    Raises:
        ValueError: if the folder holds no trainer state.
    """
    try:
        plain = json.loads((checkpoint / STATE_FILE).read_text())
        tensors = load_file(checkpoint / _TENSORS)
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} holds no trainer state ({error.filename} is missing)") from error
    return TrainerState(tensors=tensors, **plain)


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
