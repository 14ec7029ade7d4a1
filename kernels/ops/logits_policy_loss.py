"""The clipped policy loss straight from logits, for trainers that hold them: ``policy_loss`` behind a log-softmax.

For token t with logits z_t, temperature tau and target y_t::

    logprobs_t = z_t,y / tau - log sum_v exp(z_tv / tau)
    loss       = policy_loss(logprobs, ...)

With g_t = d loss / d logprobs_t, which the forward computes with the loss, and p_t = softmax(z_t / tau)::

    d loss / d z_tv = g_t ([v = y_t] - p_tv) / tau

The forward reads the logits once and keeps three numbers per token; the backward reads them once and writes once. Rows whose
g_t is exactly 0 (no advantage, stopped by the clip) are not read again. No float32 copy and no softmax is ever stored.

``inplace_grad=True``: the backward writes the gradient over the logits and hands their storage on, so that it needs no
memory of its own. After that backward the logits are gone. Autograd knows of the write: a second backward through this loss,
and the backward of any other op that saved the logits, raise its "modified by an inplace operation" error. What autograd
cannot see is the caller's own reading of the values after ``backward()``: they are gradients then. A leaf's ``.grad`` shares
its storage.

What logits may hold: -inf at a token that is not the target is a forbidden token, with probability and gradient 0. NaN, +inf,
-inf at the target, or a row without a finite logit raise ValueError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balcaprl.kernels import launch, native
from balcaprl.kernels.checks import check_impl, check_number, check_tensor
from balcaprl.kernels.native_softmax import DTYPES, SoftmaxRows, write_stats
from balcaprl.kernels.policy_loss import policy_loss_reference
from balcaprl.kernels.token_loss import (
    LOSS_SCHEMA,
    LossArguments,
    PolicyLoss,
    check_arguments,
    compute_dtype,
    policy_loss_metrics,
    token_batch,
    token_loss,
)

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
    """Loss and metrics of T completion tokens of R rollouts; the mathematics are above and in ``policy_loss``.

    Args:
        logits: (T, V) float32, float64, bfloat16 or float16, with gradient; row t predicts token t. Rows may lie apart
            (a slice of columns); anything else that is not contiguous is copied. Float64 is computed in float64, all
            else in float32.
        targets: (T,) int64, 0 <= target < V.
        old_logprobs: (T,) floating, or None for on-policy; this and all from here to ``normalizer`` as ``policy_loss``
            takes them.
        advantages: (R,) floating.
        cu_seqlens: (R + 1,) int32.
        clip_low: 0 <= clip_low <= 1.
        clip_high: >= 0.
        sampling_logprobs: (T,) floating.
        sampling_ratio_cap: > 0; needs ``sampling_logprobs``.
        reference_logprobs: (T,) floating.
        kl_coef: >= 0; above 0 it needs ``reference_logprobs``.
        reduction: ``token-mean``, ``sequence-mean`` or ``constant``.
        normalizer: > 0, the global denominator.
        temperature: > 0, divides the logits.
        inplace_grad: the logits' storage becomes their gradient in the backward; the module's docstring has the rules.
            The rows must not overlap.
        impl: ``native`` (CPU), ``triton`` (CUDA; CPU under Triton's interpreter), ``reference`` or ``auto``. Only
            ``reference`` has float64.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, range, or a value that has no meaning; the message
            starts with its name.
        RuntimeError: ``impl="native"`` and the compiled library is not available.
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
    """The specification, in plain PyTorch with autograd's own gradient; arguments as above, unchecked, but no ``impl`` and no
    ``inplace_grad``."""
    log_softmax = (logits.to(compute_dtype(logits.dtype)) / temperature).log_softmax(dim=-1)
    logprobs = log_softmax.gather(1, targets[:, None])[:, 0]
    return policy_loss_reference(logprobs, old_logprobs, advantages, cu_seqlens, **options)


def _rows_stand_apart(logits: Tensor) -> bool:
    """Whether each row is contiguous and no two share memory."""
    num_tokens, vocabulary = logits.shape
    return (logits.stride(1) == 1 or vocabulary <= 1) and (logits.stride(0) >= vocabulary or num_tokens <= 1)


def _resolve(impl: str, logits: Tensor) -> str:
    """The implementation that ``impl`` means; ``auto`` is the fastest that can run.

    Raises:
        ValueError: it cannot run on such logits.
    """
    has_dtype = logits.dtype != torch.float64
    if impl == "auto":
        if logits.device.type == "cuda" and has_dtype and launch.has_triton():
            return "triton"
        if logits.device.type != "cpu" or not has_dtype:
            return "reference"
        if native.is_available():
            return "native"
        native.warn_unavailable()
        return "reference"
    if impl != "reference" and not has_dtype:
        raise ValueError(f"impl: {impl!r} has no float64; use 'reference' or 'auto'")
    if impl == "native" and logits.device.type != "cpu":
        raise ValueError(f"impl: 'native' runs on the CPU, logits are on {logits.device}")
    if impl == "triton":
        launch.check_triton(logits.device)
    return impl


@torch.library.custom_op(
    "balcaprl::logits_policy_loss",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {LOSS_SCHEMA}, float temperature, bool inplace_grad, str impl) "
    "-> (Tensor loss, Tensor metrics, Tensor row_max, Tensor row_sum, Tensor logprobs, Tensor grad_logprobs)",
)
def _logits_policy_loss_op(logits, targets, *rest):
    """Checks values, out of sight of the tracer; returns the loss, (5,) metrics, and four (T,) for the backward."""
    arguments, (temperature, _, impl) = LossArguments(*rest[:-3]), rest[-3:]
    impl, dtype = _resolve(impl, logits), compute_dtype(logits.dtype)
    batch = token_batch(arguments, logits.shape[0], dtype, impl)
    rows = _row_stats(_with_rows(logits), targets.contiguous(), temperature, impl)
    _check_logprobs(rows.logprobs, logits, targets)
    loss, sums, grad_logprobs = token_loss(rows.logprobs, batch, arguments.settings, impl)
    return loss.to(dtype), policy_loss_metrics(sums).to(dtype), *rows, grad_logprobs


@_logits_policy_loss_op.register_fake
def _logits_policy_loss_fake(logits, *_):
    dtype = compute_dtype(logits.dtype)
    sizes: list[Any] = [(), 5, *[logits.shape[0]] * 4]
    return tuple(logits.new_empty(size, dtype=dtype) for size in sizes)


def _with_rows(logits: Tensor) -> Tensor:
    """The logits, copied if their columns are not contiguous."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _row_stats(logits: Tensor, targets: Tensor, temperature: float, impl: str) -> SoftmaxRows:
    """What each row's gradient is made of, and the log-probabilities; NaN, or an error, for a target out of range."""
    if impl == "triton":
        from balcaprl.kernels import triton_logits

        return triton_logits.stats(logits, targets, 1.0 / temperature)
    # The reference's backward needs none of the first two.
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
    """Rows that the reference takes at once."""
    size = max(1, _CHUNK_LOGITS // max(logits.shape[1], 1))
    return [slice(begin, begin + size) for begin in range(0, logits.shape[0], size)]


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() and not ((targets >= 0) & (targets < vocabulary)).all():
        raise ValueError(
            f"targets: expected token ids in [0, {vocabulary}), got {int(targets.min())} to {int(targets.max())}"
        )


def _check_logprobs(logprobs: Tensor, logits: Tensor, targets: Tensor) -> None:
    """One flag is read from the device; what was wrong is looked for only then."""
    finite = logprobs.isfinite()
    if not finite.all():
        _check_targets(targets, logits.shape[1])
        bad = (~finite).nonzero()[:, 0]
        raise ValueError(
            f"logits: {bad.numel()} rows, the first of them {int(bad[0])}, hold NaN, +inf, -inf at the target, or "
            "nothing finite"
        )


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
    """The gradient of the logits, apart from them."""
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
    """The gradient of the logits, over them."""
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
    impl, scale, targets = _resolve(impl, logits), 1.0 / temperature, targets.contiguous()
    rows = SoftmaxRows(*(values.contiguous() for values in (row_max, row_sum, logprobs)))
    if impl == "triton":
        from balcaprl.kernels import triton_logits

        triton_logits.gradient(logits, targets, rows, grad_logprobs.contiguous(), grad_loss, scale, out)
        return
    grad_logprobs = (grad_logprobs * grad_loss).to(logprobs.dtype).contiguous()
    if impl == "native":
        _write_gradient_native(logits, targets, rows, grad_logprobs, scale, out)
        return
    for chunk in _chunks(logits):
        gradient = grad_logprobs[chunk, None] / temperature
        values = (logits[chunk].to(logprobs.dtype) / temperature).softmax(dim=-1) * -gradient
        # 1 - p by way of expm1: near p = 1 it keeps its digits.
        values.scatter_(1, targets[chunk, None], -gradient * rows.logprobs[chunk, None].expm1())
        out[chunk] = values.masked_fill_(gradient == 0.0, 0.0)


def _write_gradient_native(
    logits: Tensor, targets: Tensor, rows: SoftmaxRows, grad_logprobs: Tensor, scale: float, out: Tensor
) -> None:
    """``kernels/csrc/logits_policy_loss.cpp``."""
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
        # Detached, it shares storage and version counter with the logits: the write is seen wherever they were saved.
        gradient = logits.detach()
        _backward_inplace_op(gradient, *arguments)
    else:
        gradient = _backward_op(logits, *arguments)
    return gradient, *([None] * (len(LossArguments._fields) + 4))


_logits_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
