"""``impl="flash"`` of ``shared_prefix_attention``: joins two calls of flash-attn's variable-length kernels. It needs
CUDA and half precision. The tests use a stand-in with the same signatures in plain PyTorch. FlashAttention 4 ran on an
H200 with heads of 64 and 128 and was as accurate as the plain formulation; FlashAttention 2 and 3 have not run yet.

*Formulation.* In call 1 every segment, prompt or completion, attends causally to itself. In call 2 all completion
tokens of a group, as one sequence of queries, attend to the group's prompt without a mask. The two are joined with
lse = log(exp lse_1 + exp lse_2)::

    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2        at completion tokens; out = out_1 at prompt tokens

*Backward.* flash-attn's own functions either do not differentiate a returned log-sum-exp (FlashAttention 2 and 3) or do
so separately for each part, so autograd cannot differentiate the join. It does not have to: the kernels' backward takes
``out`` and ``lse`` as arguments and computes p = exp(s - lse) and delta = g . out from them. Given the *joint* ``out``
and ``lse``, each call returns exactly its share of the gradient, and the shares add up. The derivative of the join is
never formed.

*Memory traffic* for one group, in rows (one head of one token, 2 head_dim bytes). The group has a prompt of P tokens, G
completions with N tokens in total, H query heads and K key heads. The other formulation that flash-attn can run is key
concatenation: every completion gets a copy of the prompt's keys and values before its own. Repeated reads by different
tiles are not counted. Joining and adding are counted as PyTorch runs them, one operation at a time. "per head" counts
the dk and dv that the library stores for every query head where K < H. "kept" counts what stays in memory between
forward and backward::

               two calls                                            key concatenation
    forward    gather q 2NH, call 1: 2(P+N)(H+K),                   copy k, v: 4(GP+N)K,
               call 2: 2NH + 2PK, join 19NH                         call: 2(P+N)H + 2(P+GP+N)K
    backward   gather q, out, g: 6NH, call 1: 4(P+N)(H+K),          call: 4(P+N)H + 4(P+GP+N)K,
               call 2: 4NH + 4PK, per head 4(2P+N)H,                per head 4(P+GP+N)H,
               add 7NH + 14PK                                       add 2(GP+N)K + 2(P+N)K
    kept       nothing                                              2(GP+N)K in each layer

The next table gives thousands of rows moved, as forward + backward, and thousands of rows kept. It includes the Triton
kernels, which make no second call, no copy and no join:

    ==================================================  =============  =======================  ===========
    group                                               two calls      concatenation            Triton
    ==================================================  =============  =======================  ===========
    Qwen2.5-VL-3B: H 16, K 2, G 8, P 1024, N 1024       455 +  659     180 +  913, kept  37     74 + 254
    Qwen2.5-VL-3B: G 16, P 2048, N 2048                 909 + 1319     557 + 3072, kept 139     147 + 508
    LLaVA-1.5-7B: H 32, K 32, G 8, P 600, N 1024        1000 + 1318    1261 + 1507, kept 373    208 + 676
    ==================================================  =============  =======================  ===========

This module makes two calls because they keep nothing, leave the prompt's keys in the GPU's cache for all queries of a
group, and move more rows only if a group has few completions or a short prompt. For a batch of a single group, the two
calls need no gather either, because its tokens are slices.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balcaprl.kernels.shared_prefix.layout import SharedPrefixLayout
from balcaprl.kernels.shared_prefix.records import AttentionInputs, Gradients

MODULES = {
    2: "flash_attn.flash_attn_interface",
    3: "flash_attn_interface",
    4: "flash_attn.cute.interface",
}
"""The module of each FlashAttention version that has the functions called here."""
_ORDER = {9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (4, 2)}
"""Versions in the order in which they are looked for, by major compute capability; other GPUs use only version 2."""


class _Sequences(NamedTuple):
    """The division of queries and keys into sequences: the arguments of flash-attn's variable-length functions."""

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    causal: bool

    def keywords(self) -> dict[str, Any]:
        """The lengths as FlashAttention 3 and 4 name them."""
        return {
            "cu_seqlens_q": self.cu_queries,
            "cu_seqlens_k": self.cu_keys,
            "max_seqlen_q": self.max_queries,
            "max_seqlen_k": self.max_keys,
        }


class _Library(NamedTuple):
    """The kernels of one FlashAttention version, with signatures that are the same for all versions."""

    forward: Callable[[Tensor, Tensor, Tensor, _Sequences, float], tuple[Tensor, Tensor]]
    """Maps (query, key, value, sequences, scale) to (out (T, H, head_dim), lse (H, T) float32)."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, _Sequences, float], tuple[Tensor, ...]]
    """Maps (grad_out, query, key, value, out, lse, sequences, scale) to the gradients of query, key and value."""


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Computes (out, lse) as ``records.py`` defines them.

    Raises:
        ValueError: flash-attn does not support the dtype, device or head size, or is not installed.
    """
    library = _library_for(inputs.query)
    query, key, value = (_rows(x) for x in inputs[:3])
    own, prompts = _calls(inputs.layout)
    out, lse = library.forward(query, key, value, own, inputs.scale)
    if prompts is None:
        return out.contiguous(), lse.contiguous()
    at, of = prompts.completion_tokens, prompts.prompt_tokens
    part, part_lse = library.forward(query[at], key[of], value[of], prompts.sequences, inputs.scale)
    # The join is computed in float32 and rounded once. The kernels have already rounded each part.
    own_lse = lse[:, at]
    joint = torch.logaddexp(own_lse, part_lse)
    own_share, part_share = ((x - joint).exp().T[..., None] for x in (own_lse, part_lse))
    out[at] = (out[at] * own_share + part * part_share).to(out.dtype)
    lse[:, at] = joint
    return out.contiguous(), lse.contiguous()


def backward(grad_out: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> Gradients:
    """Computes the three gradients as ``records.py`` defines them."""
    library = _library_for(inputs.query)
    grad_out, query, key, value = (_rows(x) for x in (grad_out, *inputs[:3]))
    own, prompts = _calls(inputs.layout)
    grad_query, grad_key, grad_value = library.backward(grad_out, query, key, value, out, lse, own, inputs.scale)
    if prompts is None:
        return grad_query, grad_key, grad_value
    at, of = prompts.completion_tokens, prompts.prompt_tokens
    arguments = (grad_out[at], query[at], key[of], value[of], out[at], lse[:, at].contiguous())
    shares = library.backward(*arguments, prompts.sequences, inputs.scale)
    # No index occurs twice, so the result does not depend on the order of the additions.
    grad_query[at] += shares[0]
    grad_key[of] += shares[1]
    grad_value[of] += shares[2]
    return grad_query, grad_key, grad_value


class _PromptCall(NamedTuple):
    """The second call: all completion tokens attend to the prompts of their groups."""

    completion_tokens: Tensor | slice
    """Packed tokens of all completions: indices, or a slice if there is a single group."""
    prompt_tokens: Tensor | slice
    """Packed tokens of the prompts whose groups have completion tokens: indices, or a slice for a single group."""
    sequences: _Sequences


def _calls(layout: SharedPrefixLayout) -> tuple[_Sequences, _PromptCall | None]:
    """The arguments of both calls; the second is None if there are no completion tokens. Reads only host tensors, so
    the host does not wait for the device. A group without completion tokens gets no prompt keys in the second call, so
    the result does not depend on how the kernels treat a sequence that has keys and no queries."""
    groups = layout.groups
    longest = max(max([prompt, *completions]) for _, prompt, completions in groups)
    own = _Sequences(layout.cu_seqlens, layout.cu_seqlens, longest, longest, True)
    totals = [sum(completions) for _, _, completions in groups]
    if not any(totals):
        return own, None
    prompts = [prompt if total else 0 for (_, prompt, _), total in zip(groups, totals, strict=True)]
    completion_lengths = layout.cu_completions.diff()
    prompt_lengths = layout.cu_prompts.diff() * (completion_lengths > 0)
    cu_prompts = torch.nn.functional.pad(prompt_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    sequences = _Sequences(layout.cu_completions, cu_prompts, max(totals), max(prompts), False)
    if len(groups) == 1:
        middle = prompts[0]
        return own, _PromptCall(slice(middle, middle + totals[0]), slice(0, middle), sequences)
    # Before completion token i, counted from 0 over all groups, lie i completion tokens and the prompts of its own
    # and all earlier groups.
    completion_tokens = _counted(layout.cu_prompts[1:], completion_lengths, sum(totals))
    prompt_tokens = _counted(layout.cu_groups[:-1] - cu_prompts[:-1], prompt_lengths, sum(prompts))
    return own, _PromptCall(completion_tokens, prompt_tokens, sequences)


def _counted(offsets: Tensor, lengths: Tensor, total: int) -> Tensor:
    """The numbers 0 to total - 1, each plus the offset of its group; group b has ``lengths[b]`` consecutive numbers."""
    shifts = offsets.long().repeat_interleave(lengths, output_size=total)
    return shifts + torch.arange(total, device=offsets.device)


def _rows(x: Tensor) -> Tensor:
    """``x``, or a copy of it if its columns are not contiguous, which the kernels require."""
    return x if x.stride(-1) == 1 else x.contiguous()


# The three versions.


def can_run(query: Tensor) -> bool:
    """Whether this implementation can run on tensors like ``query`` on this machine."""
    try:
        _library_for(query)
    except ValueError:
        return False
    return True


def _library_for(query: Tensor) -> _Library:
    """The installed kernels for ``query``.

    Raises:
        ValueError: the kernels do not support its device, dtype or head size, or none are installed.
    """
    if query.device.type != "cuda":
        raise ValueError(f"impl: 'flash' runs on CUDA tensors, query is on {query.device}; use 'auto'")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"impl: 'flash' has bfloat16 and float16, not {query.dtype}; use 'auto'")
    if query.shape[2] % 8 or query.shape[2] > 256:
        raise ValueError(f"query: impl 'flash' has head sizes that are multiples of 8 up to 256, not {query.shape[2]}")
    return installed(torch.cuda.get_device_capability(query.device)[0])


@functools.cache
def installed(major: int) -> _Library:
    """The preferred installed version for GPUs of major compute capability ``major``.

    Raises:
        ValueError: no version is installed, or the installed one is too old.
    """
    for version in _ORDER.get(major, (2,)):
        try:
            module = importlib.import_module(MODULES[version])
        except ImportError:
            continue
        return _ADAPTERS[version](module)
    wanted = ", ".join(MODULES[version] for version in _ORDER.get(major, (2,)))
    raise ValueError(f"impl: 'flash' needs FlashAttention; for sm_{major}x none of {wanted} can be imported")


def _version_2(module: Any) -> _Library:
    """The kernels of flash-attn 2.7 and later 2.x versions."""
    # Where the function is registered as a custom op, the op holds the plain function in ``_init_fn``.
    function = getattr(module._flash_attn_varlen_forward, "_init_fn", module._flash_attn_varlen_forward)
    if "window_size_left" not in inspect.signature(function).parameters:
        raise ValueError("impl: 'flash' needs flash-attn 2.7 or later; an older one is installed")

    def forward(q: Tensor, k: Tensor, v: Tensor, s: _Sequences, scale: float) -> tuple[Tensor, Tensor]:
        result = module._flash_attn_varlen_forward(
            q, k, v, s.cu_queries, s.cu_keys, s.max_queries, s.max_keys, 0.0, scale, s.causal
        )
        return result[0], result[1]

    def backward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: _Sequences, scale: float
    ) -> tuple[Tensor, ...]:
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        lengths = (s.cu_queries, s.cu_keys, s.max_queries, s.max_keys)
        # Besides scale and causality: no dropout, no window, no soft cap, no ALiBi, deterministic.
        rest = (0.0, scale, s.causal, -1, -1, 0.0, None, True)
        module._flash_attn_varlen_backward(g, q, k, v, out, lse, *gradients, *lengths, *rest)
        return gradients

    return _Library(forward, backward)


def _version_3(module: Any) -> _Library:
    """The kernels of FlashAttention 3, from the folder ``hopper`` of its repository."""

    def forward(q: Tensor, k: Tensor, v: Tensor, s: _Sequences, scale: float) -> tuple[Tensor, Tensor]:
        result = module._flash_attn_forward(q, k, v, **s.keywords(), softmax_scale=scale, causal=s.causal)
        return result[0], result[1]

    def backward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: _Sequences, scale: float
    ) -> tuple[Tensor, ...]:
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        results = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        options = {"softmax_scale": scale, "is_causal": s.causal, "deterministic": True}
        module._flash_attn_backward(g, q, k, v, out, lse, **s.keywords(), **results, **options)
        return gradients

    return _Library(forward, backward)


def _version_4(module: Any) -> _Library:
    """The kernels of FlashAttention 4, from the folder ``flash_attn/cute`` of its repository."""

    def forward(q: Tensor, k: Tensor, v: Tensor, s: _Sequences, scale: float) -> tuple[Tensor, Tensor]:
        options = {"softmax_scale": scale, "causal": s.causal, "return_lse": True}
        result = module._flash_attn_fwd(q, k, v, **s.keywords(), **options)
        return result[0], result[1]

    def backward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: _Sequences, scale: float
    ) -> tuple[Tensor, ...]:
        options = {"softmax_scale": scale, "causal": s.causal, "deterministic": True}
        return module._flash_attn_bwd(q, k, v, out, g, lse, **s.keywords(), **options)

    return _Library(forward, backward)


_ADAPTERS = {2: _version_2, 3: _version_3, 4: _version_4}
