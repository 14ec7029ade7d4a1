"""From the end of ``pack`` to the read of a result, the host waits for nothing where the policy is on a GPU.

The path is that of a GPU, on the CPU; ``device_watch`` says what would wait there. ``test_cuda.py`` has it on a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from device_watch import DeviceWatch, as_on_a_gpu
from small_policies import make_groups, make_policy
from torch import Tensor

from balcaprl.kernels import linear_policy_loss

pytest.importorskip("triton", reason="the path of a GPU needs triton")
ALLOWED = {
    ("_local_scalar_dense", "transformers/masking_utils.py _ignore_causal_mask_sdpa"): (
        "transformers reads whether the mask of repeated prompts hides anything; shared ones have no mask"
    )
}
"""Waits that stay, each with its reason."""


@pytest.mark.parametrize("freeze", [False, True], ids=["trained tower", "frozen tower"])
@pytest.mark.parametrize("sharing", ["shared", "repeated"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava", "qwen3"])
def test_from_batch_to_gradients_nothing_is_waited_for(
    name: str, sharing: Any, freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(name, torch.bfloat16, freeze_vision=freeze, fused_layers=False)
    watch = as_on_a_gpu(monkeypatch)
    packed = policy.pack(make_groups(policy), sharing)
    watch.put_policy(policy, packed)
    advantages = torch.linspace(-1, 1, packed.num_completions)
    watch.put(advantages)
    with watch.watching():
        hidden = policy.hidden_states(packed)
        rows = (hidden, policy.lm_head_weight, packed.targets)
        loss = linear_policy_loss(*rows, None, advantages, packed.cu_seqlens).loss
        loss.backward()
    allowed = ALLOWED if sharing == "repeated" else {}
    assert {place: count for place, count in watch.waits.items() if place not in allowed} == {}
    assert watch.checked == [True]
    assert all(watch.has(p.grad) for p in policy.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_a_tower_that_computes_more_than_is_known_gets_its_grid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(name)
    packed = policy.pack(make_groups(policy))
    assert len(packed.image_inputs) > 4
    expected = policy.hidden_states(packed)
    module = sys.modules[type(policy.stock_model.model.visual).__module__]
    monkeypatch.setattr(module, "get_vision_something", lambda grid: grid, raising=False)
    packed = policy.pack(make_groups(policy))
    assert packed.image_inputs.keys() == {"pixel_values", "image_grid_thw"}
    assert torch.equal(policy.hidden_states(packed), expected)


WAITING = {
    "_local_scalar_dense": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "index by a mask": lambda x: x[x > 1],
    "index of a tensor on the host": lambda x: x[torch.tensor([0, 1])],
    "mul of a tensor on the host": lambda x: x * torch.ones(4),
    "upload": lambda x: torch.ones(4).to(x.device) * x,
    "upload of a list": lambda x: torch.tensor([1.0], device=x.device) * x,
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("what", WAITING)
def test_the_watch_finds_a_wait(what: str) -> None:
    watch, x = DeviceWatch(), torch.arange(4.0)
    watch.put(x)
    with watch.watching():
        WAITING[what](2 * x)
    assert {(each, place.split("/")[-1]) for each, place in watch.waits} == {(what, "test_waits.py <lambda>")}


def test_the_watch_takes_what_does_not_wait() -> None:
    watch, x = DeviceWatch(), torch.arange(4.0)
    watch.put(x)

    def sound(x: Tensor) -> Tensor:
        index = torch.arange(4, device=x.device)
        (moved,) = watch.upload([torch.tensor([3, 2, 1, 0])], x.device)
        return torch.where(x > 1, x[index] * torch.tensor(2.0), x.index_select(0, moved) + x.new_ones(4))

    with watch.watching():
        assert watch.has(sound(x))
        assert not watch.has(torch.ones(3))
    assert not watch.waits
