"""Which rows of a block attend to which: groups with a shared prompt, or segments such as images and their windows.

Each kind is a class. A block keeps its attention object from the forward to the backward. Both methods take the rotated
query (T, H, head_dim), the rotated key (T, H_kv, head_dim) and the value (T, H_kv, head_dim), which may be views of one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from balcaprl.kernels.shared_prefix.layout import SharedPrefixLayout
from balcaprl.kernels.shared_prefix.records import AttentionInputs

Parts = tuple[Tensor, Tensor, Tensor]


class Attention(Protocol):
    """The attention of a block, without autograd."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the output (T, H, head_dim), contiguous, and the other tensors that the backward needs."""

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, kept: tuple[Tensor, ...]
    ) -> Parts:
        """Returns the gradient of query (T, H, head_dim), and the gradients of key and value as P parts each
        (P, T, H_kv, head_dim), which the caller adds up; all contiguous."""


class SharedPrefixAttention(NamedTuple):
    """Groups whose completions attend to their prompt and to themselves; see ``shared_prefix/attention.py``."""

    layout: SharedPrefixLayout
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See ``Attention.forward``."""
        from balcaprl.kernels.shared_prefix import triton

        out, lse = triton.forward(AttentionInputs(query, key, value, self.layout, self.scale))
        return out, (lse,)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, kept: tuple[Tensor, ...]
    ) -> Parts:
        """See ``Attention.backward``."""
        from balcaprl.kernels.shared_prefix import triton

        inputs = AttentionInputs(query, key, value, self.layout, self.scale)
        return triton.backward_in_parts(grad, inputs, out, kept[0])


class SegmentAttention(NamedTuple):
    """Segments of rows: every row attends to all rows of its segment, as in image towers.

    On CUDA, one call of PyTorch's own varlen flash attention takes all segments; it supports only half precision. On
    the CPU, which only tests use, plain operations take one segment at a time.
    """

    cu_seqlens: Tensor
    """IntTensor (S + 1,) on the rows' device: segment s owns the rows cu_seqlens[s] to cu_seqlens[s + 1]."""
    longest: int
    """Number of rows of the longest segment, or a larger number."""
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See ``Attention.forward``."""
        if not query.is_cuda:
            return self._plain(query, key, value), ()
        flash = torch.ops.aten._flash_attention_forward
        out, lse, state, unused, _ = flash(query, key, value, *self._segments(), 0.0, False, False, scale=self.scale)
        return out, (lse, state, unused)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, kept: tuple[Tensor, ...]
    ) -> Parts:
        """See ``Attention.backward``."""
        if query.is_cuda:
            lse, *state = kept
            flash = torch.ops.aten._flash_attention_backward
            grads = flash(grad, query, key, value, out, lse, *self._segments(), 0.0, False, *state, scale=self.scale)
        else:
            with torch.enable_grad():
                leaves = [each.detach().requires_grad_() for each in (query, key, value)]
                grads = torch.autograd.grad(self._plain(*leaves), leaves, grad)
        grad_query, grad_key, grad_value = (each.contiguous() for each in grads)
        return grad_query, grad_key[None], grad_value[None]

    def _segments(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_seqlens, self.cu_seqlens, self.longest, self.longest

    def _plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for at in self._slices():
            repeats = query.shape[1] // key.shape[1]
            q, k, v = (x[at].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
            scores = self.scale * (q @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
            parts.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
        return torch.cat(parts)

    def _slices(self) -> Iterator[slice]:
        bounds = self.cu_seqlens.tolist()
        return map(slice, bounds[:-1], bounds[1:])
