"""The clipped policy loss directly from hidden states and the language-model head, without storing the (T, V) logits.

This op combines ``linear_logprobs`` and ``policy_loss``; their modules have the mathematics. The loss depends on token
t only through its log-probability, so g_t, the gradient with respect to that log-probability, can be computed as soon
as the log-probability is known. This has three consequences:

- When ``native`` and ``triton`` compute gradients, they leave out tokens whose g_t is exactly zero because the
  advantage is 0 or the token is clipped. The result stays exact. On a GPU the host has to wait for the number of these
  tokens, so ``triton_chunks`` leaves them out only if ``old_logprobs`` are given: without them no token is clipped.
- If an input requires a gradient, the forward computes the gradients of hidden and weight while the logits of a chunk
  of tokens are in memory: three matrix products instead of four (``reference`` recomputes the logits). The backward
  only multiplies these gradients by the gradient of the loss.
- Instead of using chunks, ``triton`` recomputes the logits slice by slice of the vocabulary (``triton.py``) if there
  would be too many chunks, for ``filter_eps``, and for float16. For float16 it computes the gradients in the backward,
  because a loss scale must be applied to them before they are rounded.

``filter_eps`` makes the gradient cheaper and approximate, as in cut cross-entropy (arXiv 2411.09009). If the softmax of
a vocabulary column stays below ``filter_eps`` for a whole block of tokens and the column is the target of none of them,
the column *may* be left out of their gradient. An entry of d z (see ``linear_logprobs``) whose softmax is at least
``filter_eps`` is never left out, so every missing entry is smaller than filter_eps * |g_t| / temperature. The loss and
the metrics stay exact. ``native`` and ``reference`` decide for ``FILTER_BLOCK`` tokens and a single column at a time,
``triton`` for a tile of the matrix product. ``filter_eps`` saves time on a CPU if the distributions are peaked, as
those of a trained policy are. On an H200 the filtered products have so far been slower than the unfiltered ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from balcaprl.kernels.head import native as native_head
from balcaprl.kernels.head.linear_logprobs import (
    IMPLS,
    check_head,
    check_logprobs,
    check_targets,
    head_gradients,
    head_rows,
    linear_logprobs_backward,
    linear_logprobs_reference,
    raise_for_logprobs,
    resolve_impl,
)
from balcaprl.kernels.head.records import Head, HeadGradients
from balcaprl.kernels.loss.policy_loss import policy_loss_reference
from balcaprl.kernels.loss.records import LOSS_SCHEMA, LossArguments, PolicyLoss, TokenLoss
from balcaprl.kernels.loss.token_loss import (
    check_arguments,
    check_parts,
    policy_loss_metrics,
    raise_invalid,
    token_batch,
    token_loss,
)
from balcaprl.kernels.support.checks import check_impl, check_number, check_tensor
from balcaprl.kernels.support.dispatch import compute_dtype
from balcaprl.kernels.support.native_softmax import SoftmaxRows

_NUM_LOSS = len(LossArguments._fields)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampling_logprobs: Tensor | None = None,
    sampling_ratio_cap: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    reduction: str = "token-mean",
    normalizer: float | None = None,
    temperature: float = 1.0,
    filter_eps: float | None = None,
    logprobs_out: Tensor | None = None,
    impl: str = "auto",
) -> PolicyLoss:
    """Loss and metrics of T completion tokens of R rollouts, from the hidden states that predict the tokens.

    Args:
        hidden: (T, D) float32, float64, bfloat16 or float16; row t is the hidden state that predicts token t.
        weight: (V, D) weight of the head, with the dtype and device of ``hidden``; autocast casts both.
        targets: (T,) int64 ids of the completion tokens, 0 <= target < V.
        old_logprobs: (T,) floating log-probabilities under the policy at the start of this batch's updates; None means
            on-policy: the log-probabilities of this forward.
        advantages: (R,) floating, the advantage of each rollout.
        cu_seqlens: (R + 1,) int32 offsets that never fall, from 0 to T: rollout j has tokens cu_seqlens[j] to
            cu_seqlens[j + 1] - 1.
        clip_low: see ``policy_loss`` for this argument and all others up to ``normalizer``.
        temperature: number > 0 that divides the logits.
        filter_eps: None for exact gradients, or a threshold above 0 and at most 1 (see the module's docstring); 2^-12
            is below the precision of a bfloat16 gradient.
        logprobs_out: (T,) floating tensor that receives the detached log-probabilities, for use as ``old_logprobs`` of
            later updates.
        impl: ``native`` (CPU), ``triton`` (CUDA, or CPU under Triton's interpreter), ``reference`` or ``auto``. Only
            ``reference`` supports float64.

    Returns:
        The loss, differentiable once in ``hidden`` and ``weight``, and the detached metrics; float64 for float64
        inputs, otherwise float32.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range, or a value that is not allowed; the message
            starts with the argument's name. On a GPU an invalid value is found later: the loss is NaN, and a later op
            or ``kernels.support.deferred.raise_pending`` raises the error.
        RuntimeError: ``impl`` is ``native`` and the compiled library is not available.
    """
    hidden, weight = check_head(hidden, weight, targets, temperature)
    arguments = LossArguments(
        old_logprobs,
        advantages,
        cu_seqlens,
        clip_low,
        clip_high,
        sampling_logprobs,
        sampling_ratio_cap,
        reference_logprobs,
        kl_coef,
        reduction,
        normalizer,
    )
    check_arguments(arguments, hidden.shape[0], hidden.device)
    if filter_eps is not None:
        check_number("filter_eps", filter_eps, low=0.0, high=1.0, exclusive_low=True)
        filter_eps = float(filter_eps)
    check_impl("linear_policy_loss", impl, IMPLS)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    head = (hidden, weight, targets)
    numbers = (float(temperature), filter_eps, *needs)
    loss, metrics, _, logprobs, *_ = _linear_policy_loss_op(*head, *arguments.plain(), *numbers, impl)
    if logprobs_out is not None:
        check_tensor("logprobs_out", logprobs_out, shape=(hidden.shape[0],), device=hidden.device)
        logprobs_out.copy_(logprobs.detach())
    return arguments.result(loss, metrics)


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float = 1.0,
    filter_eps: float | None = None,
    **options: Any,
) -> PolicyLoss:
    """The specification of ``linear_policy_loss``, in plain PyTorch with autograd's own gradient.

    Takes the same arguments except ``logprobs_out`` and ``impl``, and does not check them.
    """
    logprobs, _ = linear_logprobs_reference(hidden, weight, targets, temperature=temperature, filter_eps=filter_eps)
    return policy_loss_reference(logprobs, old_logprobs, advantages, cu_seqlens, **options)


def _gradients_in_forward(hidden: Tensor, impl: str) -> bool:
    """Whether the op's forward computes the gradients; does not resolve ``impl``, so that it can be traced."""
    return hidden.dtype != torch.float16 or (hidden.device.type == "cpu" and impl != "triton")


@torch.library.custom_op(
    "balcaprl::linear_policy_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor targets, {LOSS_SCHEMA}, float temperature, float? filter_eps, "
    "bool needs_hidden, bool needs_weight, str impl) -> (Tensor loss, Tensor metrics, Tensor grad_logprobs, "
    "Tensor logprobs, Tensor row_max, Tensor row_sum, Tensor grad_hidden, Tensor grad_weight)",
)
def _linear_policy_loss_op(hidden, weight, targets, *rest):
    """Runs the forward and its checks of values, which a tracer does not see.

    ``grad_hidden`` and ``grad_weight`` have shape (0,) if the forward does not compute them.
    """
    arguments = LossArguments(*rest[:_NUM_LOSS])
    temperature, filter_eps, *needs, impl = rest[_NUM_LOSS:]
    if not _gradients_in_forward(hidden, impl):
        needs = [False, False]
    impl = resolve_impl(impl, hidden)
    head = Head.of(hidden, weight, targets, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        parts, rows, gradients = _forward(head, arguments, filter_eps, tuple(needs), impl)
    dtype = rows.logprobs.dtype
    loss = torch.stack([part.loss_sum for part in parts]).sum().to(dtype)
    metrics = policy_loss_metrics(torch.stack([part.metric_sums for part in parts])).to(dtype)
    grad_logprobs = torch.cat([part.grad_logprobs for part in parts])
    made = (hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, metrics, grad_logprobs, rows.logprobs, rows.max, rows.sum, *made


def _forward(
    head: Head, arguments: LossArguments, filter_eps: float | None, needs: tuple[bool, bool], impl: str
) -> tuple[list[TokenLoss], SoftmaxRows, HeadGradients]:
    """Returns the loss of each part of the tokens, the softmax rows, and the gradients that are needed."""
    num_tokens = head.hidden.shape[0]
    batch = token_batch(arguments, num_tokens, compute_dtype(head.hidden.dtype), impl)
    parts: list[TokenLoss] = []

    def add(logprobs: Tensor, begin: int, end: int) -> Tensor:
        parts.append(token_loss(logprobs, batch.rows(begin, end), arguments.settings, impl))
        return parts[-1].grad_logprobs

    if impl == "native" and num_tokens:
        check_targets(head.targets, head.weight.shape[0])
        rows, gradients = native_head.logprobs_and_gradients(head, add, needs, filter_eps)
        check_logprobs(head, rows.logprobs)
        return parts, rows, gradients
    size = None
    if impl == "triton" and num_tokens and any(needs) and filter_eps is None:
        from balcaprl.kernels.head import triton_chunks as chunks

        size = chunks.chunk_size(num_tokens, head.weight.shape[0], head.hidden.element_size())
    if size is not None:
        listed = arguments.old_logprobs is not None
        rows, gradients = chunks.logprobs_and_gradients(head, add, needs, size, listed=listed)
    else:
        rows, _ = head_rows(head, impl, with_entropy=False)
        if impl != "triton":
            check_logprobs(head, rows.logprobs)
        add(rows.logprobs, 0, num_tokens)
        gradients = HeadGradients(None, None)
        if any(needs):
            gradients = head_gradients(head, rows, parts[0].grad_logprobs, needs, filter_eps, impl)
    check_parts(parts, partial(_explain, arguments, batch.status, head.targets, head.weight.shape[0]))
    return parts, rows, gradients


def _explain(arguments: LossArguments, status: Tensor | None, targets: Tensor, vocabulary: int) -> NoReturn:
    """Raises ValueError for what ``check_parts`` found: an argument of the loss, a target, or the logits."""
    if status is not None and status.any():
        raise_invalid(arguments, targets.shape[0])
    raise_for_logprobs(targets, vocabulary)


@_linear_policy_loss_op.register_fake
def _linear_policy_loss_fake(hidden, weight, targets, *rest):
    dtype, made = compute_dtype(hidden.dtype), _gradients_in_forward(hidden, rest[-1])
    needs_hidden, needs_weight = rest[-3:-1]
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(5, dtype=dtype),
        *(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4)),
        hidden.new_empty(hidden.shape if made and needs_hidden else (0,)),
        weight.new_empty(weight.shape if made and needs_weight else (0,)),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, targets = inputs[:3]
    ctx.temperature, ctx.filter_eps, *ctx.needs, ctx.impl = inputs[3 + _NUM_LOSS :]
    ctx.made = _gradients_in_forward(hidden, ctx.impl)
    _, metrics, grad_logprobs, logprobs, row_max, row_sum, *made = output
    # Keeps autograd from allocating full-size zero gradients for the outputs that are not differentiable.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(metrics, grad_logprobs, logprobs, row_max, row_sum, *made)
    if ctx.made:
        ctx.save_for_backward(*made)
    else:
        ctx.save_for_backward(grad_logprobs, hidden, weight, targets, logprobs, row_max, row_sum)


def _backward(ctx, grad_loss, *_):
    nothing = [None] * (1 + _NUM_LOSS + 5)
    if grad_loss is None:
        return None, None, *nothing
    if ctx.made:
        gradients = [_scaled(gradient, grad_loss, ctx.impl) for gradient in ctx.saved_tensors]
    else:
        grad_logprobs, *saved = ctx.saved_tensors
        # grad_loss is not read as a number, because the host would have to wait for the device.
        arguments = (grad_logprobs * grad_loss, *saved, ctx.temperature, ctx.filter_eps, *ctx.needs, ctx.impl)
        gradients = linear_logprobs_backward(*arguments)
    wanted = (g if needed else None for g, needed in zip(gradients, ctx.needs, strict=True))
    return *wanted, *nothing


def _scaled(gradient: Tensor, grad_loss: Tensor, impl: str) -> Tensor:
    """Returns gradient * grad_loss, in the storage of ``gradient`` where possible, to avoid a copy of that size.

    The saved tensor may be overwritten and returned if the graph is freed after this backward; autograd then uses it
    directly as the parameter's ``.grad``. While torch.compile traces, values cannot be read and memory must not be
    reused, so the product is a new tensor. With ``triton`` a kernel reads the factor, so the host need not wait for it.
    """
    plain = type(gradient) is Tensor and type(grad_loss) is Tensor and not torch.compiler.is_compiling()
    if not plain or _graph_is_kept():
        return gradient * grad_loss.to(gradient.dtype)
    if gradient.is_contiguous() and resolve_impl(impl, gradient) == "triton":
        from balcaprl.kernels.head import triton as triton_head

        return triton_head.scale_(gradient, grad_loss)
    factor = float(grad_loss)
    return gradient if factor == 1.0 else gradient.mul_(factor)


def _graph_is_kept() -> bool:
    """Whether the running backward was called with ``retain_graph``; assumed true if torch cannot tell."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if kept is None else kept()


_linear_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
