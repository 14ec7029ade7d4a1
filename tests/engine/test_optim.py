"""The optimiser: its schedule, its masters, its refusal of bad gradients, its exact state."""

import itertools
import math

import pytest
import torch

from balcaprl.config import OptimConfig
from balcaprl.optim import PolicyOptimizer, learning_rate


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
    rates = [learning_rate(config, step, 100) for step in range(101)]
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
