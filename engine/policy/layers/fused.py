"""Faster code for layers of stock models: for whole blocks where Triton runs (``blocks.py``), and for small layers.

The small layers are RMSNorm, SwiGLU's ``silu(gate) * up``, rotary positions and the embedding of patches. The first
three run on fused kernels (``kernels.py``). The stock code runs where a device or dtype has no kernel, and for layers
that differ from these. A convolution whose kernel covers exactly one patch runs as the matrix product that it is
equivalent to. Weights and their names stay as they are.
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

from balcaprl.kernels.layers import native as native_layers
from balcaprl.kernels.support.products import gapless
from balcaprl.policy.layers import blocks
from balcaprl.policy.layers.kernels import alike, kernels_for

logger = logging.getLogger(__name__)

_ROTARY_TEXT, _ROTARY_TOWER = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"
"""Names of transformers' functions that rotate queries and keys, in text models and in image towers."""
_BLOCKS = (blocks.decoder_forward, blocks.tower_forward)
Forward = Callable[..., Any]


def fuse_layers(model: nn.Module) -> None:
    """Let each layer of ``model`` for which there is faster code run on that code.

    ``unfuse_layers`` undoes this, and ``stock_layers`` undoes it temporarily. A layer is recognised by its class name
    or its parts, and is fused only if it computes the same on a random input as before. This check runs once for each
    class and size.
    """
    checked: dict[tuple[Any, ...], bool] = {}
    # Children first: whole blocks are then compared with stock code whose small layers are already checked and fused.
    for module in reversed(list(model.modules())):
        forward = _fused_forward_of(module)
        if forward is None:
            continue
        kind = (type(module), *(tuple(p.shape) for p in module.parameters()))
        if kind not in checked:
            checked[kind] = _agrees(module, forward)
        if checked[kind]:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
            if forward in _BLOCKS:
                blocks.prepare(module)


def unfuse_layers(model: nn.Module) -> list[nn.Module]:
    """Restore the stock code of all layers of ``model``, for instance for a compiler; returns those that were fused."""
    fused = [module for module in model.modules() if _is_fused(module)]
    for module in fused:
        del module.forward
    return fused


@contextmanager
def stock_layers(model: nn.Module) -> Iterator[None]:
    """Within the context, the layers of ``model`` run transformers' own code."""
    fused = unfuse_layers(model)
    try:
        yield
    finally:
        for module in fused:
            forward = _fused_forward_of(module)
            assert forward is not None  # it was fused before
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def fused_classes(model: nn.Module) -> dict[str, int]:
    """Number of fused layers, by class name."""
    names = [type(module).__name__ for module in model.modules() if _is_fused(module)]
    return {name: names.count(name) for name in sorted(set(names))}


def _is_fused(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is not None and forward.__func__ is _fused_forward_of(module)


def _fused_forward_of(module: nn.Module) -> Forward | None:
    """Return the fused replacement for this module's forward; None if there is none for such a module."""
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
    return blocks.block_forward_of(module)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    kernels = kernels_for(hidden_states, self.weight)
    if kernels is None:
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _takes_patches(conv: nn.Conv3d) -> bool:
    """Whether a convolution can be one matrix product per patch, like the first layer of the Qwen towers."""
    return not any(conv.padding) and set(conv.dilation) == {1} and conv.groups == 1  # type: ignore[arg-type]


def _patch_forward(self: Any, patches: Tensor) -> Tensor:
    """Embed patches (N, channels, *patch) as (N, width, 1, 1, 1); inputs of another size take the stock convolution."""
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
    """Copy an attention's own forward so that it calls the fused rotation; None if it rotates in an unknown way."""
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
    """Copy a decorator's wrapper so that it wraps ``inner`` instead; None if its closure lacks the wrapped function.

    An example is the decorator that lets a forward still accept a renamed argument under its old name.
    """
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
    except ValueError:  # the cell is still empty
        return None


def _copy_of(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    """Copy a function with ``names`` as its globals and another closure."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _rotary_text(
    stock: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate q, k (N, H, L, head_dim) by cos, sin (N, L, head_dim), with ``stock`` where no kernel fits."""
    kernels = kernels_for(q, k, cos, sin)
    if kernels is None or unsqueeze_dim != 1 or (*q.shape[::2], q.shape[-1]) != cos.shape:
        return stock(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]
    return kernels.rotate(q, k, cos, sin)


def _rotary_tower(stock: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q, k (L, H, head_dim) by cos, sin (L, head_dim), with ``stock`` where no kernel fits."""
    if not all(map(native_layers.takes, (q, k, cos, sin))) or (q.shape[0], q.shape[-1]) != cos.shape:
        return stock(q, k, cos, sin)  # type: ignore[no-any-return]
    return native_layers.rotate(q, cos, sin), native_layers.rotate(k, cos, sin)


def _rotates_alike(name: str, fused: Forward, stock: Forward) -> bool:
    """Whether ``stock`` computes the same rotation as ``fused``; a function of that name may take other arguments."""
    generator = torch.Generator().manual_seed(0)
    shape, angles = ((2, 3, 5, 8), (2, 5, 8)) if name == _ROTARY_TEXT else ((5, 3, 8), (5, 8))
    values = [torch.randn(size, generator=generator) for size in (shape, shape, angles, angles)]
    return _gives_alike(lambda: fused(stock, *values), lambda: stock(*values))


def _gives_alike(fused: Callable[[], Any], stock: Callable[[], Any]) -> bool:
    """Whether both give the same tensor or tensors; an exception counts as no, because the stock code is foreign."""
    try:
        with torch.no_grad():
            found, expected = (x if isinstance(x, tuple) else (x,) for x in (fused(), stock()))
        return len(found) == len(expected) and all(map(alike, found, expected))
    except Exception as error:
        logger.debug("a layer keeps its stock code, which takes other arguments: %s: %s", type(error).__name__, error)
        return False


@functools.cache
def _silu_class() -> type[nn.Module]:
    """Return the class that transformers uses for SiLU, which may not be torch's."""
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _agrees(module: Any, forward: Forward) -> bool:
    """Whether the fused and the stock forward of a module give the same result on a few random rows.

    Whole blocks, norms and MLPs need this check. A rotation is checked in ``_rotates_alike``, and a product over
    patches equals the convolution by definition.
    """
    if forward in _BLOCKS:
        return blocks.can_run(next(module.parameters())) and blocks.agrees(module, forward)
    if forward not in (_norm_forward, _mlp_forward):
        return True
    if len(inspect.signature(type(module).forward).parameters) != 2:  # it takes other arguments than self and rows
        return False
    weight = module.weight if forward is _norm_forward else module.gate_proj.weight
    if weight is None:  # a norm without a weight
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    agrees = _gives_alike(lambda: forward(module, x), lambda: type(module).forward(module, x))
    if not agrees:
        logger.warning("%s keeps its stock code: our kernel computes something else", type(module).__name__)
    return agrees
