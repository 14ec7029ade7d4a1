"""Faster code for the small layers of stock models: RMSNorm, a SwiGLU block's ``silu(gate) * up``, rotary positions, patches.

The first three run on fused kernels (``layer_kernels.py``). Where there are none for a device or dtype, and for layers that
are not exactly these, the stock code runs. A convolution that takes one patch at a time becomes the matrix product
that it is. Weights and their names stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balcaprl.kernels import native_layers
from balcaprl.kernels.products import gapless
from balcaprl.policy.layer_kernels import alike, kernels_for

logger = logging.getLogger(__name__)

_ROTARY_TEXT, _ROTARY_TOWER = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"
"""What transformers calls the functions that rotate queries and keys."""
Forward = Callable[..., Any]


def fuse_layers(model: nn.Module) -> None:
    """Let the layers of ``model`` that we have kernels for run on them. ``unfuse_layers`` takes that back, and for a while
    ``stock_layers``.

    A layer is taken by its parts, and only if it then computes on a random input what it did before: checked once for each
    class and size.
    """
    checked: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        forward = _fused_forward_of(module)
        if forward is None:
            continue
        kind = (type(module), *(tuple(p.shape) for p in module.parameters()))
        if kind not in checked:
            checked[kind] = _agrees(module, forward)
        if checked[kind]:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def unfuse_layers(model: nn.Module) -> list[nn.Module]:
    """Let all layers of ``model`` run as transformers wrote them, for a compiler for instance; those that did not."""
    fused = [module for module in model.modules() if _is_fused(module)]
    for module in fused:
        del module.forward
    return fused


@contextmanager
def stock_layers(model: nn.Module) -> Iterator[None]:
    """Within, the layers of ``model`` run as transformers wrote them."""
    fused = unfuse_layers(model)
    try:
        yield
    finally:
        for module in fused:
            forward = _fused_forward_of(module)
            assert forward is not None  # it was fused before
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def fused_classes(model: nn.Module) -> dict[str, int]:
    """How many layers of each class run on kernels."""
    names = [type(module).__name__ for module in model.modules() if _is_fused(module)]
    return {name: names.count(name) for name in sorted(set(names))}


def _is_fused(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is not None and forward.__func__ is _fused_forward_of(module)


def _fused_forward_of(module: nn.Module) -> Forward | None:
    """What would stand in for the forward of this module; None: it is no such layer."""
    kind = type(module)
    if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return _norm_forward
    if kind.__name__.endswith("Attention"):
        return _rotating_forward(kind.forward)
    if isinstance(module, nn.Conv3d) and _takes_patches(module):
        return _patch_forward
    names = {name for name, _ in module.named_children()}
    if names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and isinstance(module.act_fn, (nn.SiLU, _silu_class())):
        return _mlp_forward
    return None


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    kernels = kernels_for(hidden_states, self.weight)
    if kernels is None:
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _takes_patches(conv: nn.Conv3d) -> bool:
    """Whether it makes one number per channel of each patch, as the Qwen towers' first layer does."""
    return not any(conv.padding) and set(conv.dilation) == {1} and conv.groups == 1  # type: ignore[arg-type]


def _patch_forward(self: Any, patches: Tensor) -> Tensor:
    """(N, channels, *patch) to (N, width, 1, 1, 1)."""
    if patches.shape[2:] != self.kernel_size:
        return type(self).forward(self, patches)  # type: ignore[no-any-return]
    out = F.linear(gapless(patches.flatten(1)), self.weight.flatten(1), self.bias)
    return out[..., None, None, None]


def _mlp_forward(self: Any, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    kernels = kernels_for(gate, up)
    product = self.act_fn(gate) * up if kernels is None else kernels.silu_mul(gate, up)
    return self.down_proj(product)  # type: ignore[no-any-return]


@functools.cache
def _rotating_forward(forward: Forward) -> Forward | None:
    """An attention's own forward that finds another function where its module rotates; None: it does not rotate that way."""
    if not isinstance(forward, FunctionType):
        return None
    if hasattr(forward, "__wrapped__"):
        inner = _rotating_forward(forward.__wrapped__)
        return None if inner is None else _wrapping(forward, inner)
    fused = {_ROTARY_TEXT: _rotary_text, _ROTARY_TOWER: _rotary_tower}
    used = {name for name in fused if name in forward.__code__.co_names}
    stock: dict[str, Forward] = {name: forward.__globals__[name] for name in used & forward.__globals__.keys()}
    if not stock or not all(_rotates_alike(name, fused[name], stock[name]) for name in stock):
        return None
    names = {name: functools.partial(fused[name], stock[name]) for name in stock}
    return _copy_of(forward, {**forward.__globals__, **names}, forward.__closure__)


def _wrapping(wrapper: FunctionType, inner: Forward) -> Forward | None:
    """A decorator's wrapper, as the one that takes a renamed argument by its old name, around ``inner`` in place of what it
    wraps; None: it does not hold that where it can be exchanged."""
    wrapped, cells = wrapper.__wrapped__, wrapper.__closure__ or ()  # type: ignore[attr-defined]
    exchanged = tuple(CellType(inner) if _content(cell) is wrapped else cell for cell in cells)
    if exchanged == cells:
        return None
    copy = _copy_of(wrapper, wrapper.__globals__, exchanged)
    copy.__wrapped__ = inner  # type: ignore[attr-defined]
    return copy


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty still
        return None


def _copy_of(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    """It, with other globals and another closure."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _rotary_text(
    stock: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """q, k (N, H, L, head_dim); cos, sin (N, L, head_dim)."""
    kernels = kernels_for(q, k, cos, sin)
    if kernels is None or unsqueeze_dim != 1 or (*q.shape[::2], q.shape[-1]) != cos.shape:
        return stock(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]
    return kernels.rotate(q, k, cos, sin)


def _rotary_tower(stock: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (L, H, head_dim); cos, sin (L, head_dim)."""
    if not all(map(native_layers.takes, (q, k, cos, sin))) or (q.shape[0], q.shape[-1]) != cos.shape:
        return stock(q, k, cos, sin)  # type: ignore[no-any-return]
    return native_layers.rotate(q, cos, sin), native_layers.rotate(k, cos, sin)


def _rotates_alike(name: str, fused: Forward, stock: Forward) -> bool:
    """Whether a function of that name is the rotation that ours stands for; others by the name take other arguments."""
    generator = torch.Generator().manual_seed(0)
    shape, angles = ((2, 3, 5, 8), (2, 5, 8)) if name == _ROTARY_TEXT else ((5, 3, 8), (5, 8))
    values = [torch.randn(size, generator=generator) for size in (shape, shape, angles, angles)]
    return _gives_alike(lambda: fused(stock, *values), lambda: stock(*values))


def _gives_alike(fused: Callable[[], Any], stock: Callable[[], Any]) -> bool:
    """Whether both give the same tensor, or tensors. The stock code is foreign: what it raises says that it is another."""
    try:
        with torch.no_grad():
            found, expected = (x if isinstance(x, tuple) else (x,) for x in (fused(), stock()))
        return len(found) == len(expected) and all(map(alike, found, expected))
    except Exception as error:
        logger.debug("a layer keeps its stock code, which takes other arguments: %s: %s", type(error).__name__, error)
        return False


@functools.cache
def _silu_class() -> type[nn.Module]:
    """transformers' own SiLU, where it has one beside torch's."""
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _agrees(module: Any, forward: Forward) -> bool:
    """Whether both forwards give the same on a few random rows. A rotation has been checked by itself, a product over patches
    is the convolution by definition."""
    if forward not in (_norm_forward, _mlp_forward):
        return True
    if len(inspect.signature(type(module).forward).parameters) != 2:  # it is called with more than its rows
        return False
    weight = module.weight if forward is _norm_forward else module.gate_proj.weight
    if weight is None:  # a norm without one
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    agrees = _gives_alike(lambda: forward(module, x), lambda: type(module).forward(module, x))
    if not agrees:
        logger.warning("%s keeps its stock code: our kernel computes something else", type(module).__name__)
    return agrees
