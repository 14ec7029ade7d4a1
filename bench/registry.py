"""What is measured: ops x providers x shapes. A new op adds one entry to ``OPS``.

A provider is a function of the op's inputs. All providers of an op get the same tensors; one of them is the plain
formulation that a trainer would otherwise write (``eager``), and the cases that a provider of ours loses stay in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from balcaprl.kernels import grouped_advantages, policy_loss
from balcaprl.kernels.grouped_advantages import grouped_advantages_reference
from balcaprl.kernels.policy_loss import policy_loss_reference

Sizes = dict[str, int]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """One op, everything that competes on it, and the least that any of them can do."""

    name: str
    shapes: tuple[Sizes, ...]
    make_inputs: Callable[[Sizes, torch.Generator], Inputs]
    """On the CPU, in float32; the runner moves them."""
    providers: dict[str, Callable[[Inputs, Sizes], Tensor]]
    exact: Callable[[Inputs, Sizes], Tensor]
    """The float64 reference on float64 inputs: what every provider is held to before it is timed."""
    floor_bytes: Callable[[Sizes], int]
    """Bytes that a forward must read and write at least, each once."""
    differentiable: tuple[str, ...] = ()
    """Inputs with a gradient; empty where there is no backward."""
    tolerance: float = 1e-4
    """Largest error against ``exact``, relative to its largest value."""


def _rewards(sizes: Sizes, generator: torch.Generator) -> Inputs:
    shape = (sizes["rollouts"], sizes["rewards"])
    return {"rewards": torch.rand(shape, generator=generator)}


def _advantages_eager(inputs: Inputs, sizes: Sizes) -> Tensor:
    """Group statistics with nanmean, as trainers write them: no mask, no batch step, no care for tiny spreads."""
    groups = inputs["rewards"].view(-1, sizes["group"], sizes["rewards"])
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    count = (~centred.isnan()).sum(dim=1, keepdim=True)
    std = (centred.square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (centred / (std + 1e-4)).nan_to_num(0.0).sum(dim=-1).flatten()


GROUPED_ADVANTAGES = Op(
    name="grouped_advantages",
    shapes=(
        {"rollouts": 64, "group": 8, "rewards": 3},
        {"rollouts": 4096, "group": 8, "rewards": 3},
        {"rollouts": 4096, "group": 64, "rewards": 3},
        {"rollouts": 262_144, "group": 16, "rewards": 3},
    ),
    make_inputs=_rewards,
    providers={
        "native": lambda i, s: grouped_advantages(i["rewards"], s["group"], impl="native"),
        "reference": lambda i, s: grouped_advantages(i["rewards"], s["group"], impl="reference"),
        "eager": _advantages_eager,
    },
    exact=lambda i, s: grouped_advantages_reference(i["rewards"], s["group"]),
    # Rewards in, advantages out, float32.
    floor_bytes=lambda s: 4 * s["rollouts"] * (s["rewards"] + 1),
)


def _ragged(sizes: Sizes, generator: torch.Generator) -> Inputs:
    num_rollouts, mean = sizes["rollouts"], sizes["mean_length"]
    lengths = torch.randint(1, 2 * mean, (num_rollouts,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    logprobs = -3.0 * torch.rand(int(cu_seqlens[-1]), generator=generator)
    old = logprobs + 0.2 * torch.randn(logprobs.shape, generator=generator)
    advantages = torch.randn(num_rollouts, generator=generator)
    return {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages, "cu_seqlens": cu_seqlens}


POLICY_LOSS = Op(
    name="policy_loss",
    shapes=({"rollouts": 64, "mean_length": 48}, {"rollouts": 512, "mean_length": 256}),
    make_inputs=_ragged,
    providers={
        "auto": lambda i, s: policy_loss(**i).loss,
        "eager": lambda i, s: policy_loss_reference(**i).loss,  # autograd through every step
    },
    exact=lambda i, s: policy_loss_reference(**i).loss,
    # Two log-probabilities in, one gradient out per token, float32.
    floor_bytes=lambda s: 4 * 3 * s["rollouts"] * s["mean_length"],
    differentiable=("logprobs",),
)

OPS = {op.name: op for op in (GROUPED_ADVANTAGES, POLICY_LOSS)}


def inputs_for(op: Op, sizes: Sizes, device: torch.device) -> Inputs:
    """The op's inputs for one shape, the same at every call."""
    made = op.make_inputs(sizes, torch.Generator().manual_seed(0))
    moved = {name: tensor.to(device) for name, tensor in made.items()}
    for name in op.differentiable:
        moved[name].requires_grad_()
    return moved


def check_provider(op: Op, provider: str, sizes: Sizes, device: torch.device) -> None:
    """Refuses to time what is wrong.

    Raises:
        AssertionError: the provider's output misses the float64 reference by more than the op's tolerance.
    """
    inputs = inputs_for(op, sizes, device)
    doubles = {name: t.detach().double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = op.exact(doubles, sizes)
    error = float((op.providers[provider](inputs, sizes).detach().double() - exact).abs().max())
    allowed = op.tolerance * max(float(exact.abs().max()), 1e-30)
    assert error <= allowed, f"{op.name}, {provider}, {sizes}: error {error:.2e} exceeds {allowed:.2e}; not timed"
