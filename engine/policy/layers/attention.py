"""Attention functions, registered with transformers by name, that let stock model code run on packed groups.

The decoder's layers look up their attention function by name and pass unknown keyword arguments on to it. The layout of
a packed batch therefore reaches the function without any change to the model. transformers makes no mask for a name
that has no mask function.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balcaprl.kernels import SharedPrefixLayout, shared_prefix_attention
from balcaprl.kernels.support.products import gapless, with_gapless_gradient
from balcaprl.kernels.support.upload import upload
from balcaprl.policy.layers.last_layer import as_now

SHARED_PREFIX = "balcaprl_shared_prefix"
"""The name under which the attention of packed groups is registered."""
IMAGE_SEGMENTS = "balcaprl_flash_image_segments"
"""The name of the image towers' attention. transformers passes segment offsets only to names that contain "flash"."""


def shared_prefix_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_layout: SharedPrefixLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Shared-prefix attention with transformers' signature: (1, H, T, head_dim) in, (1, T, H, head_dim) out.

    Raises:
        ValueError: Dropout or capped scores are asked for, which the packed attention does not support.
    """
    if dropout:
        raise ValueError(f"dropout: the packed attention has none, got {dropout}; keep the model in evaluation mode")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = shared_prefix_attention(q, k, v, prefix_layout, scale=scaling, softcap=softcap)
    return out[None], None


def image_segments_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """An image tower's attention within images or windows: (1, H, T, head_dim) in, (1, T, H, head_dim) out.

    It makes one call for all segments of the same length; transformers' own code makes one call per segment.
    """
    segments, parts = _segments_of(cu_seq_lens_q), []
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    for length, at in segments.by_length:
        q_part, k_part, v_part = (x[at].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        part = F.scaled_dot_product_attention(gapless(q_part), k_part, v_part, dropout_p=dropout, scale=scaling)
        parts.append(with_gapless_gradient(part).transpose(1, 2).flatten(0, 1))
    if segments.places is None:
        return parts[0][None], None
    return torch.cat(parts).index_select(0, segments.places)[None], None


class _Segments(NamedTuple):
    """The segments within which a tower attends (images, or windows of images), grouped by length."""

    by_length: list[tuple[int, slice | Tensor]]
    """Pairs of a length and the tokens of all its segments, in order: a slice if contiguous, otherwise indices."""
    places: Tensor | None
    """LongTensor (T,): index of each token in the concatenated parts of ``by_length``; None for a single part."""


def _segments_of(offsets: Tensor) -> _Segments:
    """Group segments by length. All blocks of a tower share ``offsets``, so the result is cached on that tensor."""
    if not hasattr(offsets, "balcaprl_segments"):
        note_segments(offsets, offsets.tolist())
    found: _Segments = offsets.balcaprl_segments  # type: ignore[attr-defined]
    return found


def note_segments(offsets: Tensor, bounds: list[int]) -> None:
    """Cache the segments of ``offsets`` (S + 1,), whose values are ``bounds``: the attention need not read them."""
    begins: dict[int, list[int]] = {}
    for begin, end in itertools.pairwise(bounds):
        if end > begin:
            begins.setdefault(end - begin, []).append(begin)
    lengths, places = list(begins), [_tokens_of(length, firsts) for length, firsts in begins.items()]
    tokens = torch.arange(bounds[-1])
    order = [torch.cat([tokens[at] for at in places]).argsort()] if len(places) > 1 else []
    moved = iter(upload([at for at in places if isinstance(at, Tensor)] + order, offsets.device))
    by_length = [(n, at if isinstance(at, slice) else next(moved)) for n, at in zip(lengths, places, strict=True)]
    offsets.balcaprl_segments = _Segments(by_length, next(moved, None))  # type: ignore[attr-defined]


def _tokens_of(length: int, begins: list[int]) -> slice | Tensor:
    if begins == list(range(begins[0], begins[0] + length * len(begins), length)):
        return slice(begins[0], begins[-1] + length)
    return (torch.tensor(begins)[:, None] + torch.arange(length)).flatten()


@functools.cache
def register() -> None:
    """Register both attention functions with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(SHARED_PREFIX, shared_prefix_forward)
    AttentionInterface.register(IMAGE_SEGMENTS, image_segments_forward)


@contextmanager
def using_attention(config: Any, name: str) -> Iterator[None]:
    """Within the context, the text model or tower of ``config`` attends with the function registered as ``name``."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def calling_once_for_segments(tower_config: Any) -> AbstractContextManager:
    """Within the context, a tower set to ``sdpa`` uses ``image_segments_forward``; any other setting stays in use."""
    plain = tower_config._attn_implementation == "sdpa"
    return using_attention(tower_config, IMAGE_SEGMENTS) if plain else nullcontext()


def sharing_obstacle(config: Any, longest: int) -> str | None:
    """Why a text model cannot run on packed groups whose longest sequence is ``longest`` tokens; None if it can."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds and longest > (config.sliding_window or 0):
        return f"a sequence of {longest} tokens exceeds its attention window of {config.sliding_window}"
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores"
    return None


def enable_checkpointing(model: Any, *configs: Any) -> None:
    """Enable gradient checkpointing: the forward keeps only layer inputs, and the backward recomputes the rest.

    The recomputation runs after the contexts ``using_attention`` and ``reading_only`` have ended. It therefore enters
    both again, as they were during the forward. ``configs`` are those of the text model and the tower.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _again([(config, config._attn_implementation) for config in configs], as_now())

    # transformers 5.24 introduced the first name and warns about the second.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})


@contextmanager
def _again(names: list[tuple[Any, str]], last_layer: AbstractContextManager[None]) -> Iterator[None]:
    with last_layer, ExitStack() as stack:
        for config, name in names:
            stack.enter_context(using_attention(config, name))
        yield


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Within the context, layers that have gradient checkpointing enabled use it.

    transformers requires training mode of the layer itself only, so its children stay in evaluation mode. Training mode
    ends with the context, because sampling could not use a KV cache with checkpointing.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
