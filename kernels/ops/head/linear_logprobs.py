"""Log-probabilities of chosen tokens, and entropies, directly from hidden states, without storing the (T, V) logits.

For token t with hidden state h_t, vocabulary rows w_v, temperature tau and target y_t::

    z_tv       = h_t . w_v / tau
    logprobs_t = z_t,y - log sum_v exp(z_tv)
    entropy_t  = - sum_v p_tv log p_tv,    p_t = softmax(z_t)                    detached: it has no gradient

With g the gradient of ``logprobs``::

    d z_tv = g_t ([v = y_t] - p_tv) / tau,     d hidden = dz W,     d weight = dz^T hidden

Softmax and sums are computed in float32, or in float64 for float64 inputs. Matrix products with ``weight`` take factors
in the dtype of ``weight`` and accumulate in float32 or float64. The backward recomputes the logits; ``native`` and
``triton`` do so only for tokens whose gradient is not exactly zero. The implementations are:

=============  =======================================================================================================
``reference``  plain PyTorch, any device: chunks of tokens, at most 2^24 logits (or one token's) at once
``native``     CPU, not float64: torch's products with the library's epilogues between them; ``native.py``
``triton``     CUDA, not float64: online softmax over vocabulary tiles, forward stores no logits; ``triton.py``
=============  =======================================================================================================

Under autocast, hidden and weight are cast to autocast's dtype unless they are float64.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from balcaprl.kernels.head import native as native_head
from balcaprl.kernels.head.records import FILTER_BLOCK, Head, HeadGradients
from balcaprl.kernels.support import deferred
from balcaprl.kernels.support.checks import check_impl, check_number, check_tensor
from balcaprl.kernels.support.dispatch import compute_dtype, resolve_below_float64
from balcaprl.kernels.support.native_softmax import SoftmaxRows
from balcaprl.kernels.support.products import gapless

IMPLS = ("reference", "native", "triton")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_CHUNK_TOKENS = 1024
_MAX_CHUNK_LOGITS = 1 << 24


class LogProbs(NamedTuple):
    """Log-probabilities and entropies, both (T,); float64 for float64 inputs, otherwise float32."""

    logprobs: Tensor
    """Log-probabilities of the targets; differentiable once in ``hidden`` and ``weight``."""
    entropy: Tensor
    """Entropy of each token's distribution over the vocabulary, in nats; detached."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> LogProbs:
    """Log-probabilities of ``targets``, and entropies, under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: (T, D) hidden states, float32, float64, bfloat16 or float16.
        weight: (V, D) weight of the language-model head, with the dtype and device of ``hidden``.
        targets: (T,) int64 token ids, 0 <= target < V.
        temperature: number > 0 that divides the logits.
        impl: ``native`` (CPU), ``triton`` (CUDA, or CPU under Triton's interpreter), ``reference`` or ``auto``. Only
            ``reference`` supports float64.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range, or the logits are not finite; the message
            starts with the argument's name. On a GPU an invalid value is found later: the log-probabilities that it
            affects are not finite, and a later op or ``kernels.support.deferred.raise_pending`` raises the error.
        RuntimeError: ``impl`` is ``native`` and the compiled library is not available.
    """
    hidden, weight = check_head(hidden, weight, targets, temperature)
    check_impl("linear_logprobs", impl, IMPLS)
    logprobs, entropy, *_ = _linear_logprobs_op(hidden, weight, targets, float(temperature), impl)
    return LogProbs(logprobs, entropy.detach())


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Checks the arguments without reading tensor values; returns hidden and weight, cast if autocast is enabled.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range; the message starts with its name.
    """
    check_tensor("hidden", hidden, shape=("T", "D"), dtypes=_DTYPES)
    check_tensor("weight", weight, shape=("V", hidden.shape[1]), dtypes=_DTYPES, device=hidden.device)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))
    check_tensor("weight", weight, shape=("V", hidden.shape[1]), dtypes=(hidden.dtype,))
    check_tensor("targets", targets, shape=(hidden.shape[0],), dtypes=(torch.int64,), device=hidden.device)
    check_number("temperature", temperature, low=0.0, exclusive_low=True)
    return hidden, weight


def resolve_impl(impl: str, hidden: Tensor) -> str:
    """Returns the implementation to run for ``hidden``; ``auto`` becomes the fastest one that can run.

    Raises:
        ValueError: ``impl`` cannot run on such tensors; the message starts with ``impl``.
    """
    return resolve_below_float64(impl, hidden, "hidden is")


def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, filter_eps: float | None = None
) -> LogProbs:
    """The specification, in plain PyTorch with autograd's own gradient; the backward recomputes each chunk.

    ``linear_policy_loss`` describes ``filter_eps``; the columns that it leaves out get no gradient here.
    """
    # Both are made gapless because autograd chooses which one is the first operand of a product in the backward.
    chunks, hidden, weight = [], gapless(hidden), gapless(weight)
    for begin, end in chunk_ranges(hidden.shape[0], weight.shape[0]):
        arguments = (hidden[begin:end], weight, targets[begin:end], temperature, filter_eps)
        chunks.append(checkpoint(_chunk_logprobs, *arguments, use_reentrant=False))
    if not chunks:
        chunks.append(_chunk_logprobs(hidden, weight, targets, temperature, filter_eps))
    return LogProbs(torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks]))


def chunk_ranges(num_tokens: int, vocabulary: int) -> list[tuple[int, int]]:
    """Splits the tokens into half-open ranges whose logits are held at once.

    A range longer than ``FILTER_BLOCK`` consists of whole filter blocks (the last range may end earlier).
    """
    size = max(1, min(_MAX_CHUNK_TOKENS, _MAX_CHUNK_LOGITS // max(vocabulary, 1)))
    if size > FILTER_BLOCK:
        size -= size % FILTER_BLOCK
    return [(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(tokens, V) logits divided by the temperature, in the compute dtype."""
    return (hidden @ weight.T).to(compute_dtype(hidden.dtype)) / temperature


def _chunk_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, filter_eps: float | None = None
) -> tuple[Tensor, Tensor]:
    logits = _chunk_logits(hidden, weight, temperature)
    if filter_eps is not None:
        kept = kept_columns(logits.detach().softmax(dim=-1), targets, filter_eps)
        logits = torch.where(kept, logits, logits.detach())
    log_softmax = logits.log_softmax(dim=-1)
    detached = log_softmax.detach()
    # A probability of 0 has a logarithm of -inf and must add 0 to the entropy; the clamp prevents 0 * -inf = NaN.
    entropy = -(detached.exp() * detached.clamp(min=torch.finfo(detached.dtype).min)).sum(dim=-1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


def kept_columns(softmax_TV: Tensor, targets: Tensor, filter_eps: float) -> Tensor:
    """(T, V) bool: which entries of the logits' gradient ``filter_eps`` keeps.

    Blocks of ``FILTER_BLOCK`` tokens, counted from row 0, keep the same columns for all of their tokens.
    """
    kept = softmax_TV >= filter_eps
    kept.scatter_(1, targets[:, None], True)
    for block in kept.split(FILTER_BLOCK):
        if block.shape[0]:
            block[:] = block.any(dim=0)
    return kept


def reference_rows(head: Head) -> tuple[SoftmaxRows, Tensor]:
    """Softmax rows and (T,) entropies by the reference, in the compute dtype.

    The max and sum of the rows stay 0, because the reference's backward does not use them.
    """
    # All results go into one tensor that is allocated first: results allocated between the buffers of the chunks would
    # keep the allocator from reusing these buffers.
    values = torch.zeros(4, head.hidden.shape[0], dtype=compute_dtype(head.hidden.dtype), device=head.hidden.device)
    for begin, end in chunk_ranges(head.hidden.shape[0], head.weight.shape[0]):
        arguments = (head.hidden[begin:end], head.weight, head.targets[begin:end], head.temperature)
        values[2, begin:end], values[3, begin:end] = _chunk_logprobs(*arguments)
    row_max, row_sum, logprobs, entropy = (row.clone() for row in values)
    return SoftmaxRows(row_max, row_sum, logprobs), entropy


def reference_gradients(
    head: Head, grad_logprobs: Tensor, needs: tuple[bool, bool], filter_eps: float | None
) -> HeadGradients:
    """Gradients by the formula in the module's docstring; sums ``grad_weight`` over chunks in the compute dtype."""
    dtype = compute_dtype(head.hidden.dtype)
    grad_hidden = head.hidden.new_empty(head.hidden.shape) if needs[0] else None
    grad_weight = head.weight.new_zeros(head.weight.shape, dtype=dtype) if needs[1] else None
    for begin, end in chunk_ranges(head.hidden.shape[0], head.weight.shape[0]):
        hidden, targets = head.hidden[begin:end], head.targets[begin:end]
        scale = grad_logprobs[begin:end, None].to(dtype) / head.temperature
        softmax = _chunk_logits(hidden, head.weight, head.temperature).softmax(dim=-1)
        kept = None if filter_eps is None else kept_columns(softmax, targets, filter_eps)
        grad_logits = softmax.mul_(-scale).scatter_add_(1, targets[:, None], scale)
        if kept is not None:
            grad_logits.masked_fill_(~kept, 0.0)
        grad_logits = grad_logits.to(head.weight.dtype)
        if grad_hidden is not None:
            torch.mm(grad_logits, head.weight, out=grad_hidden[begin:end])
        if grad_weight is not None:
            grad_weight += grad_logits.T @ hidden
    return HeadGradients(grad_hidden, None if grad_weight is None else grad_weight.to(head.weight.dtype))


def check_logprobs(head: Head, *results: Tensor) -> None:
    """Checks that the (T,) results of a forward are finite; if not, raises for the argument that is to blame.

    Raises:
        ValueError: a target is out of range, or the logits are not finite; the message starts with the argument's name.
    """
    if not torch.stack([result.isfinite().all() for result in results]).all():
        raise_for_logprobs(head.targets, head.weight.shape[0])


def raise_for_logprobs(targets: Tensor, vocabulary: int) -> NoReturn:
    """Raises ValueError for the argument that makes some log-probabilities not finite."""
    check_targets(targets, vocabulary)
    raise ValueError("hidden or weight: not finite, or so large that the logits are not")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Checks that all ``targets`` are token ids of the vocabulary."""
    if targets.numel() and not ((targets >= 0) & (targets < vocabulary)).all():
        raise ValueError(
            f"targets: expected token ids in [0, {vocabulary}), got {int(targets.min())} to {int(targets.max())}"
        )


@torch.library.custom_op(
    "balcaprl::linear_logprobs",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, float temperature, str impl) "
    "-> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor row_sum)",
)
def _linear_logprobs_op(hidden, weight, targets, temperature, impl):
    """Runs the forward and its checks of values, which a tracer does not see. Only the backward uses max and sum."""
    impl = resolve_impl(impl, hidden)
    head = Head.of(hidden, weight, targets, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        rows, entropy = head_rows(head, impl)
    if impl == "triton":
        # The flag is 0 if all values are finite, because then so is their sum; 0 times any other sum is NaN.
        flag = 0.0 * torch.stack([rows.logprobs, entropy]).sum(dtype=torch.float64)
        deferred.check(flag, partial(raise_for_logprobs, head.targets, head.weight.shape[0]))
    else:
        check_logprobs(head, rows.logprobs, entropy)
    return rows.logprobs, entropy, rows.max, rows.sum


def head_rows(head: Head, impl: str, *, with_entropy: bool = True) -> tuple[SoftmaxRows, Tensor]:
    """Runs the forward of an implementation; returns the softmax rows and the (T,) entropies.

    With ``triton`` a target out of range gives NaN, which the caller must check; for the others ``targets`` is checked
    here. If ``with_entropy`` is false, the entropies may be zeros.
    """
    if impl == "triton":
        from balcaprl.kernels.head import triton as triton_head

        return triton_head.logprobs_and_entropy(head, with_entropy=with_entropy)
    check_targets(head.targets, head.weight.shape[0])
    return native_head.logprobs_and_entropy(head) if impl == "native" else reference_rows(head)


@_linear_logprobs_op.register_fake
def _linear_logprobs_fake(hidden, weight, targets, temperature, impl):
    dtype = compute_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4))


@torch.library.custom_op(
    "balcaprl::linear_logprobs_backward",
    mutates_args=(),
    schema="(Tensor grad_logprobs, Tensor hidden, Tensor weight, Tensor targets, Tensor logprobs, Tensor row_max, "
    "Tensor row_sum, float temperature, float? filter_eps, bool needs_hidden, bool needs_weight, str impl) "
    "-> (Tensor grad_hidden, Tensor grad_weight)",
)
def linear_logprobs_backward(
    grad_logprobs,
    hidden,
    weight,
    targets,
    logprobs,
    row_max,
    row_sum,
    temperature,
    filter_eps,
    needs_hidden,
    needs_weight,
    impl,
):
    """Gradients of hidden and weight; a gradient that is not needed has shape (0,)."""
    impl, needs = resolve_impl(impl, hidden), (needs_hidden, needs_weight)
    head = Head.of(hidden, weight, targets, temperature)
    rows = SoftmaxRows(row_max.contiguous(), row_sum.contiguous(), logprobs.contiguous())
    grad_logprobs = grad_logprobs.to(logprobs.dtype).contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        result = head_gradients(head, rows, grad_logprobs, needs, filter_eps, impl)
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in result)


def head_gradients(
    head: Head,
    rows: SoftmaxRows,
    grad_logprobs: Tensor,
    needs: tuple[bool, bool],
    filter_eps: float | None,
    impl: str,
) -> HeadGradients:
    """Runs the backward of an implementation.

    ``rows`` are those of the same implementation's forward, ``grad_logprobs`` the (T,) gradient of their ``logprobs``.
    """
    if impl == "triton":
        from balcaprl.kernels.head import triton as triton_head

        return triton_head.head_gradients(head, rows, grad_logprobs, needs, filter_eps)
    if impl == "native":
        return native_head.head_gradients(head, rows, grad_logprobs, needs, filter_eps)
    return reference_gradients(head, grad_logprobs, needs, filter_eps)


@linear_logprobs_backward.register_fake
def _linear_logprobs_backward_fake(_grad_logprobs, hidden, weight, *rest):
    needs_hidden, needs_weight = rest[-3:-1]
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    return grad_hidden, weight.new_empty(weight.shape if needs_weight else (0,))


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.impl = inputs
    logprobs, _, row_max, row_sum = output
    ctx.save_for_backward(hidden, weight, targets, logprobs, row_max, row_sum)


def _backward(ctx, grad_logprobs, *_):
    needs = ctx.needs_input_grad[:2]
    arguments = (grad_logprobs, *ctx.saved_tensors, ctx.temperature, None, *needs, ctx.impl)
    gradients = linear_logprobs_backward(*arguments)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None, None


_linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
