"""What the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL derive from the sizes of the images, computed on the CPU.

transformers' towers compute rotary positions, segments, windows and interpolation from the grid with loops that read
its values. On a GPU, the host waits for each read. The towers also take the results as keyword arguments. The functions
that compute them (``transformers.vision_utils``) are therefore called here with the grid on the CPU, and the results
are uploaded. A version of transformers that computes anything else gets the grid on the tower's device, as it expects.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from balcaprl.kernels.support.upload import upload
from balcaprl.policy.layers.attention import note_segments

PREFIX = "image_"
"""Prefix of the names of precomputed keyword arguments of ``get_image_features``; transformers strips it."""


def _position_ids(tower: Any, grid: Tensor, function: Callable[..., Any]) -> dict[str, Any]:
    return {"position_ids": function(grid, tower.spatial_merge_size)}


def _attention_seqlens(tower: Any, grid: Tensor, function: Callable[..., Any]) -> dict[str, Any]:
    offsets, _ = function(grid, tower.config)
    return {"cu_seqlens": offsets, "max_seqlen": int(offsets.diff().max())}


def _windows(tower: Any, grid: Tensor, function: Callable[..., Any]) -> dict[str, Any]:
    index, offsets = function(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return {"window_index": index, "cu_window_seqlens": offsets, "max_window_seqlen": int(offsets.diff().max())}


def _interpolation(tower: Any, grid: Tensor, function: Callable[..., Any]) -> dict[str, Any]:
    indices, weights = function(
        grid,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.config.spatial_merge_size,
    )
    return {"interp_indices": indices, "interp_weights": weights}


_CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "get_vision_position_ids": _position_ids,
    "get_vision_attention_seqlens": _attention_seqlens,
    "get_vision_window_index": _windows,
    "get_vision_interpolation_indices_and_weights": _interpolation,
}
"""For each function of ``transformers.vision_utils``, a function that calls it as a tower does and returns the keyword
arguments that replace this call."""


def _functions(tower: nn.Module) -> dict[str, Callable[..., Any]]:
    """The functions by which a tower's module computes indices, by name; empty if a call of one cannot be replaced."""
    module = sys.modules[type(tower).__module__]
    found = {name: function for name, function in vars(module).items() if name.startswith("get_vision_")}
    known = found and all(
        name in _CALLS and "kwargs" in inspect.signature(function).parameters for name, function in found.items()
    )
    return found if known else {}


def tower_inputs(tower: nn.Module, grid: Tensor, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of ``get_image_features`` that describe the grid.

    Args:
        tower: The image tower.
        grid: LongTensor (images, 3): patches of each image along time, height and width. If on a GPU, the host waits.
        device: The device that the tower runs on.

    Returns:
        ``image_grid_thw`` on the CPU and, with tensors on ``device``, what the installed transformers takes
        precomputed. If it takes nothing, only ``image_grid_thw``, on ``device``.
    """
    functions, on_cpu = _functions(tower), grid.cpu()
    if not functions:
        return {"image_grid_thw": upload([grid], device)[0]}
    found: dict[str, Any] = {}
    for name, function in functions.items():
        found |= _CALLS[name](tower, on_cpu, function)
    names = [name for name, value in found.items() if isinstance(value, Tensor)]
    moved = dict(zip(names, upload([found[name] for name in names], device), strict=True))
    for name in names:
        if name.endswith("seqlens"):
            note_segments(moved[name], found[name].tolist())
    return {"image_grid_thw": on_cpu} | {PREFIX + name: value for name, value in (found | moved).items()}
