"""The specification of ``shared_prefix_attention``: its formulas, group by group, with a mask. Slow, for any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from balcaprl.kernels.shared_prefix.layout import SharedPrefixLayout
from balcaprl.kernels.shared_prefix.records import AttentionInputs, Gradients
from balcaprl.kernels.support.dispatch import compute_dtype
from balcaprl.kernels.support.products import gapless, with_gapless_gradient


def shared_prefix_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, *, scale: float | None = None
) -> Tensor:
    """The specification in plain PyTorch, with autograd's own gradient. Takes the arguments of
    ``shared_prefix_attention`` and does not check them."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _parts(AttentionInputs(query, key, value, layout, scale))[0]


def _parts(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The (out, lse) of the specification."""
    query, key, value, layout, scale = inputs
    repeats = query.shape[1] // key.shape[1]
    outs, lses = [], []
    for start, prompt, completions in layout.groups:
        end = start + prompt + sum(completions)
        q_HLD = gapless(query[start:end].transpose(0, 1))
        k_HLD, v_HLD = (x[start:end].transpose(0, 1).repeat_interleave(repeats, 0) for x in (key, value))
        scores = (q_HLD @ k_HLD.transpose(1, 2)).to(compute_dtype(query.dtype)) * scale
        scores = scores.masked_fill(~_group_mask(prompt, completions, query.device), -torch.inf)
        lses.append(scores.logsumexp(-1))
        out_HLD = with_gapless_gradient(scores.softmax(-1).to(query.dtype) @ v_HLD)
        outs.append(out_HLD.transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, 1)


def _group_mask(prompt: int, completions: list[int], device: torch.device) -> Tensor:
    """(L, L) bool mask of one group's L tokens: True where the row's token sees the column's. Only the specification
    uses such a mask."""
    lengths = torch.tensor([prompt, *completions], device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    sees = (segment[:, None] == segment[None]) | (segment[None] == 0)
    return sees.tril()


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Computes (out, lse) as ``records.py`` defines them."""
    out, lse = _parts(inputs)
    return out.contiguous(), lse


def backward(grad_out: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> Gradients:
    """Computes the three gradients as ``records.py`` defines them."""
    query, key, value, layout, scale = inputs
    repeats = query.shape[1] // key.shape[1]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for start, prompt, completions in layout.groups:
        rows = slice(start, start + prompt + sum(completions))
        q, g = (gapless(x[rows].transpose(0, 1)) for x in (query, grad_out))
        o = out[rows].transpose(0, 1)
        k, v = (x[rows].transpose(0, 1).repeat_interleave(repeats, 0) for x in (key, value))
        scores = (q @ k.transpose(1, 2)).to(lse.dtype) * scale
        p = (scores - lse[:, rows, None]).exp().masked_fill(~_group_mask(prompt, completions, query.device), 0.0)
        delta = (g.to(lse.dtype) * o.to(lse.dtype)).sum(-1, keepdim=True)
        ds = (p * ((g @ v.transpose(1, 2)).to(lse.dtype) - delta) * scale).to(query.dtype)
        parts = (ds @ k, ds.transpose(1, 2) @ q, p.to(query.dtype).transpose(1, 2) @ g)
        for gradient, part in zip(gradients, parts, strict=True):
            summed = part.view(gradient.shape[1], -1, *part.shape[1:]).sum(1)
            gradient[rows] = summed.transpose(0, 1)
    grad_query, grad_key, grad_value = gradients
    return grad_query, grad_key, grad_value
