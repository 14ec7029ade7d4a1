"""How an op chooses by its tensors: the implementation for ``impl="auto"``, and the dtype in which it computes."""

from __future__ import annotations

import torch

from balcaprl.kernels.support import launch, native


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ops compute with inputs of ``dtype``: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fastest_impl(device: torch.device, *, native_fits: bool = True, triton_fits: bool = True) -> str:
    """The fastest of ``triton``, ``native`` and ``reference`` that can run on tensors on ``device``.

    Warns once per process if only the missing compiled library keeps it from ``native``.

    Args:
        device: device of the tensors.
        native_fits: whether ``native`` takes tensors of this dtype and shape.
        triton_fits: whether ``triton`` takes tensors of this dtype and shape.
    """
    if device.type == "cuda" and triton_fits and launch.has_triton():
        return "triton"
    if device.type != "cpu" or not native_fits:
        return "reference"
    if native.is_available():
        return "native"
    native.warn_unavailable()
    return "reference"
