"""Whole blocks on interpreted kernels: which modules are taken, that policies compute the same, and when they give way."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.kernels import SharedPrefixLayout
from balcaprl.policy import Group, Policy
from balcaprl.policy.layers import blocks
from balcaprl.policy.layers.attention import SHARED_PREFIX, using_attention
from balcaprl.policy.layers.fused import fuse_layers, fused_classes, stock_layers, unfuse_layers
from balcaprl.types import Sample

pytest.importorskip("triton", reason="the blocks' kernels need triton")
CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3
BLOCKS = {"qwen": {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"}, "llava": {"LlamaDecoderLayer"}}


@pytest.fixture(scope="module", params=["qwen", "llava"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("tiny")
    {"qwen": build_tiny_qwen, "llava": build_tiny_llava}[request.param](folder, CORPUS)
    made = Policy.from_pretrained(folder, device="cpu")
    made.family_name = request.param  # type: ignore[attr-defined]
    return made


def make_groups(policy: Policy) -> list[Group]:
    groups = []
    for index, lengths in enumerate([[3, 1], [2, 5]]):
        image = Image.new("RGB", (56, 84 if index else 56), (200, 30 * index, 90))
        prompt = policy.prepare(Sample(str(index), lambda image=image: image, "A square.", "Describe the image."))
        generator = torch.Generator().manual_seed(index)
        completions = [torch.randint(5, 40, (n,), generator=generator) for n in lengths]
        groups.append(Group(prompt.prompt_ids, completions, prompt.image_inputs))
    return groups


def gradients(policy: Policy) -> dict[str, Tensor]:
    policy.model.zero_grad(set_to_none=True)
    logprobs = policy.logprobs(policy.pack(make_groups(policy), "shared"))
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {
        "logprobs": logprobs.detach(),
        **{n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None},
    }


def runs(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the blocks that run as one function from now on, by attention."""
    counted: Counter[str] = Counter()
    stock = blocks.transformer_block

    def counting(*arguments: Any) -> Tensor:
        counted[type(arguments[5]).__name__] += 1
        return stock(*arguments)

    monkeypatch.setattr(blocks, "transformer_block", counting)
    return counted


@pytest.mark.interpreter
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_policy_on_blocks_equals_the_stock_one(
    policy: Policy, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BLOCKS[policy.family_name] <= fused_classes(policy.stock_model).keys()  # type: ignore[attr-defined]
    with stock_layers(policy.model):
        expected = gradients(policy)
    if checkpointed:
        policy.enable_gradient_checkpointing()
    counted = runs(policy, monkeypatch)
    found = gradients(policy)
    own_tower = {"SegmentAttention"} if policy.family_name == "qwen" else set()  # type: ignore[attr-defined]
    assert set(counted) == {"SharedPrefixAttention", *own_tower}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # A key's bias shifts all scores of a query alike: its true gradient is 0, and only rounding is left of it.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5 * float(value.abs().max()), msg=name)


@pytest.mark.interpreter
def test_weights_of_one_input_lie_side_by_side_and_are_saved_as_before(policy: Policy, tmp_path: Any) -> None:
    from balcaprl.kernels.block.transformer_block import adjacent

    attention = policy.text_model.layers[0].self_attn
    assert (
        adjacent([attention.q_proj.weight.detach(), attention.k_proj.weight.detach(), attention.v_proj.weight.detach()])
        is not None
    )
    policy.save(tmp_path)
    again = Policy.from_pretrained(tmp_path, device="cpu", fused_layers=False)
    for (name, a), b in zip(policy.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def adapted(layer: Any) -> None:
    class Linear(nn.Linear):
        """Stands in for an adapter's layer."""

    layer.self_attn.q_proj.__class__ = Linear


def hooked(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda *_: None)


def wider(layer: Any) -> None:
    layer.double()


@pytest.mark.interpreter
@pytest.mark.parametrize("change", [None, adapted, hooked, wider])
def test_a_changed_layer_runs_its_stock_code(policy: Policy, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = copy.deepcopy(policy.text_model.layers[0])
    if change is not None:
        change(layer)
    counted, weight = runs(policy, monkeypatch), layer.input_layernorm.weight
    layout = SharedPrefixLayout.from_lengths([2], [[2]])
    angles = tuple(torch.ones(1, 4, layer.self_attn.head_dim, dtype=weight.dtype) for _ in range(2))
    with using_attention(layer.self_attn.config, SHARED_PREFIX), torch.no_grad():
        rows = torch.ones(1, 4, len(weight), dtype=weight.dtype)
        layer(rows, attention_mask=None, prefix_layout=layout, position_embeddings=angles)
    assert sum(counted.values()) == (change is None)


@pytest.mark.interpreter
def test_autocast_keeps_the_stock_code(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = runs(policy, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        policy.hidden_states(policy.pack(make_groups(policy), "shared"))
    assert not counted


@pytest.mark.interpreter
def test_a_block_that_computes_something_else_is_not_taken(
    policy: Policy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(policy.text_model)
    unfuse_layers(other)
    real = blocks.transformer_block
    monkeypatch.setattr(blocks, "transformer_block", lambda *arguments: real(*arguments) * 1.1)
    fuse_layers(other)
    assert "our kernels compute something else" in caplog.text
    assert not any(name.endswith("DecoderLayer") for name in fused_classes(other))


def test_without_triton_or_its_interpreter_the_stock_code_runs(policy: Policy) -> None:
    if blocks.can_run(next(policy.model.parameters())):
        pytest.skip("this process interprets; the default test run does not")
    assert not any(name.endswith(("DecoderLayer", "VisionBlock")) for name in fused_classes(policy.stock_model))
