"""Chooses kernels for small layers of a model: the native library's on the CPU, Liger's on CUDA if correct."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from balcaprl.kernels.layers import native as native_layers

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Largest relative difference between a fused and a stock result, or 4 eps of the dtype if that is more; a different
formula differs by more."""
_EPS = 1e-6


class LayerKernels(NamedTuple):
    """Fused kernels for the small layers, all differentiable."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """RMSNorm: takes x (..., D), weight (D,) and eps."""
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    """``silu(gate) * up``: takes gate and up, both (...)."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Rotary positions: takes q, k (N, H, L, head_dim) and cos, sin (N, L, head_dim); cos and sin get no gradient."""


def _rotate_on_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (native_layers.rotate(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    return q, k


NATIVE = LayerKernels(native_layers.rms_norm, native_layers.silu_mul, _rotate_on_cpu)


def kernels_for(*tensors: Tensor) -> LayerKernels | None:
    """Return the kernels that can run on all of these tensors; None if only the stock code can."""
    if len({(x.device, x.dtype) for x in tensors}) > 1:
        return None
    if tensors[0].is_cuda:
        return _liger(tensors[0].device)
    return NATIVE if native_layers.takes(tensors[0]) else None


@functools.cache
def _liger(device: torch.device) -> LayerKernels | None:
    """Return Liger's kernels, called as in its Llama modules; None if Liger is missing or computes something else."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    no_offset, casting, in_place = 0.0, "llama", False

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, eps, no_offset, casting, in_place)  # type: ignore[no-any-return]

    kernels = LayerKernels(rms_norm, LigerSiLUMulFunction.apply, LigerRopeFunction.apply)
    try:
        wrong = wrong_kernels(kernels, device)
    except Exception as error:  # compiler, driver or version can fail in any way, and training works without Liger
        wrong = [f"{type(error).__name__}: {error}".splitlines()[0]]
    if wrong:
        logger.warning("liger-kernel is not used on %s, the stock layers are: %s", device, ", ".join(wrong))
    return None if wrong else kernels


def wrong_kernels(kernels: LayerKernels, device: torch.device) -> list[str]:
    """Names of the kernels whose values or gradients on random inputs differ from those of the plain formula."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * weight

    def plain_rotation(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]

    cos, sin = (random(2, 5, 16).repeat(1, 1, 2) for _ in range(2))
    q, k = (random(2, 5, heads, 32).transpose(1, 2) for heads in (4, 2))
    pairs = {
        "rms_norm": _values_and_gradients(
            lambda x, w: kernels.rms_norm(x, w, _EPS), plain_norm, random(6, 48), random(48)
        ),
        "silu_mul": _values_and_gradients(
            kernels.silu_mul, lambda gate, up: F.silu(gate) * up, random(6, 48), random(6, 48)
        ),
        "rotate": _values_and_gradients(
            lambda q, k: torch.cat(kernels.rotate(q, k, cos, sin), 1),
            lambda q, k: torch.cat([plain_rotation(q), plain_rotation(k)], 1),
            q,
            k,
        ),
    }
    return [name for name, (ours, plain) in pairs.items() if not all(map(alike, ours, plain))]


def _values_and_gradients(
    kernel: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor
) -> list[tuple[Tensor, ...]]:
    """Run both functions and return the output and input gradients of each, for the same output gradient."""
    results = []
    for function in (kernel, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = function(*leaves)
        above = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, above)))
    return results


def alike(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results agree up to rounding, as results of the same formula do."""
    tolerance = max(_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
    largest = float(expected.abs().max())
    return torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=tolerance * largest)
