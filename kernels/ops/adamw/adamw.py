"""One update of AdamW over all parameters at once: it is measured first, and made only if the caller then asks for it.

For each parameter with a gradient g, in its update number t, with one factor c for all parameters::

    c  = min(1, max_grad_norm / (|g of all parameters| + 1e-6))
    m  <- beta1 m + (1 - beta1) c g
    v  <- beta2 v + (1 - beta2) (c g)^2
    d  = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    w  <- (1 - lr weight_decay) w - lr d

The weights w are the master: the parameter itself, or for a parameter in half precision its float32 copy, which is
then rounded into the parameter.

Edge rules:

- A parameter without a gradient keeps its weights, moments and t; its weights still count in the norm of the weights.
- Each parameter has its own t, so the bias correction of a parameter that was left out for a while is still right.
- Nothing is refused here, whatever the values. A gradient, moment or weight that is not finite makes each norm that
  depends on it infinite or NaN. So does a sum of squares beyond the range of float32, as in PyTorch's own norms.

``reference`` is plain PyTorch in the dtype of the masters. ``triton`` takes five launches for parameters of one dtype
and alignment, however many they are, and the host waits once, to read the norms. Apart from copies of strided
gradients, its extra memory is 64 bytes per parameter tensor and 40 bytes per chunk of 65,536 elements. Bytes moved per
parameter in half precision: 6 for the norms of gradient and weights, 10 for the norm of the update, which depends on
the gradient's norm, and 28 for the update itself; 8, 12 and 28 in float32. Without the two passes before the update, a
caller could not refuse it and find nothing changed. The same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from balcaprl.kernels.adamw.records import (
    CLIP_EPS,
    AdamWNorms,
    AdamWSettings,
    AdamWTensors,
    AdamWUpdate,
    bias_corrections,
)
from balcaprl.kernels.support import launch
from balcaprl.kernels.support.checks import check_impl, check_number

IMPLS = ("reference", "triton")


def adamw_update(tensors: Sequence[AdamWTensors], settings: AdamWSettings, *, impl: str = "auto") -> AdamWUpdate:
    """Measure one update of AdamW; the module's docstring has the mathematics and the edge rules.

    Args:
        tensors: all parameters. Sizes may be anything, 0 elements and 0 dimensions too. ``triton`` takes parameters and
            gradients in float32, bfloat16 or float16, masters and moments in float32, on one device.
        settings: hyperparameters of this update.
        impl: ``triton`` (CUDA, or CPU under Triton's interpreter), ``reference`` or ``auto``.

    Returns:
        The norms, which the host has waited for, and ``apply``, which makes the update and waits for nothing. Until
        ``apply`` is called nothing is changed.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, layout or range; the message starts with its name.
    """
    check_impl("adamw_update", impl, IMPLS)
    _check_settings(settings)
    for index, each in enumerate(tensors):
        _check_shapes(index, each)
    if impl == "triton" and tensors:
        launch.check_triton(tensors[0].master.device)
        for index, each in enumerate(tensors):
            complaint = _unsuitable(each, tensors[0].master.device)
            if complaint is not None:
                raise ValueError(f"tensors: number {index} {complaint}, which impl='triton' does not take")
    if resolve_impl(impl, tensors) == "triton":
        from balcaprl.kernels.adamw.triton import adamw_update as fused

        return fused(tensors, settings)
    return adamw_update_reference(tensors, settings)


def resolve_impl(impl: str, tensors: Sequence[AdamWTensors]) -> str:
    """The implementation that runs for these tensors; ``auto`` becomes the fastest one that can run."""
    if impl != "auto":
        return impl
    device = tensors[0].master.device if tensors else torch.device("cpu")
    suitable = device.type == "cuda" and all(_unsuitable(each, device) is None for each in tensors)
    return "triton" if suitable and launch.has_triton() else "reference"


@torch.no_grad()
def adamw_update_reference(tensors: Sequence[AdamWTensors], settings: AdamWSettings) -> AdamWUpdate:
    """The specification of ``adamw_update``, in plain PyTorch, in the masters' dtype; does not check arguments."""
    taken = [each for each in tensors if each.gradient is not None]
    gradients = [each.gradient.to(each.master.dtype) for each in taken if each.gradient is not None]
    gradient_norm = _norm(gradients)
    # A comparison with NaN is false, so NaN stays NaN.
    clip = settings.max_grad_norm / (gradient_norm + CLIP_EPS)
    clip = 1.0 if clip > 1.0 else clip
    directions = []
    for each, gradient in zip(taken, gradients, strict=True):
        assert each.exp_avg is not None
        assert each.exp_avg_sq is not None
        clipped = gradient * clip
        mean = each.exp_avg * settings.beta1 + clipped * (1 - settings.beta1)
        square = each.exp_avg_sq * settings.beta2 + clipped * clipped * (1 - settings.beta2)
        first, second = bias_corrections(each.step, settings)
        directions.append((mean, square, (mean * first) / (square.sqrt() * second + settings.eps)))
    weight_norm = _norm(each.master for each in tensors)
    update_norm = settings.lr * (_norm(d for _, _, d in directions) + settings.weight_decay * weight_norm)

    @torch.no_grad()
    def apply() -> None:
        for each, (mean, square, direction) in zip(taken, directions, strict=True):
            assert each.exp_avg is not None
            assert each.exp_avg_sq is not None
            each.exp_avg.copy_(mean)
            each.exp_avg_sq.copy_(square)
            each.master.mul_(1 - settings.lr * settings.weight_decay).sub_(direction, alpha=settings.lr)
            if each.parameter is not each.master:
                each.parameter.copy_(each.master)

    return AdamWUpdate(AdamWNorms(gradient_norm, update_norm, weight_norm), apply)


def check_agreement(device: torch.device, dtypes: Iterable[torch.dtype], settings: AdamWSettings, impl: str) -> None:
    """Make a few small updates on a device and compare them with the reference's.

    This takes about as long as compiling the kernels. A caller that cannot afford a wrong update calls it at its start.

    Args:
        device: where the parameters will be.
        dtypes: the parameters' dtypes.
        settings: hyperparameters to check with, except that the learning rate is 0.01. The kernels are compiled for
            ``beta1``, ``beta2`` and ``eps``.
        impl: the implementation to check.

    Raises:
        RuntimeError: weights, moments or norms differ from the reference's.
    """
    generator = torch.Generator().manual_seed(0)

    def made(dtype: torch.dtype, offset: int, master_dtype: torch.dtype) -> AdamWTensors:
        """Makes a parameter whose first element is ``offset`` elements after an address that is a multiple of 16."""
        drawn = [torch.randn(3000 + offset, generator=generator) for _ in range(4)]
        weights, gradient = (each.to(device, dtype)[offset:] for each in drawn[:2])
        mean, square = (each.to(device, master_dtype)[offset:] for each in (drawn[2], drawn[3].square()))
        master = weights if dtype == master_dtype else weights.to(master_dtype)
        return AdamWTensors(weights, master, gradient, mean, square, 3)

    settings = settings._replace(lr=0.01)

    def outcome(impl: str, master_dtype: torch.dtype) -> Tensor:
        generator.manual_seed(0)
        tensors = [made(dtype, offset, master_dtype) for dtype in dtypes for offset in (0, 1)]
        update = adamw_update(tensors, settings, impl=impl)
        update.apply()
        values = [value for each in tensors for value in (each.master, each.exp_avg, each.exp_avg_sq)]
        return torch.cat([torch.tensor(update.norms), *(v.float().cpu() for v in values if v is not None)])

    found, wanted = outcome(impl, torch.float32), outcome("reference", torch.float64)
    if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-6):
        worst = float((found - wanted).abs().max())
        raise RuntimeError(f"{impl} differs from the reference by up to {worst:.3g} on {device}")


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all elements of all tensors; 0 if there are none."""
    norms = [torch.linalg.vector_norm(each) for each in tensors if each.numel()]
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))) if norms else 0.0


def _check_settings(settings: AdamWSettings) -> None:
    check_number("lr", settings.lr, low=0.0)
    for name, value in (("beta1", settings.beta1), ("beta2", settings.beta2)):
        check_number(name, value, low=0.0)
        if value >= 1:
            raise ValueError(f"{name}: expected a number below 1, got {value!r}")
    check_number("eps", settings.eps, low=0.0, exclusive_low=True)
    check_number("weight_decay", settings.weight_decay, low=0.0)
    check_number("max_grad_norm", settings.max_grad_norm, low=0.0, exclusive_low=True)


def _check_shapes(index: int, each: AdamWTensors) -> None:
    """Raises ValueError unless a parameter's tensors fit each other."""
    if each.gradient is not None and (each.exp_avg is None or each.exp_avg_sq is None):
        raise ValueError(f"tensors: number {index} has a gradient and no moments")
    shape, device = each.parameter.shape, each.parameter.device
    for name, tensor in zip(each._fields[1:5], each[1:5], strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.device != device):  # type: ignore[attr-defined]
            raise ValueError(
                f"tensors: number {index} has a parameter of shape {tuple(shape)} on {device}, and its {name} has "
                f"shape {tuple(tensor.shape)} on {tensor.device}"  # type: ignore[attr-defined]
            )


def _unsuitable(each: AdamWTensors, device: torch.device) -> str | None:
    """Why the kernels cannot take a parameter, as a phrase that follows its number; None if they can."""
    states = [t for t in (each.master, each.exp_avg, each.exp_avg_sq) if t is not None]
    given = [t for t in (each.parameter, each.gradient) if t is not None]
    if any(t.device != device for t in (*given, *states)):
        return f"is not on {device}"
    if any(t.dtype not in launch.TRITON_TYPES for t in given):
        return (
            f"has the dtype {each.parameter.dtype}"
            if each.gradient is None
            else f"has the dtypes {each.parameter.dtype} and {each.gradient.dtype}"
        )
    if any(t.dtype != torch.float32 for t in states):
        return "has a master or moments that are not float32"
    if any(t.layout != torch.strided for t in given):
        return "is not dense"
    if not all(t.is_contiguous() for t in (each.parameter, *states)):
        return "is not contiguous"
    return None
