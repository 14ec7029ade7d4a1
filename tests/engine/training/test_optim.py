"""The optimiser: its schedule, its masters, its refusal of bad gradients, its exact state."""

import itertools
import math

import pytest
import torch

from balcaprl.config import OptimConfig
from balcaprl.training.optim import PolicyOptimizer
from balcaprl.types import DivergedError


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)).to(dtype)


def take_steps(model, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
        model(x).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_warms_up_and_ends_where_it_should(schedule):
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule=schedule, min_lr_ratio=0.1)
    rates = [config.learning_rate(step, 100) for step in range(101)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[4:]))


def test_matches_plain_adamw():
    config = OptimConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1, max_grad_norm=1e9)
    ours, plain = make_model(), make_model()
    optimizer = PolicyOptimizer(ours.named_parameters(), config, 10)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    take_steps(ours, optimizer, 5, seed=1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        plain(torch.randn(4, 5, generator=generator)).square().mean().backward()
        adamw.step()
        adamw.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_resumes_bit_for_bit(dtype):
    config = OptimConfig(lr=1e-2, schedule="cosine", warmup_steps=3)
    model = make_model(dtype)
    optimizer = PolicyOptimizer(model.named_parameters(), config, 20)
    take_steps(model, optimizer, 6, seed=1)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in optimizer.state().items()}
    take_steps(model, optimizer, 6, seed=2)
    again = make_model(dtype)
    again.load_state_dict(weights)
    resumed = PolicyOptimizer(again.named_parameters(), config, 20)
    resumed.load_state(state)
    take_steps(again, resumed, 6, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert resumed.num_updates == 12


def test_bfloat16_weights_follow_small_updates():
    """1e-5 a step is lost in bfloat16 around 1.0, but not in the masters."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = PolicyOptimizer([("w", weight)], OptimConfig(lr=1e-4, warmup_steps=0), 200)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.99, abs=0.005)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = make_model()
    optimizer = PolicyOptimizer(model.named_parameters(), OptimConfig(), 10)
    before = [p.clone() for p in model.parameters()]
    (model(torch.randn(4, 5)).sum() * math.nan).backward()
    metrics = optimizer.step()
    assert metrics["num_nonfinite_updates"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_state_of_another_model_is_refused():
    optimizer = PolicyOptimizer(make_model().named_parameters(), OptimConfig(), 10)
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_state({"num_updates": torch.tensor(1), "step.elsewhere": torch.tensor(1.0)})


def test_a_frozen_policy_is_refused():
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        PolicyOptimizer(model.named_parameters(), OptimConfig(), 10)


# ---------------------------------------------------------------------------------------------------- guards


def one_gradient(model, scale=1.0):
    (scale * model(torch.ones(4, 5, dtype=next(model.parameters()).dtype)).float().square().mean()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [1e2, 1e3, 1e9])
def test_an_update_larger_than_the_weights_is_refused_and_ends_the_run(dtype, lr):
    model = make_model(dtype)
    optimizer = PolicyOptimizer(model.named_parameters(), OptimConfig(lr=lr, max_refused_updates=3), 10)
    before = {k: v.clone() for k, v in (model.state_dict() | optimizer.state()).items() if k != "num_updates"}
    for _ in range(2):
        one_gradient(model)
        metrics = optimizer.step()
        assert (metrics["num_refused_updates"], metrics["num_nonfinite_updates"]) == (1, 0)
    one_gradient(model)
    with pytest.raises(DivergedError, match=r"3 updates in a row were refused .*max_update_ratio.* lower optim.lr"):
        optimizer.step()
    after = model.state_dict() | optimizer.state()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    optimizer.check()


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_damaged_moments_are_seen_before_they_reach_the_weights(moment, value):
    model = make_model()
    optimizer = PolicyOptimizer(model.named_parameters(), OptimConfig(), 10)
    one_gradient(model)
    assert optimizer.step()["num_refused_updates"] == 0
    next(iter(optimizer._adamw.state.values()))[moment].view(-1)[3] = value
    before = [p.clone() for p in model.parameters()]
    one_gradient(model)
    assert optimizer.step()["num_refused_updates"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(DivergedError, match=f"the {moment} of 0.weight are not finite"):
        optimizer.check()


def test_weights_that_grow_without_end_are_stopped():
    """Each update is small; together they carry the weights away from where they were."""
    model = make_model()
    config = OptimConfig(lr=0.2, warmup_steps=0, max_weight_growth=3.0, max_refused_updates=2)
    optimizer = PolicyOptimizer(model.named_parameters(), config, 1000)

    def train():
        for _ in range(1000):
            model(torch.ones(4, 5)).sum().neg().backward()
            optimizer.step()

    with pytest.raises(DivergedError, match="max_weight_growth is 3"):
        train()
    assert 1 < optimizer.num_updates < 1000
    with pytest.raises(DivergedError, match="max_weight_growth"):
        optimizer.check()


def test_one_good_update_ends_a_row_of_refused_ones():
    model = make_model()
    optimizer = PolicyOptimizer(model.named_parameters(), OptimConfig(max_refused_updates=2), 10)
    for scale in (math.nan, 1.0, math.inf, 1.0, math.nan, 1.0):
        one_gradient(model, scale)
        metrics = optimizer.step()
        assert metrics["num_refused_updates"] == float(not math.isfinite(scale))
    assert optimizer.num_refused_in_a_row == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_norm_that_an_update_is_judged_by_is_what_it_then_changes(dtype, weight_decay):
    model = make_model(dtype)
    config = OptimConfig(lr=1e-2, warmup_steps=0, eps=1e-3, weight_decay=weight_decay)
    optimizer = PolicyOptimizer(model.named_parameters(), config, 10)
    for step in range(4):
        before = [m.detach().clone().double() for m in optimizer._masters.values()]
        one_gradient(model, 1.0 + step)
        metrics = optimizer.step()
        change = torch.cat(
            [(m.double() - b).flatten() for m, b in zip(optimizer._masters.values(), before, strict=True)]
        )
        bound = config.lr * weight_decay * metrics["weight_norm"]
        assert metrics["update_norm"] - 2 * bound <= change.norm().item() * 1.001
        assert change.norm().item() <= metrics["update_norm"] * 1.001


@pytest.mark.parametrize(
    "size", [(), (3,), (4, 5), (2, 3, 4)], ids=["scalar", "vector", "matrix", "kernel"]
)  # fmt: skip
def test_pieces_of_an_update_make_the_whole(size, monkeypatch):
    norms = []
    for chunk in (1 << 24, 4):
        monkeypatch.setattr("balcaprl.training.optim._CHUNK", chunk)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(size))
        optimizer = PolicyOptimizer([("w", weight)], OptimConfig(lr=1e-2), 10)
        for _ in range(3):
            weight.grad = torch.randn(size)
            norms.append(optimizer.step()["update_norm"])
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-6)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = make_model()
    with torch.no_grad():
        model[1].bias[0] = math.nan
    with pytest.raises(ValueError, match=r"those of 1\.bias are not finite"):
        PolicyOptimizer(model.named_parameters(), OptimConfig(), 10)


def damaged_states(state):
    """(what was done to a state, the state) for each kind of damage."""

    def without(*keys):
        return {k: v for k, v in state.items() if k not in keys}

    def changed(key, value):
        return {**state, key: value}

    moments = [k for k in state if k.startswith("exp_avg")]
    yield "lacks num_updates", without("num_updates")
    yield "lacks start_weight_norm", without("start_weight_norm")
    yield "lacks exp_avg.0.weight", without(*moments)
    yield "lacks exp_avg_sq.1.bias", without("exp_avg_sq.1.bias")
    yield "lacks step.0.bias", without("step.0.bias")
    yield "lacks step.0.bias", without("step.0.bias", "exp_avg.0.bias", "exp_avg_sq.0.bias")
    yield "exp_avg.0.weight has shape", changed("exp_avg.0.weight", torch.zeros(3, 5))
    yield "exp_avg.0.weight is not finite", changed("exp_avg.0.weight", state["exp_avg.0.weight"] * math.nan)
    yield "another model", changed("exp_avg.elsewhere", torch.zeros(3))
    yield "another model", changed("something", torch.zeros(3))
    if "master.0.weight" in state:
        yield "lacks master.0.weight", without("master.0.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_state_is_refused_and_changes_nothing(dtype):
    model = make_model(dtype)
    optimizer = PolicyOptimizer(model.named_parameters(), OptimConfig(), 10)
    one_gradient(model)
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state().items()}
    for message, damaged in damaged_states(state):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state(damaged)
        assert all(torch.equal(value, optimizer.state()[key]) for key, value in state.items())
    optimizer.load_state(state)


def test_a_parameter_that_was_never_updated_is_part_of_the_state():
    model = make_model()
    optimizer = PolicyOptimizer(model.named_parameters(), OptimConfig(), 10)
    model[0](torch.ones(4, 5)).square().mean().backward()
    optimizer.step()
    state = optimizer.state()
    assert state["step.1.weight"] == 0
    again = PolicyOptimizer(make_model().named_parameters(), OptimConfig(), 10)
    again.load_state(state)
    assert again.state().keys() == state.keys()
    without = {k: v for k, v in state.items() if not k.startswith("step.1.") and k != "start_weight_norm"}
    with pytest.raises(ValueError, match="lacks"):
        again.load_state(without)
    again.load_state(without, complete=False)
