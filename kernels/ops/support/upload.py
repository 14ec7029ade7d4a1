"""Copies from the CPU to a GPU that the host does not wait for.

A copy from ordinary memory makes the host wait. A copy from pinned memory is queued behind the GPU's earlier work, but
each copy takes a launch, so all tensors of one dtype share a copy here. To other devices, tensors are moved one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes to which tensors are aligned within a copy, because kernels are compiled for pointers aligned like this."""


def upload(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Moves tensors to a device, in order; on a GPU, those of one dtype are contiguous views of one copy.

    Args:
        tensors: tensors on the CPU, of any shapes and dtypes; any that are not on the CPU are moved one by one.
        device: the device to move them to.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            by_dtype.setdefault(tensor.dtype, []).append(index)
    moved = {}
    for indices in by_dtype.values():
        joined, offsets = _joined([tensors[index] for index in indices], pin_memory=True)
        copy = joined.to(device, non_blocking=True)
        for index, offset in zip(indices, offsets, strict=True):
            tensor = tensors[index]
            moved[index] = copy[offset : offset + tensor.numel()].view(tensor.shape)
    return [moved[index] if index in moved else tensor.to(device) for index, tensor in enumerate(tensors)]


def _joined(tensors: Sequence[Tensor], *, pin_memory: bool) -> tuple[Tensor, list[int]]:
    """Joins tensors of one dtype into a one-dimensional tensor; returns it, and the index at which each begins."""
    step = max(1, _ALIGNMENT // tensors[0].element_size())
    offsets, total = [], 0
    for tensor in tensors:
        offsets.append(total)
        total += -(-tensor.numel() // step) * step
    joined = torch.empty(total, dtype=tensors[0].dtype, pin_memory=pin_memory)
    for offset, tensor in zip(offsets, tensors, strict=True):
        joined[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
    return joined, offsets
