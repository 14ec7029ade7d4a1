"""Attention of packed groups: each prompt is stored once, and each completion attends to its prompt and to itself.

``layout.py`` defines the token order: ``[prompt | completion 1 | ... | completion G]`` for each group.
There are H query heads and H_kv key heads; query head h uses key head h // (H / H_kv). Let a(t) be the packed tokens
that token t sees: its own segment up to itself, and its group's prompt. Then::

    s_hti  = scale * q_ht . k_hi                           i in a(t)
    lse_ht = log sum_i exp(s_hti)
    out_ht = sum_i exp(s_hti - lse_ht) v_hi

With g the gradient of ``out``, p = exp(s - lse) and delta_ht = g_ht . out_ht, the gradients are::

    d v_i = sum_t p_ti g_t,    ds_ti = p_ti (g_t . v_i - delta_t),    d q_t = scale sum_i ds_ti k_i
    d k_i = scale sum_t ds_ti q_t

where the sums over t also run over all query heads that use the key head.

Every sum over i splits into a part over the prompt and a part over the token's own segment, so an implementation can
compute the two parts separately. The forward joins the parts by their log-sum-exp. The backward of each part needs only
the joint ``lse`` and ``out``, and the gradients of the parts add up. Only the specification stores a mask and a score
matrix, for one group at a time.

=============  =======================================================================================================
``reference``  the specification: plain PyTorch, a mask per group, any device and dtype; ``reference.py``
``sdpa``       PyTorch's fused attention kernel on CPU, a few calls for all groups; ``sdpa.py``
``flash``      flash-attn's varlen kernels on CUDA; ``flash.py``
``triton``     our kernels: a group's completions share the reads of the prompt's keys; ``triton.py``
=============  =======================================================================================================
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from balcaprl.kernels.shared_prefix.layout import LAYOUT_FIELDS, TRITON_MAX_HEAD_DIM, SharedPrefixLayout
from balcaprl.kernels.shared_prefix.records import AttentionInputs
from balcaprl.kernels.support import launch
from balcaprl.kernels.support.checks import check_impl, check_number, check_tensor
from balcaprl.kernels.support.dispatch import compute_dtype

IMPLS = ("reference", "sdpa", "flash", "triton")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefixLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention output (T, H, head_dim) of packed groups, in the dtype of ``query``; differentiable once.

    Under autocast, query, key and value are first cast to the autocast dtype unless they are float64, as in PyTorch's
    own attention.

    Args:
        query: (T, H, head_dim) float32, float64, bfloat16 or float16, packed as ``layout`` says. Any strides.
        key: (T, H_kv, head_dim), H a multiple of H_kv.
        value: (T, H_kv, head_dim).
        layout: layout of the T tokens, on the device of ``query``.
        scale: factor of the scores. None means head_dim ** -0.5.
        softcap: must be None, because no implementation caps scores. The argument exists so that models that need a
            soft cap fail loudly.
        impl: ``sdpa`` (CPU), ``flash`` (CUDA, half precision), ``triton`` (CUDA; CPU under Triton's interpreter),
            ``reference`` or ``auto``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range, or the layout does not describe T tokens; the
            message starts with the argument's name.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    _check_arguments(query, key, value, layout, scale, softcap)
    check_impl("shared_prefix_attention", impl, IMPLS)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.compiler.is_compiling():
        out, _ = _attention_op(query, key, value, layout.tensors(), scale, impl)
        return out
    return _Attention.apply(query, key, value, layout, scale, impl)  # type: ignore[no-any-return]


def _check_arguments(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, scale: float | None, softcap: float | None
) -> None:
    check_tensor("query", query, shape=("T", "H", "head_dim"), dtypes=_DTYPES)
    num_tokens, num_heads, head_dim = query.shape
    check_tensor("key", key, shape=(num_tokens, "H_kv", head_dim), dtypes=(query.dtype,), device=query.device)
    if key.shape[1] == 0 or num_heads % key.shape[1]:
        raise ValueError(f"key: {key.shape[1]} heads do not divide the {num_heads} heads of query")
    check_tensor("value", value, shape=tuple(key.shape), dtypes=(query.dtype,), device=query.device)
    if not isinstance(layout, SharedPrefixLayout):
        raise ValueError(f"layout: expected a SharedPrefixLayout, got {type(layout).__name__}; see from_lengths")
    check_tensor("layout.cu_seqlens", layout.cu_seqlens, shape=("S + 1",), dtypes=(torch.int32,), device=query.device)
    if layout.num_tokens != num_tokens:
        raise ValueError(f"layout: it is of {layout.num_tokens} packed tokens, query has {num_tokens}")
    if scale is not None:
        check_number("scale", scale, low=0.0, exclusive_low=True)
    if softcap is not None:
        raise ValueError(
            f"softcap: {softcap} is not supported, scores are not capped here; use the model's own attention"
        )


def resolve_impl(impl: str, query: Tensor) -> str:
    """The name of the implementation to use for ``query``; ``auto`` selects the fastest that can run.

    Raises:
        ValueError: the implementation cannot run on such tensors; the message starts with ``impl``.
    """
    if impl == "auto":
        if query.device.type == "cpu":
            return "sdpa"
        if query.device.type != "cuda" or query.dtype == torch.float64:
            return "reference"
        if launch.has_triton() and query.shape[-1] <= TRITON_MAX_HEAD_DIM:
            return "triton"
        return "flash" if _implementation("flash").can_run(query) else "reference"
    if impl == "sdpa" and query.device.type != "cpu":
        raise ValueError(f"impl: 'sdpa' runs on the CPU, query is on {query.device}; use 'auto'")
    if impl == "triton":
        launch.check_triton(query.device)
    return impl


@functools.cache
def _implementation(impl: str) -> ModuleType:
    """Imports the module of ``impl`` only when it is needed, because ``triton.py`` requires triton.

    ``records.py`` says which functions each module has.
    """
    return importlib.import_module(f"{__package__}.{impl}")


class _Attention(torch.autograd.Function):
    """The op outside of torch.compile. It passes on the layout itself, together with the values that are cached there,
    and takes the host a fraction of the time of a custom op."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, scale: float, impl: str
    ) -> Tensor:
        ctx.implementation = _implementation(resolve_impl(impl, query))
        ctx.layout, ctx.scale = layout, scale
        with _without_autocast(query):
            out, lse = ctx.implementation.forward(AttentionInputs(query, key, value, layout, scale))
        ctx.save_for_backward(query, key, value, out, lse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        inputs = AttentionInputs(query, key, value, ctx.layout, ctx.scale)
        with _without_autocast(query):
            gradients = ctx.implementation.backward(grad_out, inputs, out, lse)
        return *gradients, None, None, None


def _without_autocast(query: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(query.device.type, enabled=False)


_SCHEMA = "Tensor query, Tensor key, Tensor value"


@torch.library.custom_op(
    "balcaprl::shared_prefix_attention",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor[] layout, float scale, str impl) -> (Tensor out, Tensor lse)",
)
def _attention_op(query: Tensor, key: Tensor, value: Tensor, layout: list[Tensor], scale: float, impl: str) -> Any:
    """Runs the forward in a compiled graph."""
    with _without_autocast(query):
        implementation = _implementation(resolve_impl(impl, query))
        return implementation.forward(AttentionInputs(query, key, value, SharedPrefixLayout(*layout), scale))


@_attention_op.register_fake
def _attention_fake(query, key, value, layout, scale, impl):
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=compute_dtype(query.dtype))
    return query.new_empty(query.shape), lse


@torch.library.custom_op(
    "balcaprl::shared_prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_SCHEMA}, Tensor out, Tensor lse, Tensor[] layout, float scale, str impl) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)
def _attention_backward_op(grad_out, query, key, value, out, lse, layout, scale, impl):
    implementation = _implementation(resolve_impl(impl, query))
    inputs = AttentionInputs(query, key, value, SharedPrefixLayout(*layout), scale)
    with _without_autocast(query):
        return implementation.backward(grad_out, inputs, out, lse)


@_attention_backward_op.register_fake
def _attention_backward_fake(grad_out, query, key, value, out, lse, layout, scale, impl):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, layout, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(query, key, value, *output, *layout)


def _backward(ctx, grad_out, _grad_lse):
    query, key, value, out, lse, *layout = ctx.saved_tensors
    arguments = (grad_out, query, key, value, out, lse, layout, ctx.scale, ctx.impl)
    return *_attention_backward_op(*arguments), [None] * len(LAYOUT_FIELDS), None, None


_attention_op.register_autograd(_backward, setup_context=_setup_context)
