"""Plans found by watching a load, on a toy engine that fuses, pads, transposes and repacks."""

import pytest
import torch
from torch import nn

from balcaprl.rollout import weights
from balcaprl.rollout.weights import (
    UNUSED,
    CopyRecorder,
    InplaceCopy,
    SharedWeights,
    StaleWeightsError,
    make_plan,
    why_not_inplace,
    why_not_shared,
)


class Trained(nn.Module):
    """As a trainer sees it: q, k, v apart, a bias, a vocabulary, something that the engine has no use for."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(6, 2)
        self.visual = nn.Linear(6, 12)
        self.embed = nn.Embedding(10, 6)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))


class Engine(nn.Module):
    """As an engine keeps it: one matrix for q, k, v; a padded vocabulary; a fused matrix loaded in three slices."""

    def __init__(self, dtype=torch.float32, transpose=False, tied_twice=False):
        super().__init__()
        self.qkv, self.visual = nn.Linear(6, 8, dtype=dtype), nn.Linear(6, 12, dtype=dtype)
        self.embed = nn.Embedding(16, 6, dtype=dtype)
        self.head = nn.Linear(6, 10, bias=False, dtype=dtype) if tied_twice else None
        self.scale = nn.Parameter(torch.zeros((), dtype=dtype))
        self.transpose = transpose
        self.requires_grad_(False)

    def load_weights(self, tensors):
        for name, tensor in tensors:
            layer, _, kind = name.partition(".")
            if layer in "qkv":
                start, size = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}[layer]
                getattr(self.qkv, kind).data.narrow(0, start, size).copy_(tensor)
            elif layer == "visual":
                target = getattr(self.visual, kind).data
                for part in range(3):
                    target.narrow(0, 4 * part, 4).copy_(tensor.narrow(0, 4 * part, 4))
            elif layer == "embed":
                self.embed.weight.data[:10].copy_(tensor.t().contiguous().t() if self.transpose else tensor)
                self.embed.weight.data[10:].fill_(0)
                if self.head is not None:
                    self.head.weight.data.copy_(tensor)
            elif layer == "scale":
                self.scale.data.copy_(tensor)


def load(trained, engine):
    parameters = dict(trained.named_parameters())
    recorder = CopyRecorder(parameters)
    with recorder:
        engine.load_weights((name, tensor.detach()) for name, tensor in trained.state_dict().items())
    return parameters, recorder


def planned(**options):
    torch.manual_seed(0)
    trained, engine = Trained(), Engine(**options)
    return trained, engine, make_plan(*load(trained, engine), engine)


def test_every_parameter_is_found_where_the_engine_keeps_it():
    trained, engine, plan = planned()
    assert plan.unserved == {"unused": UNUSED}
    assert why_not_shared(plan) is None
    plan.check_values()
    assert plan.num_bytes == 4 * (sum(p.numel() for p in trained.parameters()) - 3)
    for index, name in enumerate(
        plan.parts
    ):  # markers: each parameter gets a value of its own, and elements get theirs
        numel = plan.parameters[name].numel()
        plan.alias(name).copy_((1000 * (index + 1) + torch.arange(numel)).view(plan.parameters[name].shape))
    order = {name: 1000.0 * (index + 1) for index, name in enumerate(plan.parts)}
    assert engine.qkv.weight[0, 0] == order["q.weight"]
    assert engine.qkv.weight[4, 1] == order["k.weight"] + 1
    assert engine.qkv.bias[7] == order["v.bias"] + 1
    assert engine.visual.weight[11, 5] == order["visual.weight"] + 71
    assert engine.embed.weight[9, 5] == order["embed.weight"] + 59
    assert (engine.embed.weight[10:] == 0).all()
    assert engine.scale == order["scale"]


def test_shared_parameters_are_the_engines_and_train_in_place():
    trained, engine, plan = planned()
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    shared = SharedWeights(plan)
    assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    sum((p**2).sum() for p in trained.parameters()).backward()
    optimizer.step()
    assert torch.equal(engine.qkv.weight[4:6], trained.k.weight)
    assert not torch.equal(engine.qkv.weight[4:6], before["k.weight"])
    assert shared.push(1) == (len(plan.parts), 0)
    trained.k.weight.data = trained.k.weight.data.clone()
    with pytest.raises(StaleWeightsError, match=r"k\.weight no longer lies in the engine's memory"):
        shared.push(2)


def test_a_second_engine_takes_over_parameters_that_live_in_the_first():
    trained, first, plan = planned()
    SharedWeights(plan)
    second = Engine()
    moved = make_plan(*load(trained, second), second)
    moved.check_values()
    assert why_not_shared(moved) is None
    SharedWeights(moved)
    with torch.no_grad():
        trained.v.weight.fill_(7)
    assert (second.qkv.weight[6:] == 7).all()
    assert not (first.qkv.weight[6:] == 7).any()


def test_detached_parameters_own_their_memory():
    trained, engine, plan = planned()
    shared = SharedWeights(plan)
    shared.detach(copy=True)
    engine.qkv.weight.fill_(0)
    assert not (trained.q.weight == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_brings_everything_and_is_checked(dtype, monkeypatch):
    trained, _, plan = planned(dtype=dtype)
    reason = why_not_shared(plan)
    assert (reason is None) == (dtype == torch.float32)
    assert why_not_inplace(plan) is None
    strategy = InplaceCopy(plan)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    num_tensors, num_bytes = strategy.push(1)
    assert num_tensors == len(plan.parts)
    assert num_bytes == plan.num_bytes * dtype.itemsize // 4
    plan.check_values()
    with torch.no_grad():
        trained.visual.bias[:] += 1
    monkeypatch.setattr(weights, "copy_all", lambda targets, sources: None)
    with pytest.raises(StaleWeightsError, match=r"old values for visual\.bias"):
        strategy.push(2)


def test_one_element_of_a_large_tensor_is_found_by_some_sync():
    """The sample moves with the version: no element stays unseen for ever."""
    _, engine, plan = planned()
    plan.check_samples(0)
    engine.visual.weight[3, 3] += 1
    found = 0
    for version in range(20):
        try:
            plan.check_samples(version)
        except StaleWeightsError:
            found += 1
    assert found > 0


def test_a_tensor_that_is_transformed_on_loading_allows_no_views():
    _, _, plan = planned(transpose=True)
    assert plan.unserved["embed.weight"] == "transformed as the engine loads it"
    assert "embed.weight is transformed" in why_not_shared(plan)
    assert "embed.weight is transformed" in why_not_inplace(plan)


def test_a_tensor_in_two_places_is_copied_to_both():
    trained, engine, plan = planned(tied_twice=True)
    assert "embed.weight in several places" in why_not_shared(plan)
    with torch.no_grad():
        trained.embed.weight.fill_(3)
    InplaceCopy(plan).push(1)
    assert (engine.head.weight == 3).all()
    assert (engine.embed.weight[:10] == 3).all()


def test_repacking_is_seen_before_and_after_the_plan():
    trained, engine = Trained(), Engine()
    parameters, recorder = load(trained, engine)
    plan = make_plan(parameters, recorder, engine)
    engine.qkv.weight = nn.Parameter(engine.qkv.weight.data.clone(), requires_grad=False)
    with pytest.raises(StaleWeightsError, match=r"replaced Linear\.weight"):
        InplaceCopy(plan).push(1)
    assert make_plan(parameters, recorder, engine).unserved["q.weight"] == "repacked after loading"
