"""``impl="sdpa"`` of ``shared_prefix_attention``: PyTorch's fused attention kernel on the CPU, in a few large calls.

The attention has two parts that need no mask tensor: the causal attention of every segment to itself, with many
segments of similar length in one call, and the attention of a group's completion tokens to its prompt, with one call
for each group. The parts are joined by their log-sum-exp. The backward calls the kernel's own backward for each part
with the *joint* output and log-sum-exp. The kernel then returns exactly this part of the gradient, because
p = exp(s - lse) and delta = g . out are those of the joint softmax. The parts of the gradient add up.

The kernel requires as many key heads as query heads. Where all queries of a call see the same keys (the prompt's part,
or a segment in a call of its own), the query heads that share a key head become another batch axis, along which keys
have stride 0, so no key is copied. The keys of several segments in one call are copied for each query head, because
gathering copies them anyway. Queries and the gradient of the output are first operands of the kernel's products. The
rows of one head lie between those of other heads in memory, so both go through ``products.gapless``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.shared_prefix.layout import SharedPrefixLayout
from balcaprl.kernels.shared_prefix.records import AttentionInputs, Gradients
from balcaprl.kernels.support.dispatch import compute_dtype
from balcaprl.kernels.support.products import gapless

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Segments share a call if the longest has at most _SHORT_SEGMENT tokens, or at most _MAX_STRETCH times as many tokens
# as the shortest.
_SHORT_SEGMENT = 64
_MAX_STRETCH = 1.25


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Computes (out, lse) as ``records.py`` defines them."""
    query, key, value, layout, scale = inputs
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


def backward(grad_out: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> Gradients:
    """Computes the three gradients as ``records.py`` defines them."""
    query, key, value, layout, scale = inputs
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
        if bucket.padding is not None:  # padding repeats a real token: with a zero gradient it adds nothing to keys
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
    """N > 1 segments of similar length that share a call, padded to the L tokens of the longest. Padding repeats a
    segment's last token."""

    shape: tuple[int, int]
    """The sizes (N, L)."""
    tokens: Tensor
    """LongTensor (N * L,): the packed token of each place in the padded batch."""
    places: Tensor
    """LongTensor: indices of the places that are not padding."""
    padding: Tensor | None
    """BoolTensor (N, 1, L, 1): True at padding; None if there is no padding."""
    run: slice | None
    """The packed tokens as a slice if they are contiguous, so that nothing has to be gathered; otherwise None."""

    def gather(self, x: Tensor, num_heads: int | None = None) -> Tensor:
        """Takes the bucket's tokens from x (T, H, ...) as (N, H, L, ...), with heads repeated to ``num_heads``; a view
        where possible."""
        flat = x.index_select(0, self.tokens) if self.run is None else x[self.run]
        rows = flat.unflatten(0, self.shape).transpose(1, 2)
        return rows if num_heads in (None, x.shape[1]) else rows.repeat_interleave(num_heads // x.shape[1], 1)

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        """Writes ``rows`` (N, H, L, ...), except padding, to the bucket's tokens in x (T, H, ...)."""
        if self.run is not None:
            self.gather(x).copy_(rows)
            return
        flat, tokens = rows.transpose(1, 2).flatten(0, 1), self.tokens
        if self.padding is not None:
            flat, tokens = flat.index_select(0, self.places), tokens.index_select(0, self.places)
        x.index_copy_(0, tokens, flat.to(x.dtype))


class _Calls(NamedTuple):
    """The kernel calls that a layout needs."""

    buckets: list[_Bucket]
    """Calls of the causal part for several segments of similar length. Empty segments are left out."""
    alone: list[slice]
    """Calls of the causal part for a single segment: its packed tokens."""
    groups: list[tuple[slice, slice]]
    """Calls of the prompt's part, one for each group that has completion tokens: packed tokens of the prompt, and of
    all completions."""


def _calls(layout: SharedPrefixLayout) -> _Calls:
    lengths = (layout.host_prompt_lengths, layout.host_group_sizes, layout.host_completion_lengths)
    prompts, sizes, completions = (tuple(each.tolist()) for each in lengths)
    return _calls_of(prompts, sizes, completions)


@functools.lru_cache(maxsize=64)
def _calls_of(prompts: tuple[int, ...], sizes: tuple[int, ...], completions: tuple[int, ...]) -> _Calls:
    """The calls for prompt lengths, group sizes and completion lengths. They are cached because every layer of a model
    asks for the same ones."""
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
    """Splits the nonempty segments, given as (length, begin), into lists of similar length, the longest first."""
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
    """Returns the queries (repeats, H_kv, L, head_dim) of the tokens ``queries``, and the keys and values of the tokens
    ``keys``, expanded to the same first axis."""
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
    """Gradients of one call: of its queries in the shape of ``_call_of``, and of its keys and values in the shape
    (number of keys, H_kv, head_dim). The call is causal if ``queries`` and ``keys`` are the same tokens."""
    q, k, v = _call_of(query, key, value, queries, keys)
    g, o, joint = (_heads_apart(x[queries], key.shape[1]) for x in (grad_out, out, lse_TH))
    grads = _fused_backward(gapless(g), q, k, v, o, joint, 0.0, queries == keys, scale=scale)
    return grads[0], grads[1].sum(0).transpose(0, 1), grads[2].sum(0).transpose(0, 1)


def _heads_apart(x: Tensor, num_kv_heads: int) -> Tensor:
    """A view of x (L, H, ...) as (repeats, H_kv, L, ...)."""
    apart = x.unflatten(1, (num_kv_heads, -1))
    return apart.movedim((2, 1, 0), (0, 1, 2))


def _join(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Joins ``part`` (..., head_dim) and ``part_lse`` (...) into ``out`` and ``lse``, which hold the other part."""
    joint = torch.logaddexp(lse, part_lse)
    ours, theirs = (lse - joint).exp_().unsqueeze(-1), (part_lse - joint).exp_().unsqueeze(-1)
    if out.dtype == joint.dtype:
        out.mul_(ours).addcmul_(part, theirs)
    else:  # computed in the wider dtype of ``joint`` and rounded once
        out.copy_(out * ours + part * theirs)
    lse.copy_(joint)
