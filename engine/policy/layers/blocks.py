"""Decoder layers and image tower blocks, each as one function (``kernels/block``) that replaces their stock code.

Two kinds of module are recognised by their parts: a decoder layer with RMSNorms, rotary positions and a SwiGLU MLP
(Llama, Qwen2-VL, Qwen2.5-VL), and a tower block of the same kind (Qwen2.5-VL). Their stock code stays in use for
adapted or hooked layers, under autocast, for rows that are not packed, and where Triton does not run. ``fused.py`` puts
these forwards in place only after ``agrees`` has found values and gradients alike on the weights of one layer of the
same class and size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from balcaprl.kernels import SharedPrefixLayout
from balcaprl.kernels.block.attention import SegmentAttention, SharedPrefixAttention
from balcaprl.kernels.block.transformer_block import BlockShape, BlockWeights, Linear, adjoin, transformer_block
from balcaprl.kernels.support import launch
from balcaprl.policy.layers.attention import SHARED_PREFIX, using_attention
from balcaprl.policy.layers.last_layer import rows_read_of

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest ``_apart`` of an output or gradient from the stock layer's, by dtype; another formula differs by far more."""
_DECODER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_TOWER = {"attn", "mlp", "norm1", "norm2"}
Forward = Callable[..., Any]


def block_forward_of(module: nn.Module) -> Forward | None:
    """Return the forward that runs this module as one function; None if its parts are not those of a known block."""
    names = {name for name, _ in module.named_children()}
    try:
        if names == _DECODER:
            _decoder_weights(module)
            return decoder_forward
        if names == _TOWER:
            _tower_weights(module)
            return tower_forward
    except AttributeError:  # a part is missing, or is of another kind
        return None
    return None


def can_run(tensor: Tensor) -> bool:
    """Whether the kernels run where a tensor, weights or rows, is, in its dtype."""
    here = tensor.is_cuda or (tensor.device.type == "cpu" and launch.interpreting())
    return here and launch.has_triton() and tensor.dtype in _TOLERANCE


def decoder_forward(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
    """A decoder layer's forward (1, T, D) for packed groups; anything else goes to the stock code."""
    layout, angles = options.get("prefix_layout"), options.get("position_embeddings")
    fits = not args and isinstance(layout, SharedPrefixLayout) and options.get("past_key_values") is None
    weights = _weights_if_plain(self, _decoder_weights, hidden_states, angles) if fits else None
    if weights is None or self.self_attn.training:
        return type(self).forward(self, hidden_states, *args, **options)
    attention = self.self_attn
    shape = BlockShape(
        attention.q_proj.out_features // attention.head_dim,
        attention.k_proj.out_features // attention.head_dim,
        self.input_layernorm.variance_epsilon,
        self.post_attention_layernorm.variance_epsilon,
    )
    cos, sin = (each[0] for each in angles)  # type: ignore[union-attr]
    packed = SharedPrefixAttention(layout, attention.scaling)  # type: ignore[arg-type]
    return transformer_block(hidden_states, weights, shape, cos, sin, packed, rows_read_of(self))


def tower_forward(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
    """A tower block's forward (T, D) for images or their windows; anything else goes to the stock code."""
    offsets, angles = options.get("cu_seqlens"), options.get("position_embeddings")
    fits = not args and isinstance(offsets, Tensor) and _takes_segments(hidden_states)
    weights = _weights_if_plain(self, _tower_weights, hidden_states, angles) if fits else None
    if weights is None or self.attn.training:
        return type(self).forward(self, hidden_states, *args, **options)
    attention, longest = self.attn, options.get("max_seqlen")
    num_heads = attention.num_heads
    shape = BlockShape(num_heads, num_heads, self.norm1.variance_epsilon, self.norm2.variance_epsilon)
    longest = longest if isinstance(longest, int) else longest_segment(offsets)  # type: ignore[arg-type]
    segments = SegmentAttention(offsets, longest, attention.scaling)  # type: ignore[arg-type]
    cos, sin = angles  # type: ignore[misc]
    return transformer_block(hidden_states, weights, shape, cos, sin, segments)


def longest_segment(offsets: Tensor) -> int:
    """Length of the longest segment. All blocks of a tower share ``offsets``, so it is cached on that tensor."""
    found: int | None = getattr(offsets, "balcaprl_longest", None)
    if found is None:
        found = int(offsets.diff().max())
        offsets.balcaprl_longest = found  # type: ignore[attr-defined]
    return found


def prepare(module: nn.Module) -> None:
    """Put weights that multiply the same input side by side in memory, so that they need only one matrix product."""
    weights = _decoder_weights(module) if hasattr(module, "self_attn") else _tower_weights(module)
    for linear in (weights.qkv, weights.gate_up):
        for part in linear:
            if part:
                adjoin(part)


def agrees(module: nn.Module, forward: Forward) -> bool:
    """Whether ``forward`` gives the values and gradients of the module's stock code, on random rows."""
    try:
        found, expected = (_tried(module, each) for each in (forward, type(module).forward))
        tolerance = _TOLERANCE[found[0].dtype]
        wrong = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if _apart(a, b) > tolerance]
    except Exception as error:  # from the stock code, which is foreign, or from compiler, driver or version
        logger.warning(
            "%s keeps its stock code: %s", type(module).__name__, f"{type(error).__name__}: {error}".splitlines()[0]
        )
        return False
    if wrong:
        logger.warning("%s keeps its stock code: our kernels compute something else", type(module).__name__)
    return not wrong


# What a module is made of.


def _decoder_weights(module: Any) -> BlockWeights:
    """Raises AttributeError if a part is missing or of another kind."""
    attention = module.self_attn
    if hasattr(attention, "q_norm"):
        raise AttributeError("queries are normalised")
    return BlockWeights(
        _norm_weight(module.input_layernorm),
        _linear(attention.q_proj, attention.k_proj, attention.v_proj),
        _linear(attention.o_proj),
        _norm_weight(module.post_attention_layernorm),
        *_mlp(module.mlp),
    )


def _tower_weights(module: Any) -> BlockWeights:
    """Raises AttributeError if a part is missing or of another kind."""
    return BlockWeights(
        _norm_weight(module.norm1),
        _linear(module.attn.qkv),
        _linear(module.attn.proj),
        _norm_weight(module.norm2),
        *_mlp(module.mlp),
    )


def _mlp(mlp: Any) -> tuple[Linear, Linear]:
    return _linear(mlp.gate_proj, mlp.up_proj), _linear(mlp.down_proj)


def _norm_weight(norm: Any) -> Tensor:
    if not hasattr(norm, "variance_epsilon"):
        raise AttributeError("not an RMSNorm")
    return norm.weight  # type: ignore[no-any-return]


def _linear(*layers: Any) -> Linear:
    if any(type(each) is not nn.Linear for each in layers) or len({each.bias is None for each in layers}) > 1:
        raise AttributeError("not plain linear layers")
    biases = () if layers[0].bias is None else tuple(each.bias for each in layers)
    return Linear(tuple(each.weight for each in layers), biases)


def _weights_if_plain(
    module: nn.Module, weights_of: Callable[[Any], BlockWeights], rows: Tensor, angles: Any
) -> BlockWeights | None:
    """Return the block's weights if its rows (T, D) or (1, T, D) are packed and nothing else acts on them; else None.

    Adapters, foreign hooks and autocast would act on them.
    """
    # A model may have been moved or converted since its layers were fused.
    if not can_run(rows) or torch.is_autocast_enabled(rows.device.type) or not isinstance(angles, tuple):
        return None
    num_rows = rows.numel() // rows.shape[-1]
    if rows.shape[-2] != num_rows or any(each.numel() != num_rows * each.shape[-1] for each in angles):
        return None
    parts = (each for child in module._modules.values() for each in (child, *child._modules.values()))  # type: ignore[union-attr]
    if any(each._forward_hooks or each._forward_pre_hooks for each in parts) and rows_read_of(module) is None:  # type: ignore[union-attr]
        return None
    try:
        weights = weights_of(module)
    except AttributeError:  # an adapter was added after the layer was fused
        return None
    return weights if weights.norm1.dtype == rows.dtype else None


def _takes_segments(rows: Tensor) -> bool:
    """Whether the segments' attention takes rows of this dtype on their device."""
    return not rows.is_cuda or rows.dtype in (torch.bfloat16, torch.float16)


# The comparison with the stock code.


def _tried(module: Any, forward: Forward) -> list[Tensor]:
    """Output and gradients of a module on random rows; the same rows each time."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    is_decoder = hasattr(module, "self_attn")
    norm = module.input_layernorm if is_decoder else module.norm1
    attention = module.self_attn if is_decoder else module.attn
    size = attention.head_dim
    layout = SharedPrefixLayout.from_lengths([13, 3], [[7, 4], [5]], weight.device)
    rows, above = (random(layout.num_tokens, norm.weight.shape[0]) for _ in range(2))
    angles = torch.randn(layout.num_tokens, size // 2, generator=generator).repeat(1, 2).to(weight.device)
    cos_sin = (angles.cos(), angles.sin())
    rows = rows.requires_grad_()
    with torch.enable_grad():
        if is_decoder:
            options = {"position_embeddings": tuple(each[None].to(weight.dtype) for each in cos_sin)}
            with using_attention(attention.config, SHARED_PREFIX):
                out = forward(module, rows[None], attention_mask=None, prefix_layout=layout, **options)
            out = (out[0] if isinstance(out, tuple) else out)[0]
        else:
            offsets = torch.tensor([0, 8, 16, layout.num_tokens], dtype=torch.int32, device=weight.device)
            out = forward(module, rows, cu_seqlens=offsets, position_embeddings=cos_sin)
    return [out.detach(), *torch.autograd.grad(out, [rows, *parameters], above)]


def _apart(actual: Tensor, expected: Tensor) -> float:
    """2-norm of the difference, divided by that of the expected values; infinite if anything is not finite."""
    distance = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
    return float(distance) if torch.isfinite(distance) else float("inf")
