"""A pre-norm transformer block as one differentiable function on fused kernels, for decoder layers and for blocks of
image towers.

For rows x (T, D), with RMSNorm and rotary positions::

    n1 = rms_norm(x; norm1)          q, k, v = rotate(n1 W_qkv' + b_qkv)
    x2 = x + attention(q, k, v) W_out' + b_out
    n2 = rms_norm(x2; norm2)         y  = x2 + (silu(n2 W_gate' + b_gate) * (n2 W_up' + b_up)) W_down' + b_down

When such a block runs as PyTorch modules, the host issues some 40 operations in the forward and 80 in the backward, and
autograd records each of the forward's. Here the host issues 9 launches in the forward and about 20 in the backward, and
autograd records one operation. The large tensors that are saved for the backward are x, q and k after rotation, v, the
attention's output, x2, gate and up. The backward computes the norms and silu(gate) * up again.

Weights of one ``Linear`` that follow each other in memory, such as vLLM's query, key and value, are used as one matrix;
``adjoin`` moves other weights so that they do. The gradients that the backward returns for one ``Linear`` always follow
each other in memory.

The kernels are Triton's (``impl="triton"``); ``transformer_block_reference`` is the specification in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from balcaprl.kernels.block.attention import Attention

Rows = slice | Tensor
"""Indices of rows: a slice that ends at the last row, or an ascending LongTensor (U,)."""


class Linear(NamedTuple):
    """One or more linear layers that take the same input and whose outputs are concatenated."""

    weights: tuple[Tensor, ...]
    """Each is (out features, in features)."""
    biases: tuple[Tensor, ...] = ()
    """Each is (out features,); empty if the layers have none."""


class BlockWeights(NamedTuple):
    """The weights of a block, all of one dtype and on one device."""

    norm1: Tensor
    """(D,)."""
    qkv: Linear
    """Query, key and value, as one matrix or three: (H head_dim + 2 H_kv head_dim, D) together."""
    out: Linear
    """(D, H head_dim)."""
    norm2: Tensor
    """(D,)."""
    gate_up: Linear
    """Gate and up: (2 I, D) together."""
    down: Linear
    """(D, I)."""


class BlockShape(NamedTuple):
    """The numbers of a block that do not follow from its weights."""

    num_heads: int
    """H, the number of query heads."""
    num_kv_heads: int
    """H_kv, the number of key heads; it divides H."""
    eps1: float
    """Number that the first norm adds to the mean of squares."""
    eps2: float
    """Number that the second norm adds to the mean of squares."""


def transformer_block(
    x: Tensor,
    weights: BlockWeights,
    shape: BlockShape,
    cos: Tensor,
    sin: Tensor,
    attention: Attention,
    rows: Rows | None = None,
) -> Tensor:
    """The block's output, in the shape of ``x``, differentiable once with respect to ``x`` and the weights.

    Args:
        x: (T, D) or (1, T, D) float32, bfloat16 or float16 rows, on a CUDA device, or on the CPU under Triton's
            interpreter.
        weights: the block's weights, of the dtype of ``x``.
        shape: heads and epsilons.
        cos: (T, head_dim) cosines of the rotary positions, without gradient.
        sin: (T, head_dim) sines of the rotary positions, without gradient.
        attention: which rows attend to which.
        rows: the rows whose output the caller reads; the output of all other rows is 0. None means all rows.
    """
    return _Block.apply(x, weights, shape, cos, sin, attention, rows, *_flat(weights))  # type: ignore[no-any-return]


def transformer_block_reference(
    x: Tensor,
    weights: BlockWeights,
    shape: BlockShape,
    cos: Tensor,
    sin: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Rows | None = None,
) -> Tensor:
    """The specification of ``transformer_block`` in plain PyTorch, in any dtype; ``attention`` is differentiable."""
    qkv = _linear_reference(_norm_reference(x, weights.norm1, shape.eps1), weights.qkv)
    heads = qkv.unflatten(1, (shape.num_heads + 2 * shape.num_kv_heads, -1))
    turned, value = heads[:, : -shape.num_kv_heads], heads[:, -shape.num_kv_heads :]
    low, high = turned.chunk(2, dim=2)
    cos, sin = (each[:, None].to(torch.promote_types(x.dtype, torch.float32)) for each in (cos, sin))
    turned = (turned * cos + torch.cat([-high, low], dim=2) * sin).to(x.dtype)
    attended = attention(turned[:, : shape.num_heads], turned[:, shape.num_heads :], value).flatten(1)
    x2 = x + _linear_reference(attended, weights.out)
    gate, up = _linear_reference(_norm_reference(x2, weights.norm2, shape.eps2), weights.gate_up).chunk(2, dim=1)
    y = x2 + _linear_reference(F.silu(gate) * up, weights.down)
    if rows is None:
        return y
    return _spread(_take(y, rows), rows, len(y))


def _norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _linear_reference(x: Tensor, linear: Linear) -> Tensor:
    biases = linear.biases or (None,) * len(linear.weights)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(linear.weights, biases, strict=True)], dim=1)


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors (n_i, ...) as one view (sum n_i, ...) if they follow each other in one storage; None otherwise."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    place, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for each in tensors:
        if each.data_ptr() != place or not each.is_contiguous() or each.untyped_storage().data_ptr() != storage:
            return None
        place += each.numel() * each.element_size()
    return first.as_strided((sum(len(each) for each in tensors), *first.shape[1:]), first.stride())


@torch.no_grad()
def adjoin(parameters: Sequence[Tensor]) -> None:
    """Moves parameters (n_i, ...) one after the other into one new storage, unless they already follow each other."""
    if adjacent([each.detach() for each in parameters]) is None:
        parts = torch.cat([each.detach() for each in parameters]).split([len(each) for each in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: BlockWeights,
        shape: BlockShape,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        rows: Rows | None,
        *flat: Tensor,
    ) -> Tensor:
        from balcaprl.kernels.layers import triton as layers

        of_x, x = x.shape, x.reshape(-1, x.shape[-1])
        n1, rstd1 = layers.rms_norm(x, weights.norm1, shape.eps1)
        heads = _linear(n1, weights.qkv).unflatten(1, (shape.num_heads + 2 * shape.num_kv_heads, -1))
        layers.rotate_(heads[:, : -shape.num_kv_heads], cos, sin)
        attended, kept = attention.forward(*_split_heads(heads, shape))
        seen, own = (attended.flatten(1), x) if rows is None else (_take(attended.flatten(1), rows), _take(x, rows))
        x2 = _added_linear(own, seen, weights.out)
        n2, rstd2 = layers.rms_norm(x2, weights.norm2, shape.eps2)
        gate_up = _linear(n2, weights.gate_up)
        y = _added_linear(x2, layers.silu_mul(gate_up), weights.down)
        ctx.save_for_backward(x, rstd1, heads, attended, x2, rstd2, gate_up, cos, sin, *kept, *flat)
        ctx.shape, ctx.attention, ctx.rows, ctx.num_kept = shape, attention, rows, len(kept)
        ctx.counts = [(len(each.weights), len(each.biases)) for each in _linears(weights)]
        return (y if rows is None else _spread(y, rows, len(x))).view(of_x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from balcaprl.kernels.block.triton import join_heads
        from balcaprl.kernels.layers import triton as layers

        x, rstd1, heads, attended, x2, rstd2, gate_up, cos, sin, *rest = ctx.saved_tensors
        kept, flat = rest[: ctx.num_kept], rest[ctx.num_kept :]
        shape, rows = ctx.shape, ctx.rows
        weights: BlockWeights = _nested(flat, ctx.counts)
        wanted: Any = _nested(ctx.needs_input_grad[-len(flat) :], ctx.counts)
        of_x, grad = grad.shape, grad.reshape(-1, grad.shape[-1]).contiguous()
        grad = grad if rows is None else _take(grad, rows)
        product, grad_gate_up = layers.silu_mul_backward(_input_gradient(grad, weights.down), gate_up)
        down = _linear_gradients(grad, product, weights.down, wanted.down)
        n2 = layers.rms_norm_again(x2, weights.norm2, rstd2)
        up = _linear_gradients(grad_gate_up, n2, weights.gate_up, wanted.gate_up)
        grad_n2 = _input_gradient(grad_gate_up, weights.gate_up)
        grad_x2, norm2 = layers.rms_norm_backward(grad_n2, x2, weights.norm2, rstd2, grad, wanted.norm2)
        seen = attended.flatten(1)
        out = _linear_gradients(grad_x2, seen if rows is None else _take(seen, rows), weights.out, wanted.out)
        grad_attended = _input_gradient(grad_x2, weights.out)
        if rows is not None:
            grad_attended, grad_x2 = (_spread(each, rows, len(x)) for each in (grad_attended, grad_x2))
        grad_heads = grad_attended.unflatten(1, (shape.num_heads, -1))
        grad_q, grad_k, grad_v = ctx.attention.backward(grad_heads, *_split_heads(heads, shape), attended, kept)
        grad_qkv = join_heads(grad_q, grad_k, grad_v, cos, sin).flatten(1)
        n1 = layers.rms_norm_again(x, weights.norm1, rstd1)
        qkv = _linear_gradients(grad_qkv, n1, weights.qkv, wanted.qkv)
        grad_n1 = _input_gradient(grad_qkv, weights.qkv)
        grad_x, norm1 = layers.rms_norm_backward(grad_n1, x, weights.norm1, rstd1, grad_x2, wanted.norm1)
        gradients: Any = BlockWeights(norm1, qkv, out, norm2, up, down)  # type: ignore[arg-type]
        return grad_x.view(of_x), None, None, None, None, None, None, *_flat(gradients)


# Conversion of weights to a flat list, because autograd needs tensors as arguments, and back.


def _linears(weights: BlockWeights) -> tuple[Linear, Linear, Linear, Linear]:
    return weights.qkv, weights.out, weights.gate_up, weights.down


def _flat(weights: BlockWeights) -> list[Tensor]:
    linears = (each for linear in _linears(weights) for part in linear for each in part)
    return [weights.norm1, weights.norm2, *linears]


def _nested(flat: Sequence[Any], counts: Sequence[tuple[int, int]]) -> Any:
    norm1, norm2, *rest = flat
    linears = []
    for num_weights, num_biases in counts:
        end = num_weights + num_biases
        linears.append(Linear(tuple(rest[:num_weights]), tuple(rest[num_weights:end])))
        rest = rest[end:]
    qkv, out, gate_up, down = linears
    return BlockWeights(norm1, qkv, out, norm2, gate_up, down)


# Matrix products.


def _bias(linear: Linear) -> Tensor | None:
    if not linear.biases:
        return None
    joined = adjacent(linear.biases)
    return torch.cat(linear.biases) if joined is None else joined


def _linear(x: Tensor, linear: Linear) -> Tensor:
    """The concatenated outputs of all layers of ``linear``: (T, sum of out features)."""
    weight, bias = adjacent(linear.weights), _bias(linear)
    if weight is not None:
        return F.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], sum(len(each) for each in linear.weights))
    for part, each in zip(_columns(out, linear), linear.weights, strict=True):
        torch.mm(x, each.t(), out=part)
    return out if bias is None else out.add_(bias)


def _added_linear(x: Tensor, y: Tensor, linear: Linear) -> Tensor:
    """``x`` plus the output of the one layer of ``linear`` for ``y``; rounded once if the layer has no bias."""
    (weight,) = linear.weights
    if not linear.biases:
        return torch.addmm(x, y, weight.t())
    return torch.addmm(linear.biases[0], y, weight.t()).add_(x)


def _input_gradient(grad: Tensor, linear: Linear) -> Tensor:
    """The gradient of the layers' input, computed from the gradient of their outputs."""
    weight = adjacent(linear.weights)
    if weight is not None:
        return grad @ weight
    first, *others = zip(_columns(grad, linear), linear.weights, strict=True)
    total = first[0] @ first[1]
    for part, each in others:
        total.addmm_(part, each)
    return total


def _linear_gradients(grad: Tensor, x: Tensor, linear: Linear, wanted: Linear) -> Linear:
    """The gradients of weights and biases, computed from the gradient of the outputs. ``wanted`` has a bool for each of
    them; where it is False, the gradient is None."""
    sizes = [len(each) for each in linear.weights]
    weights = (grad.t() @ x).split(sizes) if any(wanted.weights) else wanted.weights
    biases = grad.sum(0).split(sizes) if any(wanted.biases) else wanted.biases
    return Linear(*(_only(each, which) for each, which in ((weights, wanted.weights), (biases, wanted.biases))))


def _only(gradients: Sequence[Any], wanted: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(each if is_wanted else None for each, is_wanted in zip(gradients, wanted, strict=True))


def _columns(x: Tensor, linear: Linear) -> tuple[Tensor, ...]:
    return x.split([len(each) for each in linear.weights], dim=1)


# Rows and heads.


def _split_heads(heads: Tensor, shape: BlockShape) -> tuple[Tensor, ...]:
    """Query, key and value as views of ``heads`` (T, H + 2 H_kv, head_dim)."""
    return heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)


def _take(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _spread(x: Tensor, rows: Rows, num_rows: int) -> Tensor:
    """A tensor (num_rows, D) that has ``x`` (U, D) at ``rows`` and zeros elsewhere; differentiable."""
    if isinstance(rows, slice):
        return F.pad(x, (0, 0, rows.start, num_rows - rows.start - len(x)))
    return x.new_zeros(num_rows, x.shape[1]).index_copy(0, rows, x)
