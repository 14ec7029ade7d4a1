"""``impl="sdpa"`` of ``shared_prefix_attention``: PyTorch's fused attention kernel on the CPU, in few large calls.

The attention is the sum of two parts that need no mask: the causal attention of every segment to itself, many segments
of similar length at once, and the attention of a group's completion tokens to its prompt, one call for each group.
Parts are joined by their logsumexp. The backward calls the kernel's own backward for each part with the *joint* output
and logsumexp: it then computes that part of the gradient exactly, since p = exp(s - lse) and delta = g . out are those
of the joint softmax, and the parts add up.

The kernel wants as many key heads as query heads. Where all queries of a call see the same keys (the prompt's part, and a
segment on its own) it is given the query heads that share a key head as another batch axis, along which keys have
stride 0: none is copied. Several segments at once are copied, since they are gathered anyway. Queries and the gradient of the
output are first operands of the kernel's products, a head's rows between those of others: ``products.gapless``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.products import gapless
from balcaprl.kernels.shared_prefix_layout import SharedPrefixLayout
from balcaprl.kernels.token_loss import compute_dtype

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Segments share a call where the longest has at most this many tokens, or this many times those of the shortest.
_SHORT_SEGMENT = 64
_MAX_STRETCH = 1.25


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``shared_prefix_attention._implementation``."""
    num_tokens, num_heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse_TH = torch.empty((num_tokens, num_heads), dtype=compute_dtype(query.dtype), device=query.device)
    calls = _calls(layout)
    for bucket in calls.buckets:
        q, k, v = gapless(bucket.gather(query)), *(bucket.gather(x, num_heads) for x in (key, value))
        part, part_lse = _fused(q, k, v, 0.0, True, scale=scale)
        bucket.scatter(out, part)
        bucket.scatter(lse_TH, part_lse)
    for alone in calls.alone:
        part, part_lse = _fused(*_call_of(query, key, value, alone, alone), 0.0, True, scale=scale)
        _heads_apart(out[alone], key.shape[1]).copy_(part)
        _heads_apart(lse_TH[alone], key.shape[1]).copy_(part_lse)
    for prompt, completions in calls.groups:
        q, k, v = _call_of(query, key, value, completions, prompt)
        part, part_lse = _fused(q, k, v, 0.0, False, scale=scale)
        own, own_lse = (_heads_apart(x[completions], key.shape[1]) for x in (out, lse_TH))
        _join(own, own_lse, part, part_lse)
    return out, lse_TH.T.contiguous()


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``shared_prefix_attention._implementation``."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    lse_TH = lse.T
    grad_query, grad_key, grad_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    calls = _calls(layout)
    for bucket in calls.buckets:
        q, o = gapless(bucket.gather(query)), bucket.gather(out)
        k, v = (bucket.gather(x, num_heads) for x in (key, value))
        g = bucket.gather(grad_out)
        if bucket.padding is not None:  # it repeats a token: without a gradient it adds nothing to the keys before it
            g.masked_fill_(bucket.padding, 0.0)
        grads = _fused_backward(gapless(g), q, k, v, o, bucket.gather(lse_TH), 0.0, True, scale=scale)
        bucket.scatter(grad_query, grads[0])
        for gradient, part in zip((grad_key, grad_value), grads[1:], strict=True):
            bucket.scatter(gradient, part.unflatten(1, (num_kv_heads, -1)).sum(2))
    for alone in calls.alone:
        grads = _gradients_of_call(grad_out, query, key, value, out, lse_TH, alone, alone, scale)
        _heads_apart(grad_query[alone], num_kv_heads).copy_(grads[0])
        grad_key[alone], grad_value[alone] = grads[1:]
    for prompt, completions in calls.groups:
        grads = _gradients_of_call(grad_out, query, key, value, out, lse_TH, completions, prompt, scale)
        _heads_apart(grad_query[completions], num_kv_heads).add_(grads[0])
        grad_key[prompt] += grads[1]
        grad_value[prompt] += grads[2]
    return grad_query, grad_key, grad_value


class _Bucket(NamedTuple):
    """N > 1 segments of similar length, padded to the longest, L tokens. Padding repeats a segment's last token."""

    shape: tuple[int, int]
    """(N, L)."""
    tokens: Tensor
    """LongTensor (N * L,): the packed token of each place."""
    places: Tensor
    """LongTensor: the places that are no padding; all others repeat."""
    padding: Tensor | None
    """BoolTensor (N, 1, L, 1): True at padding; None where there is none."""
    run: slice | None
    """The packed tokens, where they lie one after the other: nothing has to be gathered then."""

    def gather(self, x: Tensor, num_heads: int | None = None) -> Tensor:
        """(T, H, ...) to (N, H, L, ...), heads repeated to ``num_heads``; a view where that can be."""
        flat = x.index_select(0, self.tokens) if self.run is None else x[self.run]
        rows = flat.unflatten(0, self.shape).transpose(1, 2)
        return rows if num_heads in (None, x.shape[1]) else rows.repeat_interleave(num_heads // x.shape[1], 1)

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        """(N, H, L, ...) into x (T, H, ...)."""
        if self.run is not None:
            self.gather(x).copy_(rows)
            return
        flat, tokens = rows.transpose(1, 2).flatten(0, 1), self.tokens
        if self.padding is not None:
            flat, tokens = flat.index_select(0, self.places), tokens.index_select(0, self.places)
        x.index_copy_(0, tokens, flat.to(x.dtype))


class _Calls(NamedTuple):
    """What the kernel is called for."""

    buckets: list[_Bucket]
    """The causal part: segments that share a call, by length. Empty ones are left out."""
    alone: list[slice]
    """The causal part: packed tokens of each other segment."""
    groups: list[tuple[slice, slice]]
    """The prompt's part: packed tokens of the prompt and of all completions, for each group that has completion tokens."""


def _calls(layout: SharedPrefixLayout) -> _Calls:
    lengths = (layout.host_prompt_lengths, layout.host_group_sizes, layout.host_completion_lengths)
    prompts, sizes, completions = (tuple(each.tolist()) for each in lengths)
    return _calls_of(prompts, sizes, completions)


@functools.lru_cache(maxsize=64)
def _calls_of(prompts: tuple[int, ...], sizes: tuple[int, ...], completions: tuple[int, ...]) -> _Calls:
    """Kept, since every layer of a model asks for the same."""
    segments, groups = [], []
    start, first = 0, 0
    for prompt, size in zip(prompts, sizes, strict=True):
        middle = end = start + prompt
        segments.append((prompt, start))
        for length in completions[first : first + size]:
            segments.append((length, end))
            end += length
        if end > middle:
            groups.append((slice(start, middle), slice(middle, end)))
        start, first = end, first + size
    lists = _by_length(segments)
    alone = [slice(begin, begin + length) for ((length, begin), *others) in lists if not others]
    return _Calls([_bucket(each) for each in lists if len(each) > 1], alone, groups)


def _by_length(segments: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """(length, begin) of segments that are not empty, the longest first, in lists of similar length."""
    lists: list[list[tuple[int, int]]] = []
    for segment in sorted((s for s in segments if s[0]), key=lambda each: (-each[0], each[1])):
        if not lists or lists[-1][0][0] > max(_SHORT_SEGMENT, _MAX_STRETCH * segment[0]):
            lists.append([])
        lists[-1].append(segment)
    return lists


def _bucket(segments: list[tuple[int, int]]) -> _Bucket:
    lengths, begins = torch.tensor(segments).unbind(1)
    place = torch.arange(segments[0][0])
    is_token = place < lengths[:, None]
    tokens = begins[:, None] + place.minimum(lengths[:, None] - 1)
    padding = None if is_token.all() else ~is_token[:, None, :, None]
    shape, flat = (tokens.shape[0], tokens.shape[1]), tokens.flatten()
    first, last = int(flat[0]), int(flat[-1]) + 1
    run = slice(first, last) if torch.equal(flat, torch.arange(first, first + len(flat))) else None
    return _Bucket(shape, flat, is_token.flatten().nonzero()[:, 0], padding, run)


def _call_of(query: Tensor, key: Tensor, value: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens' queries (repeats, H_kv, L, head_dim); keys and values of others, expanded to them."""
    q = gapless(_heads_apart(query[queries], key.shape[1]))
    k, v = (x[keys].transpose(0, 1)[None].expand(q.shape[0], -1, -1, -1) for x in (key, value))
    return q, k, v


def _gradients_of_call(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse_TH: Tensor,
    queries: slice,
    keys: slice,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the queries, as ``_call_of`` has them, and of keys and values, (keys, H_kv, head_dim). Causal where both are one."""
    q, k, v = _call_of(query, key, value, queries, keys)
    g, o, joint = (_heads_apart(x[queries], key.shape[1]) for x in (grad_out, out, lse_TH))
    grads = _fused_backward(gapless(g), q, k, v, o, joint, 0.0, queries == keys, scale=scale)
    return grads[0], grads[1].sum(0).transpose(0, 1), grads[2].sum(0).transpose(0, 1)


def _heads_apart(x: Tensor, num_kv_heads: int) -> Tensor:
    """(L, H, ...) to (repeats, H_kv, L, ...), a view."""
    apart = x.unflatten(1, (num_kv_heads, -1))
    return apart.movedim((2, 1, 0), (0, 1, 2))


def _join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Joins a part (..., head_dim) into what ``out`` and ``lse`` (...) hold of the other, in place."""
    joint = torch.logaddexp(lse, part_lse)
    ours, theirs = (lse - joint).exp_().unsqueeze(-1), (part_lse - joint).exp_().unsqueeze(-1)
    if out.dtype == joint.dtype:
        out.mul_(ours).addcmul_(part, theirs)
    else:  # rounded once
        out.copy_(out * ours + part * theirs)
    lse.copy_(joint)
