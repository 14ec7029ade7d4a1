"""What an op derives from its tensors: the implementation for ``impl="auto"``, and the dtype in which it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from balcaprl.kernels.support import launch, native


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ops compute with inputs of ``dtype``: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fastest_impl(device: torch.device, *, native_fits: bool = True, triton_fits: bool = True) -> str:
    """The fastest of ``triton``, ``native`` and ``reference`` that can run on tensors on ``device``.

    Warns once per process if ``native`` would be chosen, but the compiled library is missing.

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


def resolve_below_float64(impl: str, tensor: Tensor, subject: str) -> str:
    """Returns the implementation to run for ``tensor`` where only ``reference`` has float64.

    Args:
        impl: ``native``, ``triton``, ``reference``, or ``auto`` for the fastest that can run.
        tensor: the input whose device and dtype decide.
        subject: the input's name with a verb, such as ``logits are``, for the message.

    Raises:
        ValueError: ``impl`` cannot run on such tensors; the message starts with ``impl``.
    """
    has_dtype = tensor.dtype != torch.float64
    if impl == "auto":
        return fastest_impl(tensor.device, native_fits=has_dtype, triton_fits=has_dtype)
    if impl == "native" and tensor.device.type != "cpu":
        raise ValueError(f"impl: 'native' runs on the CPU, {subject} on {tensor.device}")
    if impl != "reference" and not has_dtype:
        raise ValueError(f"impl: {impl!r} has no float64; use 'reference' or 'auto'")
    if impl == "triton":
        launch.check_triton(tensor.device)
    return impl
