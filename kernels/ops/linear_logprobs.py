"""Log-probabilities and entropies of chosen tokens straight from hidden states, without the (T, V) logits.

For token t with hidden state h_t, vocabulary rows w_v, temperature tau and target y_t::

    z_tv       = h_t . w_v / tau
    logprobs_t = z_t,y - log sum_v exp(z_tv)
    entropy_t  = - sum_v p_tv log p_tv,    p_t = softmax(z_t)                    detached: nothing flows back through it

With g the gradient of ``logprobs``::

    d z_tv = g_t ([v = y_t] - p_tv) / tau,     d hidden = dz W,     d weight = dz^T hidden

Tokens are taken in chunks: forward and backward hold the logits of one chunk (at most 2^24 of them, or one token's),
and the backward computes them again. Softmax and sums are in float32, or float64 for float64 inputs; the products with
``weight`` are in its own dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from balcaprl.kernels.checks import check_impl, check_number, check_tensor

IMPLS = ("reference",)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_CHUNK_TOKENS = 1024
_MAX_CHUNK_LOGITS = 1 << 24


class LogProbs(NamedTuple):
    """Both (T,), float64 for float64 inputs, else float32."""

    logprobs: Tensor
    """Of the targets; differentiable in ``hidden`` and ``weight``, once."""
    entropy: Tensor
    """Of the whole distribution, in nats; detached."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> LogProbs:
    """Log-probabilities of ``targets`` under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: (T, D) float32, float64, bfloat16 or float16.
        weight: (V, D), dtype and device as ``hidden``.
        targets: (T,) int64, 0 <= target < V.
        temperature: > 0, divides the logits.
        impl: ``reference`` or ``auto``.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range, or the logits are not finite; the message
            starts with the argument's name.
    """
    check_tensor("hidden", hidden, shape=("T", "D"), dtypes=_DTYPES)
    device = hidden.device
    check_tensor("weight", weight, shape=("V", hidden.shape[1]), dtypes=(hidden.dtype,), device=device)
    check_tensor("targets", targets, shape=(hidden.shape[0],), dtypes=(torch.int64,), device=device)
    check_number("temperature", temperature, low=0.0, exclusive_low=True)
    check_impl("linear_logprobs", impl, IMPLS)
    logprobs, entropy = _linear_logprobs_op(hidden, weight, targets, float(temperature), impl)
    return LogProbs(logprobs, entropy.detach())


def linear_logprobs_reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> LogProbs:
    """The specification, in plain PyTorch with autograd's own gradient, each chunk recomputed in the backward."""
    chunks = []
    for begin, end in chunk_ranges(hidden.shape[0], weight.shape[0]):
        arguments = (hidden[begin:end], weight, targets[begin:end], temperature)
        chunks.append(checkpoint(_chunk_logprobs, *arguments, use_reentrant=False))
    if not chunks:
        chunks.append(_chunk_logprobs(hidden, weight, targets, temperature))
    return LogProbs(torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks]))


def chunk_ranges(num_tokens: int, vocabulary: int) -> list[tuple[int, int]]:
    """Half-open token ranges whose logits are held at once."""
    size = max(1, min(_MAX_CHUNK_TOKENS, _MAX_CHUNK_LOGITS // max(vocabulary, 1)))
    return [(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(tokens, V) log-probabilities in the compute dtype."""
    logits = (hidden @ weight.T).to(_compute_dtype(hidden.dtype))
    return (logits / temperature).log_softmax(dim=-1)


def _chunk_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_softmax = _chunk_log_softmax(hidden, weight, temperature)
    detached = log_softmax.detach()
    # A probability that underflows to 0 with a logarithm of -inf adds nothing: xlogy's convention, on log p.
    entropy = -(detached.exp() * detached.clamp(min=torch.finfo(detached.dtype).min)).sum(dim=-1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


@torch.library.custom_op(
    "balcaprl::linear_logprobs",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, float temperature, str impl) "
    "-> (Tensor logprobs, Tensor entropy)",
)
def _linear_logprobs_op(hidden, weight, targets, temperature, impl):
    """Checks values, out of sight of the tracer."""
    vocabulary = weight.shape[0]
    if targets.numel() and not ((targets >= 0) & (targets < vocabulary)).all():
        raise ValueError(
            f"targets: expected token ids in [0, {vocabulary}), got {int(targets.min())} to {int(targets.max())}"
        )
    # Written in place: results laid between the chunks' buffers would keep the allocator from using those again.
    logprobs = torch.empty(hidden.shape[0], dtype=_compute_dtype(hidden.dtype), device=hidden.device)
    entropy = torch.empty_like(logprobs)
    with torch.no_grad():
        for begin, end in chunk_ranges(hidden.shape[0], vocabulary):
            chunk = _chunk_logprobs(hidden[begin:end], weight, targets[begin:end], temperature)
            logprobs[begin:end], entropy[begin:end] = chunk
    if not (logprobs.isfinite() & entropy.isfinite()).all():
        raise ValueError("hidden or weight: not finite, or so large that the logits are not")
    return logprobs, entropy


@_linear_logprobs_op.register_fake
def _linear_logprobs_fake(hidden, weight, targets, temperature, impl):
    shape, dtype = hidden.shape[0], _compute_dtype(hidden.dtype)
    return hidden.new_empty(shape, dtype=dtype), hidden.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "balcaprl::linear_logprobs_backward",
    mutates_args=(),
    schema="(Tensor grad_logprobs, Tensor hidden, Tensor weight, Tensor targets, float temperature, bool needs_weight) "
    "-> (Tensor grad_hidden, Tensor grad_weight)",
)
def _linear_logprobs_backward_op(grad_logprobs, hidden, weight, targets, temperature, needs_weight):
    """Gradients of both factors; ``grad_weight`` is empty where it is not needed.

    ``grad_weight`` is summed over chunks in the compute dtype, so that a long batch in bfloat16 loses nothing.
    """
    dtype = _compute_dtype(hidden.dtype)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape if needs_weight else (0, 0), dtype=dtype, device=weight.device)
    for begin, end in chunk_ranges(hidden.shape[0], weight.shape[0]):
        scale = grad_logprobs[begin:end, None].to(dtype) / temperature
        grad_logits = _chunk_log_softmax(hidden[begin:end], weight, temperature).exp_().mul_(-scale)
        grad_logits.scatter_add_(1, targets[begin:end, None], scale)
        grad_logits = grad_logits.to(weight.dtype)
        torch.mm(grad_logits, weight, out=grad_hidden[begin:end])
        if needs_weight:
            grad_weight += grad_logits.T @ hidden[begin:end]
    return grad_hidden, grad_weight.to(weight.dtype)


@_linear_logprobs_backward_op.register_fake
def _linear_logprobs_backward_fake(grad_logprobs, hidden, weight, targets, temperature, needs_weight):
    return torch.empty_like(hidden), weight.new_empty(weight.shape if needs_weight else (0, 0))


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, _ = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _backward(ctx, grad_logprobs, _grad_entropy):
    hidden, weight, targets = ctx.saved_tensors
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    grad_hidden, grad_weight = _linear_logprobs_backward_op(
        grad_logprobs, hidden, weight, targets, ctx.temperature, needs_weight
    )
    return grad_hidden if needs_hidden else None, grad_weight if needs_weight else None, None, None, None


_linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
