"""The optimiser on the fused kernels, which a GPU takes: the same updates, guards and state as on PyTorch's AdamW.

The kernels are interpreted, so that the optimiser has to be told to take them.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator

import pytest
import torch
from tile_sizes import overridden
from torch.utils._python_dispatch import TorchDispatchMode

from balcaprl.config import OptimConfig
from balcaprl.training.optim import PolicyOptimizer
from balcaprl.types import DivergedError

CONFIG = OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5)
interpreted = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ("squares", "direction", "apply"):
            stack.enter_context(overridden(f"_adamw_{name}_kernel", BLOCK=32))
        stack.enter_context(overridden("_adamw_norms_kernel", BLOCK_C=16))
        yield


def make(dtype: torch.dtype = torch.float32, *, fused: bool = True, config: OptimConfig = CONFIG):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)).to(dtype)
    optimizer = PolicyOptimizer(model.named_parameters(), config, 20)
    optimizer._fused = fused
    return model, optimizer


def backward(model, number: int, scale: float = 1.0) -> None:
    """A gradient, of the first layer alone in every third step."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number)).to(next(model.parameters()).dtype)
    out = model[0](x) if number % 3 == 0 else model(x)
    (scale * out.float().square().mean()).backward()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_updates_are_those_of_the_default(dtype: torch.dtype) -> None:
    made = [make(dtype, fused=fused) for fused in (True, False)]
    for number in range(5):
        backward(made[0][0], number)
        for ours, plain in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
            plain.grad = None if ours.grad is None else ours.grad.clone()
        metrics = [optimizer.step() for _, optimizer in made]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
        assert not metrics[0]["num_refused_updates"]
        assert all(p.grad is None for p in made[0][0].parameters())
    states = [optimizer.state() for _, optimizer in made]
    assert states[0].keys() == states[1].keys()
    assert made[0][1]._fused
    for key, value in states[1].items():
        assert states[0][key].dtype == value.dtype
        torch.testing.assert_close(states[0][key], value, rtol=1e-5, atol=1e-7)
    assert float(states[0]["step.0.weight"]) == 5
    assert float(states[0]["step.1.weight"]) == 3
    for name, parameter in made[0][0].named_parameters():
        assert torch.equal(parameter, states[0].get(f"master.{name}", parameter).to(dtype))


@interpreted
@pytest.mark.parametrize("fused", [(True, False), (False, True), (True, True)])
def test_a_state_moves_between_the_two_ways(fused: tuple[bool, bool]) -> None:
    model, optimizer = make(torch.bfloat16, fused=fused[0])
    for number in range(4):
        backward(model, number)
        optimizer.step()
    again, resumed = make(torch.bfloat16, fused=fused[1])
    again.load_state_dict(model.state_dict())
    resumed.load_state({k: v.clone() for k, v in optimizer.state().items()})
    for each, which in ((model, optimizer), (again, resumed)):
        backward(each, 4)
        which.step()
    for key, value in optimizer.state().items():
        torch.testing.assert_close(resumed.state()[key], value, rtol=1e-5, atol=1e-7)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("harm", ["lr", "gradient", "exp_avg", "exp_avg_sq", "weights"])
def test_an_update_that_is_refused_changes_nothing(dtype: torch.dtype, harm: str) -> None:
    model, optimizer = make(dtype, config=CONFIG.model_copy(update={"max_refused_updates": 2}))
    backward(model, 1)
    optimizer.step()
    if harm == "lr":
        optimizer.config = optimizer.config.model_copy(update={"lr": 1e4})
    backward(model, 1, math.nan if harm == "gradient" else 1.0)
    master = optimizer._masters["0.weight"]
    if harm.startswith("exp"):
        optimizer._adamw.state[master][harm].view(-1)[3] = math.nan
    if harm == "weights":
        master.data.view(-1)[3] = math.inf
    before = {k: v.clone() for k, v in (model.state_dict() | optimizer.state()).items() if k != "num_updates"}
    metrics = optimizer.step()
    assert (metrics["num_refused_updates"], metrics["num_nonfinite_updates"]) == (1, harm == "gradient")
    after = model.state_dict() | optimizer.state()
    assert before.keys() == after.keys() - {"num_updates"}
    for key, value in before.items():
        assert torch.equal(value.nan_to_num(7.0), after[key].nan_to_num(7.0)), key
    backward(model, 1, math.nan if harm == "gradient" else 1.0)
    with pytest.raises(DivergedError, match="2 updates in a row were refused"):
        optimizer.step()


@interpreted
def test_a_first_update_that_is_refused_leaves_no_moments() -> None:
    model, optimizer = make()
    backward(model, 1, math.nan)
    assert optimizer.step()["num_refused_updates"] == 1
    assert not any(key.startswith("exp_avg") for key in optimizer.state())
    assert not optimizer._adamw.state


def test_a_kernel_that_fails_is_told_once_and_costs_no_update(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("balcaprl.training.optim.adamw_update", fail)
    made = [make(torch.bfloat16, fused=fused) for fused in (True, False)]
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            for model, optimizer in made:
                backward(model, number)
                optimizer.step()
    assert [r.getMessage() for r in caplog.records] == [
        "the fused optimiser cannot be used here, PyTorch's AdamW is (optim.fused): RuntimeError: no kernel image is "
        "available"
    ]
    for key, value in made[1][1].state().items():
        assert torch.equal(made[0][1].state()[key], value)


def test_the_kernels_are_taken_where_they_run_and_agree(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(config: OptimConfig = CONFIG) -> bool:
        model = torch.nn.Linear(2, 2)
        return PolicyOptimizer(model.named_parameters(), config, 1)._fused

    def disagree(*_):
        raise RuntimeError("triton differs from the reference by up to 1 on cpu")

    assert not chosen()  # on a CPU
    monkeypatch.setattr("balcaprl.training.optim.resolve_impl", lambda impl, tensors: "triton")
    monkeypatch.setattr("balcaprl.training.optim.check_agreement", lambda *_: None)
    assert chosen()
    assert not chosen(CONFIG.model_copy(update={"fused": False}))
    monkeypatch.setattr("balcaprl.training.optim.check_agreement", disagree)
    with caplog.at_level(logging.WARNING):
        assert not chosen()
    assert "differs from the reference" in caplog.text


class Operations(TorchDispatchMode):
    """Counts dispatched operations that are no views."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += not function.is_view
        return function(*arguments, **(options or {}))


@interpreted
def test_a_step_dispatches_at_most_thirty_operations_however_many_parameters_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from balcaprl.kernels.adamw import triton as fused

    operations = Operations()

    class Stub:
        def __getitem__(self, grid: tuple[int, ...]):
            def launched(*_, **__) -> None:
                operations.count += 1

            return launched

    for name in ("squares", "norms", "direction", "apply"):
        monkeypatch.setattr(fused, f"_adamw_{name}_kernel", Stub())
    monkeypatch.setattr(PolicyOptimizer, "_objection", lambda self, norms: None)
    weights = {str(i): torch.nn.Parameter(torch.ones(3 + i, dtype=torch.bfloat16)) for i in range(100)}
    optimizer = PolicyOptimizer(weights.items(), CONFIG, 10)
    optimizer._fused = True
    for _ in range(2):  # the first one makes moments
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        operations.count = 0
        with operations:
            optimizer.step()
    assert optimizer._fused
    assert 5 < operations.count <= 30
