"""The gradients of the head on the CPU, for all tokens at once, from the logits of two halves of the vocabulary.

With two chunks of tokens, the gradient of the weight would be read and written a second time, to add the second chunk's
share. Here nothing is summed over chunks, and the products are larger. Only half of the logits take extra memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from balcaprl.kernels.head.native_logits_room import LogitsRoom, logits_view
from balcaprl.kernels.head.records import Head, HeadGradients
from balcaprl.kernels.support.native_softmax import SoftmaxRows, Tokens, write_gradient, write_stats


def gradients_by_halves(
    head: Head, tokens: Tokens, needs_hidden: bool, look: Callable[[tuple[Tensor, Tensor]], None]
) -> HeadGradients:
    """Computes the gradients of all tokens at once, with extra memory for only half of their logits.

    The logits of the first half of the vocabulary are stored in the memory of the second half of the weight's gradient,
    which is written last. They fit because there are no more tokens than columns of ``weight``.

    Args:
        head: float32 inputs of the head: in half precision the sum over the two halves would be rounded.
        tokens: all tokens of ``head``; softmax rows and gradients may be uninitialised until ``look`` has returned.
        needs_hidden: whether hidden needs a gradient.
        look: function that receives both halves of the logits before their gradients overwrite them; it must fill in
            what is missing in ``tokens``.
    """
    num_tokens, middle = head.hidden.shape[0], head.weight.shape[0] // 2
    weights = head.weight[:middle], head.weight[middle:]
    grad_weight = torch.empty_like(head.weight)
    with LogitsRoom(num_tokens, weights[1]) as room:
        spare = logits_view(num_tokens, weights[0], grad_weight[middle:].view(-1))
        first = torch.mm(head.hidden, weights[0].T, out=spare)
        second = torch.mm(head.hidden, weights[1].T, out=room.rows)
        look((first, second))
        active = tokens.grad_logprobs.nonzero()[:, 0]
        write_gradient(first, 0, active, tokens, head.scale)
        write_gradient(second, middle, active, tokens, head.scale)
        first, second = first[: active.shape[0]], second[: active.shape[0]]
        every = active.shape[0] == num_tokens
        hidden, grad_hidden = head.hidden if every else head.hidden[active], None
        if needs_hidden:
            grad_hidden = torch.mm(first, weights[0]).addmm_(second, weights[1])
            if not every:
                grad_hidden = torch.zeros_like(head.hidden).index_copy_(0, active, grad_hidden)
        torch.mm(first.T, hidden, out=grad_weight[:middle])
        torch.mm(second.T, hidden, out=grad_weight[middle:])
    return HeadGradients(grad_hidden, grad_weight)


def write_stats_of_halves(halves: tuple[Tensor, Tensor], head: Head, rows: SoftmaxRows) -> None:
    """Writes the softmax rows of the whole vocabulary from the statistics of its two halves."""
    vocabulary, middle = head.weight.shape[0], halves[0].shape[1]
    if ((head.targets < 0) | (head.targets >= vocabulary)).any():
        raise ValueError(f"targets: expected token ids in [0, {vocabulary})")
    own_targets = head.targets.clamp(max=middle - 1), (head.targets - middle).clamp(min=0)
    parts = [SoftmaxRows.empty(head.targets.shape[0]) for _ in halves]
    for logits, targets, part in zip(halves, own_targets, parts, strict=True):
        write_stats(logits, targets, head.scale, part, None)
    torch.maximum(parts[0].max, parts[1].max, out=rows.max)
    sums = [part.sum * ((part.max.double() - rows.max) * head.scale).exp() for part in parts]
    total = sums[0] + sums[1]
    rows.sum.copy_(total)
    # A probability within a half, times that half's share of the total sum, is the probability within the vocabulary.
    logprobs = [part.logprobs + (each / total).log() for part, each in zip(parts, sums, strict=True)]
    rows.logprobs.copy_(torch.where(head.targets < middle, logprobs[0], logprobs[1]))
