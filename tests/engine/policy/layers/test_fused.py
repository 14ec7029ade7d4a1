"""Fused layers: which ones are taken, that they compute what the stock code does, and that they can be taken back."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.kernels.support import native
from balcaprl.policy import Policy
from balcaprl.policy.layers import fused as layers
from balcaprl.policy.layers import kernels as layer_kernels
from balcaprl.policy.layers.fused import fuse_layers, fused_classes, stock_layers

CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3
pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not there")


@pytest.fixture(scope="module", params=[build_tiny_qwen, build_tiny_llava], ids=["qwen", "llava"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    request.param(folder, CORPUS)
    return Policy.from_pretrained(folder, device="cpu", fused_layers=False).text_model


def outputs_and_gradients(model, inputs_embeds: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype))
    return {"hidden": hidden.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def expected_classes(model) -> dict[str, int]:
    layers = model.config.num_hidden_layers
    norms = {type(model.norm).__name__: 2 * layers + 1}
    return norms | {type(part).__name__: layers for part in (model.layers[0].mlp, model.layers[0].self_attn)}


def test_fused_layers_equal_the_stock_ones(model):
    embeds = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    stock = outputs_and_gradients(model, embeds)
    names = list(model.state_dict())
    fused = copy.deepcopy(model)
    fuse_layers(fused)
    assert fused_classes(model) == {}
    assert fused_classes(fused) == expected_classes(model)
    assert list(fused.state_dict()) == names
    found = outputs_and_gradients(fused, embeds)
    assert found.keys() == stock.keys()
    for name, expected in stock.items():
        # A key's bias shifts all scores of a query alike: its true gradient is 0, and only rounding is left of it.
        assert name.endswith("k_proj.bias") or (found[name] - expected).norm() <= 5e-6 * expected.norm(), name
    assert any(not torch.equal(found[name], expected) for name, expected in stock.items()), "other code must have run"
    with stock_layers(fused):
        assert fused_classes(fused) == {}
        again = outputs_and_gradients(fused, embeds)
    assert all(torch.equal(again[name], expected) for name, expected in stock.items())
    assert fused_classes(fused) == fused_classes(copy.deepcopy(fused)) == expected_classes(model)


def test_an_image_tower_is_fused_too(tmp_path):
    build_tiny_qwen(tmp_path, CORPUS)
    policy = Policy.from_pretrained(tmp_path, device="cpu")
    tower = policy.stock_model.model.visual
    pixels, grid = torch.randn(64, 1176, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 8, 8]])
    assert {"Qwen2_5_VLRMSNorm", "Qwen2_5_VLMLP", "Qwen2_5_VLVisionAttention", "Conv3d"} <= fused_classes(tower).keys()
    with torch.no_grad():
        found = tower(pixels, grid_thw=grid).pooler_output
        with stock_layers(tower):
            expected = tower(pixels, grid_thw=grid).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, expected)


def test_a_copy_runs_on_its_own_weights(model):
    fused = copy.deepcopy(model)
    fuse_layers(fused)
    other = copy.deepcopy(fused)
    embeds = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    before = other(inputs_embeds=embeds, use_cache=False).last_hidden_state
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert torch.equal(other(inputs_embeds=embeds, use_cache=False).last_hidden_state, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_the_stock_code(model, dtype):
    stock = copy.deepcopy(model).to(dtype)
    fused = copy.deepcopy(stock)
    fuse_layers(fused)
    embeds = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, found = (outputs_and_gradients(each, embeds) for each in (stock, fused))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class ShiftedRMSNorm(nn.Module):
    """As Gemma's: its weight counts from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


def test_a_layer_that_computes_something_else_stays(caplog):
    model = nn.Sequential(ShiftedRMSNorm(), nn.Linear(8, 8), ShiftedRMSNorm())
    with caplog.at_level(logging.WARNING):
        fuse_layers(model)
    assert fused_classes(model) == {}
    assert caplog.text.count("ShiftedRMSNorm keeps its stock code") == 1


def attention_classes():
    """Every attention of transformers whose module rotates by a function of the name that is looked for."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "apply_rotary_pos_emb" not in path.read_text():
            continue
        try:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except (ImportError, RuntimeError):  # of a package that is not installed
            continue
        for name, kind in vars(module).items():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and name.endswith("Attention"):
                yield kind


def test_no_attention_of_transformers_is_refused():
    """Many rotate by a function of the same name that takes other arguments: they keep their stock code."""
    found = {kind.__name__: layers._rotating_forward(kind.forward) is not None for kind in attention_classes()}
    assert len(found) > 150
    taken = {name for name, fused in found.items() if fused}
    assert {"LlamaAttention", "Qwen2_5_VLAttention", "Qwen3Attention"} <= taken
    assert not {"Gemma4TextAttention", "GPTJAttention", "CodeGenAttention", "DINOv3ViTAttention"} & taken
    assert {"Gemma4TextAttention", "GPTJAttention", "CodeGenAttention", "DINOv3ViTAttention"} <= found.keys()


def renaming(forward, calls):
    """As transformers' own: an argument is taken by its older name, too."""

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        calls.append("renaming")
        if "older_mask" in kwargs:
            kwargs["attention_mask"] = kwargs.pop("older_mask")
        return forward(*args, **kwargs)

    return wrapper


def counting(forward, calls, *, _name="counting"):
    @functools.wraps(forward)
    def wrapper(self, *args, _told=_name, **kwargs):
        calls.append(_told)
        return forward(self, *args, **kwargs)

    return wrapper


def holding_elsewhere(forward, calls):
    """What it wraps cannot be exchanged: it is no variable of the wrapper."""
    held = [forward]

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return held[0](*args, **kwargs)

    return wrapper


def decorated(model, decorators, calls):
    """A copy of a model whose attentions' forwards are behind decorators, the first one innermost."""
    model = copy.deepcopy(model)
    stock = type(model.layers[0].self_attn)
    forward = functools.reduce(
        lambda inner, decorator: decorator(inner, calls), decorators, inspect.unwrap(stock.forward)
    )
    kind = type("DecoratedAttention", (stock,), {"forward": forward})
    for layer in model.layers:
        layer.self_attn.__class__ = kind
    return model


@pytest.mark.parametrize("decorators", [(renaming,), (counting,), (renaming, counting), (counting, renaming)], ids=len)
def test_an_attention_behind_decorators_is_taken_with_them(model, decorators):
    calls: list[str] = []
    embeds = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected, found = copy.deepcopy(model), decorated(model, decorators, calls)
    fuse_layers(expected)
    fuse_layers(found)
    assert fused_classes(found)["DecoratedAttention"] == len(model.layers)
    with torch.no_grad():
        hidden, other = (m(inputs_embeds=embeds, use_cache=False).last_hidden_state for m in (found, expected))
    assert torch.equal(hidden, other)
    assert calls == [d.__name__ for d in reversed(decorators)] * len(model.layers)
    with stock_layers(found):
        assert not fused_classes(found)
    assert fused_classes(found)["DecoratedAttention"] == len(model.layers)


def test_a_decorated_attention_takes_an_argument_by_its_older_name(model):
    found = decorated(model, [renaming], [])
    attention = found.layers[0].self_attn
    fuse_layers(found)
    hidden = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    angles = found.rotary_emb(
        hidden, torch.arange(5).expand(3, 1, 5) if "Qwen" in type(found).__name__ else torch.arange(5)[None]
    )
    mask = torch.zeros(1, 1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    with torch.no_grad():
        older, newer = (
            attention(hidden, position_embeddings=angles, **{name: mask})[0]
            for name in ("older_mask", "attention_mask")
        )
    assert torch.equal(older, newer)


@pytest.mark.parametrize("decorators", [(holding_elsewhere,), (holding_elsewhere, counting)], ids=len)
def test_an_attention_that_its_decorator_holds_elsewhere_stays(model, decorators):
    found = decorated(model, decorators, [])
    fuse_layers(found)
    assert "DecoratedAttention" not in fused_classes(found)


class GatedRMSNorm(nn.Module):
    """It is called with more than its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight * gate


class FailingRMSNorm(ShiftedRMSNorm):
    """Wants more axes than a check can guess."""

    def forward(self, x: Tensor) -> Tensor:
        _batch, _head, _length, _width = x.shape
        return super().forward(x)


class BareRMSNorm(nn.Module):
    """Has no weight."""

    weight, variance_epsilon = None, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("kind", [GatedRMSNorm, FailingRMSNorm, BareRMSNorm])
def test_foreign_layers_that_cannot_be_checked_stay(kind):
    model = nn.Sequential(kind(), nn.Linear(8, 8))
    fuse_layers(model)
    assert fused_classes(model) == {}


def test_adapters_in_a_block_are_used(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    fused = copy.deepcopy(model)
    fuse_layers(fused)
    adapted = peft.get_peft_model(
        fused, peft.LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    )
    embeds = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = adapted(inputs_embeds=embeds, use_cache=False).last_hidden_state
        with stock_layers(adapted):
            expected = adapted(inputs_embeds=embeds, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, model(inputs_embeds=embeds, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("wrong", ["rms_norm", "silu_mul", "rotate"])
@pytest.mark.parametrize("part", ["value", "gradient"])
def test_kernels_of_others_are_held_against_the_formulas(wrong, part):
    """What decides whether Liger's are used, which run on a GPU alone."""
    assert layer_kernels.wrong_kernels(layer_kernels.NATIVE, torch.device("cpu")) == []
    kernel = getattr(layer_kernels.NATIVE, wrong)

    def off(*arguments):
        out = kernel(*arguments)
        first = out[0] if wrong == "rotate" else out
        bent = 1.01 * first if part == "value" else first + 0.01 * (first - first.detach())
        return (bent, out[1]) if wrong == "rotate" else bent

    assert layer_kernels.wrong_kernels(layer_kernels.NATIVE._replace(**{wrong: off}), torch.device("cpu")) == [wrong]
