"""The clipped policy loss from logits: a log-softmax followed by ``policy_loss``, for trainers that have the logits.

For token t with logits z_t, temperature tau and target y_t::

    logprobs_t = z_t,y / tau - log sum_v exp(z_tv / tau)
    loss       = policy_loss(logprobs, ...)

With g_t = d loss / d logprobs_t, which the forward computes with the loss, and p_t = softmax(z_t / tau)::

    d loss / d z_tv = g_t ([v = y_t] - p_tv) / tau

The forward reads the logits once and keeps four numbers per token. The backward reads the logits once and writes the
gradient once. In the backward, ``native`` and ``triton`` do not read the rows whose g_t is exactly 0 (no advantage, or
clipped). They store neither a float32 copy of the logits nor a softmax.

With ``inplace_grad=True`` the backward writes the gradient over the logits and returns their storage as the gradient,
so that the gradient needs no extra memory. The logits are lost after that backward. Autograd knows about the write: a
second backward through this loss, and the backward of any other op that saved the logits, raise autograd's "modified by
an inplace operation" error. Autograd cannot detect that the caller reads the logits tensor after ``backward()``; the
tensor then holds gradients. If the logits are a leaf, their ``.grad`` shares their storage.

A logit of -inf marks a forbidden token, which gets probability 0 and gradient 0; the target must not be forbidden.
NaN, +inf, -inf at the target, or a row without a finite logit raise ValueError.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from balcaprl.kernels.loss.policy_loss import policy_loss_reference
from balcaprl.kernels.loss.records import LOSS_SCHEMA, LossArguments, PolicyLoss
from balcaprl.kernels.loss.token_loss import (
    check_arguments,
    check_parts,
    policy_loss_metrics,
    raise_invalid,
    token_batch,
    token_loss,
)
from balcaprl.kernels.support import native
from balcaprl.kernels.support.checks import check_impl, check_number, check_tensor
from balcaprl.kernels.support.dispatch import compute_dtype, resolve_below_float64
from balcaprl.kernels.support.native_softmax import DTYPES, SoftmaxRows, write_stats

IMPLS = ("reference", "native", "triton")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CHUNK_LOGITS = 1 << 22


def logits_policy_loss(
    logits: Tensor,
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
    inplace_grad: bool = False,
    impl: str = "auto",
) -> PolicyLoss:
    """Loss and metrics of T completion tokens of R rollouts; the module's docstring has the mathematics.

    ``policy_loss`` describes the arguments from ``old_logprobs`` to ``normalizer`` in full.

    Args:
        logits: (T, V) float32, float64, bfloat16 or float16, with gradient; row t predicts token t. Rows need not be
            adjacent (a slice of columns); any other non-contiguous layout is copied. Float64 logits are computed in
            float64, all others in float32.
        targets: (T,) int64 token ids, 0 <= target < V.
        old_logprobs: (T,) floating log-probabilities at the start of this batch's updates, or None for on-policy.
        advantages: (R,) floating, the advantage of each rollout.
        cu_seqlens: (R + 1,) int32 offsets of the rollouts' tokens.
        clip_low: lower clip range, 0 <= clip_low <= 1.
        clip_high: upper clip range, >= 0.
        sampling_logprobs: (T,) floating log-probabilities that the sampler returned.
        sampling_ratio_cap: cap of the importance weight, > 0; needs ``sampling_logprobs``.
        reference_logprobs: (T,) floating log-probabilities under the reference policy.
        kl_coef: coefficient of the KL term, >= 0; a value above 0 needs ``reference_logprobs``.
        reduction: ``token-mean``, ``sequence-mean`` or ``constant``.
        normalizer: the global denominator, > 0.
        temperature: number > 0 that divides the logits.
        inplace_grad: whether the backward overwrites the logits with their gradient; the module's docstring has the
            rules. The rows must not overlap.
        impl: ``native`` (CPU), ``triton`` (CUDA, or CPU under Triton's interpreter), ``reference`` or ``auto``. Only
            ``reference`` supports float64.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range, or a value that is not allowed; the message
            starts with the argument's name. On a GPU an invalid value is found later: the loss is NaN, and a later op
            or ``kernels.support.deferred.raise_pending`` raises the error.
        RuntimeError: ``impl`` is ``native`` and the compiled library is not available.
    """
    check_tensor("logits", logits, shape=("T", "V"), dtypes=_DTYPES)
    check_tensor("targets", targets, shape=(logits.shape[0],), dtypes=(torch.int64,), device=logits.device)
    check_number("temperature", temperature, low=0.0, exclusive_low=True)
    check_impl("logits_policy_loss", impl, IMPLS)
    if inplace_grad and not _rows_stand_apart(logits):
        raise ValueError(
            "logits: inplace_grad writes over them and needs contiguous rows that do not overlap; got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )
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
    check_arguments(arguments, logits.shape[0], logits.device)
    loss, metrics, *_ = _logits_policy_loss_op(
        logits, targets, *arguments.plain(), float(temperature), bool(inplace_grad), impl
    )
    return arguments.result(loss, metrics)


def logits_policy_loss_reference(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> PolicyLoss:
    """The specification of ``logits_policy_loss``, in plain PyTorch with autograd's own gradient.

    Takes the same arguments except ``impl`` and ``inplace_grad``, and does not check them.
    """
    log_softmax = (logits.to(compute_dtype(logits.dtype)) / temperature).log_softmax(dim=-1)
    logprobs = log_softmax.gather(1, targets[:, None])[:, 0]
    return policy_loss_reference(logprobs, old_logprobs, advantages, cu_seqlens, **options)


def _rows_stand_apart(logits: Tensor) -> bool:
    """Whether each row is contiguous and no two rows share memory."""
    num_tokens, vocabulary = logits.shape
    return (logits.stride(1) == 1 or vocabulary <= 1) and (logits.stride(0) >= vocabulary or num_tokens <= 1)


def resolve_impl(impl: str, logits: Tensor) -> str:
    """Returns the implementation to run for ``logits``; ``auto`` becomes the fastest one that can run.

    Raises:
        ValueError: ``impl`` cannot run on such tensors; the message starts with ``impl``.
    """
    return resolve_below_float64(impl, logits, "logits are")


@torch.library.custom_op(
    "balcaprl::logits_policy_loss",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {LOSS_SCHEMA}, float temperature, bool inplace_grad, str impl) "
    "-> (Tensor loss, Tensor metrics, Tensor row_max, Tensor row_sum, Tensor logprobs, Tensor grad_logprobs)",
)
def _logits_policy_loss_op(logits, targets, *rest):
    """Runs the forward and its checks of values, which a tracer does not see.

    Returns the loss, the (5,) metrics, and four (T,) tensors for the backward.
    """
    arguments, (temperature, _, impl) = LossArguments(*rest[:-3]), rest[-3:]
    impl, dtype = resolve_impl(impl, logits), compute_dtype(logits.dtype)
    batch = token_batch(arguments, logits.shape[0], dtype, impl)
    rows = _row_stats(_with_rows(logits), targets.contiguous(), temperature, impl)
    if impl != "triton":
        _check_logprobs(rows.logprobs, targets, logits.shape[1])
    part = token_loss(rows.logprobs, batch, arguments.settings, impl)
    check_parts([part], partial(_explain, arguments, batch.status, rows.logprobs, targets, logits.shape[1]))
    return part.loss_sum.to(dtype), policy_loss_metrics(part.metric_sums).to(dtype), *rows, part.grad_logprobs


@_logits_policy_loss_op.register_fake
def _logits_policy_loss_fake(logits, *_):
    dtype = compute_dtype(logits.dtype)
    sizes: list[Any] = [(), 5, *[logits.shape[0]] * 4]
    return tuple(logits.new_empty(size, dtype=dtype) for size in sizes)


def _with_rows(logits: Tensor) -> Tensor:
    """Returns the logits, or a contiguous copy if the values of a row are not contiguous."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _row_stats(logits: Tensor, targets: Tensor, temperature: float, impl: str) -> SoftmaxRows:
    """Softmax statistics of each row of the logits, with the log-probabilities of the targets.

    A target out of range raises, or with ``triton`` gives a log-probability of NaN.
    """
    if impl == "triton":
        from balcaprl.kernels.loss import triton_logits

        return triton_logits.stats(logits, targets, 1.0 / temperature)
    # The reference leaves max and sum at 0: its backward does not use them.
    rows = SoftmaxRows(*(logits.new_zeros(len(targets), dtype=compute_dtype(logits.dtype)) for _ in range(3)))
    if impl == "native":
        write_stats(logits, targets, 1.0 / temperature, rows, None)
        return rows
    _check_targets(targets, logits.shape[1])
    for chunk in _chunks(logits):
        log_softmax = (logits[chunk].to(rows.logprobs.dtype) / temperature).log_softmax(dim=-1)
        rows.logprobs[chunk] = log_softmax.gather(1, targets[chunk, None])[:, 0]
    return rows


def _chunks(logits: Tensor) -> list[slice]:
    """The ranges of rows that the reference processes at once."""
    size = max(1, _CHUNK_LOGITS // max(logits.shape[1], 1))
    return [slice(begin, begin + size) for begin in range(0, logits.shape[0], size)]


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() and not ((targets >= 0) & (targets < vocabulary)).all():
        raise ValueError(
            f"targets: expected token ids in [0, {vocabulary}), got {int(targets.min())} to {int(targets.max())}"
        )


def _check_logprobs(logprobs: Tensor, targets: Tensor, vocabulary: int) -> None:
    """Checks that all log-probabilities are finite."""
    if not logprobs.isfinite().all():
        _raise_for_logprobs(logprobs, targets, vocabulary)


def _raise_for_logprobs(logprobs: Tensor, targets: Tensor, vocabulary: int) -> NoReturn:
    """Raises ValueError for the argument that makes some log-probabilities not finite."""
    _check_targets(targets, vocabulary)
    bad = (~logprobs.isfinite()).nonzero()[:, 0].tolist()
    raise ValueError(
        f"logits: {len(bad)} rows, the first of them {min(bad, default=-1)}, hold NaN, +inf, -inf at the target, or "
        "nothing finite"
    )


def _explain(
    arguments: LossArguments, status: Tensor | None, logprobs: Tensor, targets: Tensor, vocabulary: int
) -> NoReturn:
    """Raises ValueError for what ``check_parts`` found: an argument of the loss, a target, or the logits."""
    if status is not None and status.any():
        raise_invalid(arguments, logprobs.shape[0])
    _raise_for_logprobs(logprobs, targets, vocabulary)


_ROW_SCHEMA = (
    "Tensor targets, Tensor row_max, Tensor row_sum, Tensor logprobs, Tensor grad_logprobs, Tensor grad_loss, "
    "float temperature, str impl"
)


@torch.library.custom_op(
    "balcaprl::logits_policy_loss_backward",
    mutates_args=(),
    schema=f"(Tensor logits, {_ROW_SCHEMA}) -> Tensor",
)
def _backward_op(logits, *rest):
    """Returns the gradient of the logits as a new tensor."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(_with_rows(logits), out, *rest)
    return out


@_backward_op.register_fake
def _backward_fake(logits, *_):
    return logits.new_empty(logits.shape)


@torch.library.custom_op(
    "balcaprl::logits_policy_loss_backward_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_ROW_SCHEMA}) -> ()",
)
def _backward_inplace_op(logits, *rest):
    """Overwrites the logits with their gradient."""
    _write_gradient(logits, logits, *rest)


@_backward_inplace_op.register_fake
def _backward_inplace_fake(logits, *_):
    return None


def _write_gradient(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    logprobs: Tensor,
    grad_logprobs: Tensor,
    grad_loss: Tensor,
    temperature: float,
    impl: str,
) -> None:
    impl, scale, targets = resolve_impl(impl, logits), 1.0 / temperature, targets.contiguous()
    rows = SoftmaxRows(*(values.contiguous() for values in (row_max, row_sum, logprobs)))
    if impl == "triton":
        from balcaprl.kernels.loss import triton_logits

        triton_logits.gradient(logits, targets, rows, grad_logprobs.contiguous(), grad_loss, scale, out)
        return
    grad_logprobs = (grad_logprobs * grad_loss).to(logprobs.dtype).contiguous()
    if impl == "native":
        _write_gradient_native(logits, targets, rows, grad_logprobs, scale, out)
        return
    for chunk in _chunks(logits):
        gradient = grad_logprobs[chunk, None] / temperature
        values = (logits[chunk].to(logprobs.dtype) / temperature).softmax(dim=-1) * -gradient
        # 1 - p is computed as -expm1(log p), which stays accurate when p is near 1.
        values.scatter_(1, targets[chunk, None], -gradient * rows.logprobs[chunk, None].expm1())
        out[chunk] = values.masked_fill_(gradient == 0.0, 0.0)


def _write_gradient_native(
    logits: Tensor, targets: Tensor, rows: SoftmaxRows, grad_logprobs: Tensor, scale: float, out: Tensor
) -> None:
    """Writes the gradient with ``kernels/csrc/logits_policy_loss.cpp``."""
    status = native.library().balcaprl_logits_gradient(
        DTYPES.index(logits.dtype),
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        scale,
        targets.data_ptr(),
        *(values.data_ptr() for values in rows),
        grad_logprobs.data_ptr(),
        out.data_ptr(),
        out.stride(0),
    )
    if status != native.OK:
        raise RuntimeError(f"the native library refused its arguments (status {status}): this is a bug in balcaprl")


def _setup_context(ctx, inputs, output):
    logits, targets, *_, ctx.temperature, ctx.inplace_grad, ctx.impl = inputs
    ctx.save_for_backward(logits, targets, *output[2:])


def _backward(ctx, grad_loss, *_):
    logits, *tensors = ctx.saved_tensors
    arguments = (*tensors, grad_loss, ctx.temperature, ctx.impl)
    if ctx.inplace_grad:
        # The detached tensor shares storage and version counter with the logits, so autograd notices the write in every
        # op that saved the logits.
        gradient = logits.detach()
        _backward_inplace_op(gradient, *arguments)
    else:
        gradient = _backward_op(logits, *arguments)
    return gradient, *([None] * (len(LossArguments._fields) + 4))


_logits_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
