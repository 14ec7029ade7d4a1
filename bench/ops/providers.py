"""What an entry of the registry is made of: ops, their providers, and what several ops are compared with.

A provider computes the op from the same tensors as all others. The providers are each of our implementations, the plain
formulation that a trainer would write (``eager``), the same under ``torch.compile`` (``compile``), and the peers' own
code (``peers.py``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from balcaprl import kernels
from balcaprl.kernels.support import native
from ops import peers
from ops.inputs import Case, Inputs


@dataclass(frozen=True)
class Provider:
    """One way to compute an op."""

    run: Callable[[Inputs, Case], Tensor]
    """Computes the differentiable output."""
    gradients: Callable[[Inputs, Case], tuple[Tensor, ...]] | None = None
    """Computes output and gradients in another way than autograd; None means autograd."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str | None = None
    """A package that the provider needs and that may be missing."""
    ours: bool = False
    ceiling: bool = False
    """Whether the provider does only the op's irreducible work and not the op, so that its result is not compared."""
    every_token: bool = False
    """Whether this is our code with a gradient for every token, in a case where some tokens have none. It is timed in
    the same rounds to show what leaving out those tokens saves. Its result differs from the op's, so it is not compared
    with the reference."""

    def unavailable(self, device: torch.device) -> str | None:
        """The reason why the provider cannot run on ``device``, or None if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.needs is not None and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


@dataclass(frozen=True)
class Op:
    """One op with its cases, its providers, and the least work that any of them can do."""

    name: str
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.Generator], Inputs]
    """Makes a case's inputs on torch's default device, which is also the generator's."""
    providers: Mapping[str, Provider]
    exact: Callable[[Inputs, Case], Tensor]
    """Computes the reference, usually from float64 inputs; every provider is compared with it before it is timed."""
    differentiable: tuple[str, ...] = ()
    """Names of the inputs that get a gradient; empty if the op has no backward."""
    floor_bytes: Callable[[Case], tuple[int, int]] = lambda case: (0, 0)
    """The fewest bytes that a forward, and a forward with gradients, must read and write, each value once."""
    floor_flops: Callable[[Case], tuple[int, int]] = lambda case: (0, 0)
    """The fewest multiplications and additions of a forward, and of a forward with gradients, if matrix products bound
    them."""
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
    )
    """Largest allowed error against ``exact`` by dtype: of outputs, relative to the largest value; of gradients, in the
    2-norm."""


def implementations(op: str, run: Callable[[Inputs, Case, str], Tensor]) -> dict[str, Provider]:
    """Providers of our implementations of an op. ``native`` runs on the CPU, ``triton`` on CUDA."""
    function = getattr(kernels, op)
    devices = {"native": ("cpu",), "triton": ("cuda",)}
    found = {}
    for impl in sys.modules[function.__module__].IMPLS:
        if impl == "native" and not native.is_available():
            continue
        provider = Provider(
            lambda made, case, impl=impl: run(made, case, impl),
            devices=devices.get(impl, ("cpu", "cuda")),
            needs="triton" if impl == "triton" else None,
            ours=True,
        )
        found[impl] = provider
    # The fastest implementations come first, so that they lead the tables.
    return {name: found[name] for name in ("native", "triton", "reference") if name in found}


def plain(eager: Callable[[Inputs, Case], Tensor]) -> dict[str, Provider]:
    """Providers of a plain formulation: as it is, and under ``torch.compile`` with dynamic shapes, as batches of
    varying length need them."""

    @functools.cache
    def compiled() -> Callable[[Inputs, Case], Tensor]:
        return torch.compile(eager, dynamic=True)

    return {"eager": Provider(eager), "compile": Provider(lambda made, case: compiled()(made, case))}


def padded(made: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    """Views of the named (T, ...) inputs as (R, L, ...); possible because all completions are equally long."""
    num_rollouts = made["advantages"].shape[0]
    return [made[name].unflatten(0, (num_rollouts, -1)) for name in names]


def trl_loss(logprobs: Tensor, made: Inputs) -> Tensor:
    """TRL's ``dapo`` loss of (T,) log-probabilities; it is the same as our default loss."""
    (old,) = padded(made, ("old_logprobs",))
    shaped = logprobs.view_as(old)
    mask = torch.ones_like(old)
    return peers.trl_policy_loss(shaped, mask, made["advantages"], peers.LossSettings("dapo", old))


def plain_loss(logprobs: Tensor, made: Inputs) -> Tensor:
    """The token-mean loss as a trainer's step would write it."""
    num_tokens = logprobs.shape[0]
    lengths = made["cu_seqlens"].diff()
    advantages = made["advantages"].repeat_interleave(lengths, output_size=num_tokens)
    ratio = (logprobs - made["old_logprobs"]).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
