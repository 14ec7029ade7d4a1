"""How stock model code runs on packed groups: an attention function that transformers finds by name.

The decoder's layers look their attention up by name and hand unknown keyword arguments on to it, so that the layout of a
packed batch reaches it without a change of the model. For a name without a mask function transformers makes no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from balcaprl.kernels import SharedPrefixLayout, shared_prefix_attention

SHARED_PREFIX = "balcaprl_shared_prefix"
"""The name under which the attention of packed groups is registered."""


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
    """Attention in the form that transformers calls: (1, H, T, head_dim) in, (1, T, H, head_dim) out.

    Raises:
        ValueError: For dropout or capped scores, which the packed attention does not have.
    """
    if dropout:
        raise ValueError(f"dropout: the packed attention has none, got {dropout}; keep the model in evaluation mode")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = shared_prefix_attention(q, k, v, prefix_layout, scale=scaling, softcap=softcap)
    return out[None], None


@functools.cache
def register() -> None:
    """Make the function known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(SHARED_PREFIX, shared_prefix_forward)


@contextmanager
def using_attention(config: Any, name: str) -> Iterator[None]:
    """The text model of ``config`` attends by the function of that name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


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


def enable_checkpointing(model: Any, config: Any) -> None:
    """Keep only layer inputs in the forward, and compute the rest again in the backward.

    The recomputation runs after ``using_attention`` has been left: it enters it again under the name that the forward had.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), using_attention(config, config._attn_implementation)

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Layers for which it is enabled recompute within. transformers asks for training mode of the layer alone; its
    children stay as they are, and so does sampling, whose cache it would take away."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
