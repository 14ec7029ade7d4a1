"""The registry of what is measured: ops x cases x providers. A new op adds one entry to ``OPS``.

A provider computes the op from the same tensors as all others. The providers are each of our implementations, the plain
formulation that a trainer would write (``eager``), the same under ``torch.compile`` (``compile``), and the peers' own
code (``peers.py``). Cases that ours lose are kept. Two things are ceilings and not peers: ``gemms``, the bare
matrix products of the language-model head (one in the forward, two more for the gradients), and, for ops that only
stream memory, the bandwidth of a copy.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import inputs
import peers
import torch
from inputs import Case, Inputs
from torch import Tensor

from balcaprl import kernels
from balcaprl.kernels.advantages.grouped_advantages import grouped_advantages_reference
from balcaprl.kernels.head.linear_logprobs import linear_logprobs_reference
from balcaprl.kernels.loss.policy_loss import policy_loss_reference
from balcaprl.kernels.support import native

LOSS = ("old_logprobs", "advantages", "cu_seqlens")
FILTER_EPS = 2.0**-12


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


def _impls(op: str, run: Callable[[Inputs, Case, str], Tensor]) -> dict[str, Provider]:
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


def _plain(eager: Callable[[Inputs, Case], Tensor]) -> dict[str, Provider]:
    """Providers of a plain formulation: as it is, and under ``torch.compile`` with dynamic shapes, as batches of
    varying length need them."""

    @functools.cache
    def compiled() -> Callable[[Inputs, Case], Tensor]:
        return torch.compile(eager, dynamic=True)

    return {"eager": Provider(eager), "compile": Provider(lambda made, case: compiled()(made, case))}


def _padded(made: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    """Views of the named (T, ...) inputs as (R, L, ...); possible because all completions are equally long."""
    num_rollouts = made["advantages"].shape[0]
    return [made[name].unflatten(0, (num_rollouts, -1)) for name in names]


def _trl_loss(logprobs: Tensor, made: Inputs) -> Tensor:
    """TRL's ``dapo`` loss of (T,) log-probabilities; it is the same as our default loss."""
    (old,) = _padded(made, ("old_logprobs",))
    shaped = logprobs.view_as(old)
    mask = torch.ones_like(old)
    return peers.trl_policy_loss(shaped, mask, made["advantages"], loss_type="dapo", old_logprobs=old)


def _plain_loss(logprobs: Tensor, made: Inputs) -> Tensor:
    """The token-mean loss as a trainer's step would write it."""
    num_tokens = logprobs.shape[0]
    lengths = made["cu_seqlens"].diff()
    advantages = made["advantages"].repeat_interleave(lengths, output_size=num_tokens)
    ratio = (logprobs - made["old_logprobs"]).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


# grouped_advantages. All providers use the method ``gdpo``, which is also TRL's.


def _advantages_eager(made: Inputs, case: Case) -> Tensor:
    """Advantages as trainers write them: statistics leave out missing scores, and there is no length mask and no care
    for tiny spreads."""
    groups = made["rewards"].view(-1, case.sizes["size"], case.sizes["rewards"])
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    count = (~centred.isnan()).sum(dim=1, keepdim=True)
    std = (centred.square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    total = (centred / (std + 1e-4)).nan_to_num(0.0).sum(dim=-1).flatten()
    return (total - total.mean()) / (total.std() + 1e-4)


GROUPED_ADVANTAGES = Op(
    name="grouped_advantages",
    cases=(
        Case({"groups": 8, "size": 8, "rewards": 3}, what="a step of the demo", small=True),
        Case({"groups": 512, "size": 8, "rewards": 3}, what="a large step", small=True),
        Case({"groups": 512, "size": 64, "rewards": 3}),
        Case({"groups": 16_384, "size": 16, "rewards": 3}),
    ),
    make_inputs=inputs.rewards,
    providers={
        **_impls(
            "grouped_advantages",
            lambda made, case, impl: kernels.grouped_advantages(
                made["rewards"], case.sizes["size"], method="gdpo", impl=impl
            ),
        ),
        **_plain(_advantages_eager),
        "trl": Provider(
            lambda made, case: peers.trl_grouped_advantages(made["rewards"], case.sizes["size"]), needs="trl"
        ),
        "nvlabs": Provider(lambda made, case: peers.nvlabs_grouped_advantages(made["rewards"], case.sizes["size"])),
    },
    exact=lambda made, case: grouped_advantages_reference(made["rewards"], case.sizes["size"], method="gdpo"),
    # Reads the rewards and writes the advantages, in float32.
    floor_bytes=lambda case: (4 * case.sizes["groups"] * case.sizes["size"] * (case.sizes["rewards"] + 1), 0),
)

# policy_loss


def _loss_bytes(case: Case) -> tuple[int, int]:
    """Bytes for float32 values: per token two log-probabilities read, and with gradients also one value written."""
    num_tokens = case.sizes["rollouts"] * case.sizes["length"]
    return 8 * num_tokens, 12 * num_tokens


POLICY_LOSS = Op(
    name="policy_loss",
    cases=(
        Case({"rollouts": 64, "length": 48}, what="a step of the demo", small=True),
        Case({"rollouts": 512, "length": 256}, what="a large step", small=True),
        Case({"rollouts": 4096, "length": 512}, what="2 million tokens"),
    ),
    make_inputs=inputs.logprobs,
    providers={
        **_impls(
            "policy_loss",
            lambda made, case, impl: kernels.policy_loss(made["logprobs"], *(made[k] for k in LOSS), impl=impl).loss,
        ),
        **_plain(lambda made, case: _plain_loss(made["logprobs"], made)),
        "trl": Provider(lambda made, case: _trl_loss(made["logprobs"], made), needs="trl"),
    },
    exact=lambda made, case: policy_loss_reference(made["logprobs"], *(made[k] for k in LOSS)).loss,
    floor_bytes=_loss_bytes,
    differentiable=("logprobs",),
)

# The language-model head: log-probabilities, and the fused loss.

_HEAD_SHAPES: tuple[tuple[dict[str, int], torch.dtype, str], ...] = (
    ({"tokens": 1024, "hidden": 256, "vocabulary": 8192}, torch.float32, "small head"),
    ({"tokens": 512, "hidden": 896, "vocabulary": 32_768}, torch.float32, "Qwen2-0.5B's width"),
    ({"tokens": 512, "hidden": 896, "vocabulary": 32_768}, torch.bfloat16, "Qwen2-0.5B's width"),
    ({"tokens": 128, "hidden": 4096, "vocabulary": 32_064}, torch.bfloat16, "LLaVA-1.5-7B"),
    ({"tokens": 128, "hidden": 2048, "vocabulary": 151_936}, torch.bfloat16, "Qwen2.5-VL-3B"),
    ({"tokens": 128, "hidden": 3584, "vocabulary": 152_064}, torch.bfloat16, "Qwen2.5-VL-7B"),
)
_GPU_SHAPES = tuple(
    ({**sizes, "tokens": 8192}, torch.bfloat16, what) for sizes, _, what in _HEAD_SHAPES if sizes["hidden"] > 1024
)


def _head_cases(**more: int) -> tuple[Case, ...]:
    """Cases of the head's shapes; ``more`` are sizes that the op has in addition to the head's."""
    cpu = [
        Case({**sizes, **more}, dtype, what, small=sizes["hidden"] <= 256, devices=("cpu",))
        for sizes, dtype, what in _HEAD_SHAPES
    ]
    gpu = [Case({**sizes, **more}, dtype, what, devices=("cuda",)) for sizes, dtype, what in _GPU_SHAPES]
    small = Case(
        {"tokens": 128, "hidden": 192, "vocabulary": 704, **more}, what="the demo's head", small=True, devices=("cpu",)
    )
    return small, *cpu, *gpu


def _head_flops(case: Case) -> tuple[int, int]:
    product = 2 * case.sizes["tokens"] * case.sizes["hidden"] * case.sizes["vocabulary"]
    return product, 3 * product


def _gemm_forward(made: Inputs, case: Case) -> Tensor:
    return torch.mm(made["hidden"], made["weight"].T, out=_logits_buffer(made))


def _gemm_gradients(made: Inputs, case: Case) -> tuple[Tensor, ...]:
    """The three matrix products. Logits go into a reused buffer, gradients into new tensors, as with every provider."""
    logits = _gemm_forward(made, case)
    return logits, logits @ made["weight"], logits.T @ made["hidden"]


def _logits_buffer(made: Inputs) -> Tensor:
    """A buffer (T, V) for logits, made at the first call and kept with the inputs."""
    if "_logits" not in made:
        made["_logits"] = made["hidden"].new_empty(made["hidden"].shape[0], made["weight"].shape[0])
    return made["_logits"]


_GEMMS = Provider(_gemm_forward, _gemm_gradients, ceiling=True)


def _eager_logprobs(made: Inputs) -> Tensor:
    """Log-probabilities from all logits, cast to float32 as trainers do."""
    logits = (made["hidden"] @ made["weight"].T).float()
    return logits.log_softmax(dim=-1).gather(1, made["targets"][:, None])[:, 0]


def _eager_logprobs_and_entropy(made: Inputs, case: Case) -> Tensor:
    log_softmax = (made["hidden"] @ made["weight"].T).float().log_softmax(dim=-1)
    with torch.no_grad():
        _entropy = -(log_softmax.exp() * log_softmax).sum(dim=-1)
    return log_softmax.gather(1, made["targets"][:, None])[:, 0]


LINEAR_LOGPROBS = Op(
    name="linear_logprobs",
    cases=_head_cases(),
    make_inputs=inputs.head,
    providers={
        **_impls(
            "linear_logprobs",
            lambda made, case, impl: (
                kernels.linear_logprobs(made["hidden"], made["weight"], made["targets"], impl=impl).logprobs
            ),
        ),
        "gemms": _GEMMS,
        **_plain(_eager_logprobs_and_entropy),
        "trl": Provider(
            lambda made, case: peers.trl_logprobs(made["hidden"], made["weight"], made["targets"])[0], needs="trl"
        ),
    },
    exact=lambda made, case: linear_logprobs_reference(made["hidden"], made["weight"], made["targets"]).logprobs,
    differentiable=("hidden", "weight"),
    floor_flops=_head_flops,
)


def _head_loss_ours(made: Inputs, case: Case, impl: str) -> Tensor:
    arguments = [made[k] for k in ("hidden", "weight", "targets", *LOSS)]
    return kernels.linear_policy_loss(*arguments, filter_eps=case.filter_eps, impl=impl).loss


def _head_loss_every_token(made: Inputs, case: Case) -> Tensor:
    if "_advantages" not in made:
        made["_advantages"] = made["advantages"].where(made["advantages"] != 0, 1.0)
    return _head_loss_ours({**made, "advantages": made["_advantages"]}, case, "native")


def _head_loss_liger(made: Inputs, case: Case, *, whole: bool) -> Tensor:
    hidden, targets, old = _padded(made, ("hidden", "targets", "old_logprobs"))
    return peers.liger_linear_policy_loss(
        hidden,
        made["weight"],
        targets,
        torch.ones_like(old),
        made["advantages"],
        loss_type="dapo",
        old_logprobs=old,
        chunk_size=hidden.shape[0] if whole else 1,
        compiled=hidden.is_cuda,  # Liger's default; the CPU figures are of its uncompiled code
    )


def _head_loss_trl(made: Inputs, case: Case) -> Tensor:
    logprobs, _ = peers.trl_logprobs(made["hidden"], made["weight"], made["targets"], outputs=())
    return _trl_loss(logprobs, made)


_MIDDLE = {"tokens": 512, "hidden": 896, "vocabulary": 32_768, "rollouts": 8}
_FLAT = {"hidden": 16, "vocabulary": 151_936, "rollouts": 8}
LINEAR_POLICY_LOSS = Op(
    name="linear_policy_loss",
    cases=(
        *_head_cases(rollouts=8),
        Case(_MIDDLE, what="exact, peaked", peaked=True),
        Case(_MIDDLE, what="filtered, peaked", peaked=True, filter_eps=FILTER_EPS),
        Case({"tokens": 1024, "hidden": 256, "vocabulary": 8192, "rollouts": 8}, peaked=True, filter_eps=FILTER_EPS),
        Case(_MIDDLE, what="half of the tokens without gradient", zero_fraction=0.5),
        Case({"tokens": 128, **_FLAT}, what="memory, few tokens", memory_only=True),
        Case({"tokens": 65_536, **_FLAT}, what="memory, many tokens", memory_only=True),
    ),
    make_inputs=inputs.head_loss,
    providers={
        **_impls("linear_policy_loss", _head_loss_ours),
        "native-every-token": Provider(_head_loss_every_token, devices=("cpu",), every_token=True),
        "gemms": _GEMMS,
        **_plain(lambda made, case: _plain_loss(_eager_logprobs(made), made)),
        "trl": Provider(_head_loss_trl, needs="trl"),
        # ``liger`` is Liger's default, one completion per chunk; ``liger-whole`` puts all completions into one chunk,
        # which is faster on a CPU.
        "liger": Provider(lambda made, case: _head_loss_liger(made, case, whole=False), needs="liger_kernel"),
        "liger-whole": Provider(lambda made, case: _head_loss_liger(made, case, whole=True), needs="liger_kernel"),
    },
    exact=lambda made, case: (
        policy_loss_reference(
            linear_logprobs_reference(made["hidden"], made["weight"], made["targets"]).logprobs,
            *(made[k] for k in LOSS),
        ).loss
    ),
    differentiable=("hidden", "weight"),
    floor_flops=_head_flops,
)

# logits_policy_loss


def _logits_ours(made: Inputs, case: Case, impl: str) -> Tensor:
    return kernels.logits_policy_loss(made["logits"], made["targets"], *(made[k] for k in LOSS), impl=impl).loss


def _logits_trl(made: Inputs, case: Case) -> Tensor:
    return _trl_loss(peers.trl_logprobs_of_logits(made["logits"], made["targets"]), made)


def _eager_logits_loss(made: Inputs, case: Case) -> Tensor:
    logprobs = made["logits"].float().log_softmax(dim=-1).gather(1, made["targets"][:, None])[:, 0]
    return _plain_loss(logprobs, made)


def _logits_liger(made: Inputs, case: Case) -> Tensor:
    """Liger's loss. Liger requires one more position per completion than it scores, so it gets its own padded logits,
    made at the first call."""
    targets, old = _padded(made, ("targets", "old_logprobs"))
    if "_longer" not in made:
        logits = made["logits"].detach().unflatten(0, (targets.shape[0], -1))
        made["_longer"] = torch.nn.functional.pad(logits, (0, 0, 0, 1)).requires_grad_()
    return peers.liger_logits_policy_loss(
        made["_longer"], targets, torch.ones_like(old), made["advantages"], loss_type="dapo", old_logprobs=old
    )


def _logits_liger_gradients(made: Inputs, case: Case) -> tuple[Tensor, ...]:
    loss = _logits_liger(made, case)
    (gradient,) = torch.autograd.grad(loss, made["_longer"])
    return loss, gradient[:, :-1]


def _logits_bytes(case: Case) -> tuple[int, int]:
    """Bytes of one read of the logits, and with gradients of another read and one write."""
    logits = case.sizes["tokens"] * case.sizes["vocabulary"] * case.dtype.itemsize
    return logits, 3 * logits


LOGITS_POLICY_LOSS = Op(
    name="logits_policy_loss",
    cases=(
        Case({"tokens": 128, "vocabulary": 704, "rollouts": 8}, what="the demo's head", small=True),
        Case({"tokens": 1024, "vocabulary": 8192, "rollouts": 8}, small=True),
        Case({"tokens": 512, "vocabulary": 32_064, "rollouts": 8}, torch.bfloat16, "LLaVA-1.5-7B"),
        Case({"tokens": 512, "vocabulary": 151_936, "rollouts": 8}, torch.bfloat16, "Qwen2.5-VL-3B"),
        Case({"tokens": 512, "vocabulary": 151_936, "rollouts": 8}, torch.float32, "Qwen2.5-VL-3B"),
        Case({"tokens": 8192, "vocabulary": 151_936, "rollouts": 8}, torch.bfloat16, "", devices=("cuda",)),
    ),
    make_inputs=inputs.logits_loss,
    providers={
        **_impls("logits_policy_loss", _logits_ours),
        **_plain(_eager_logits_loss),
        "trl": Provider(_logits_trl, needs="trl"),
        "liger": Provider(_logits_liger, _logits_liger_gradients, devices=("cuda",), needs="liger_kernel"),
    },
    exact=lambda made, case: (
        policy_loss_reference(
            made["logits"].log_softmax(dim=-1).gather(1, made["targets"][:, None])[:, 0], *(made[k] for k in LOSS)
        ).loss
    ),
    differentiable=("logits",),
    floor_bytes=_logits_bytes,
)

OPS: dict[str, Op] = {
    op.name: op for op in (GROUPED_ADVANTAGES, POLICY_LOSS, LINEAR_LOGPROBS, LINEAR_POLICY_LOSS, LOGITS_POLICY_LOSS)
}


def measure_inputs(op: Op, case: Case, device: torch.device) -> Inputs:
    """The op's inputs for one case, the same at every call; the differentiable ones require a gradient.

    They are made on ``device``, because making the logits of the largest cases takes minutes on a CPU.
    """
    with torch.device(device):
        moved = op.make_inputs(case, torch.Generator(device).manual_seed(0))
    for name in op.differentiable:
        moved[name].requires_grad_()
    return moved


def applicable(op: Op, case: Case) -> dict[str, Provider]:
    """The providers that take part in a case."""
    if case.memory_only:
        return {n: p for n, p in op.providers.items() if p.ours and n != "reference"}
    return {n: p for n, p in op.providers.items() if case.zero_fraction or not p.every_token}


def sizes_row(case: Case) -> dict[str, Any]:
    """The fields of a result row that describe a case."""
    return {
        "case": case.name,
        "what": case.what,
        "dtype": str(case.dtype).removeprefix("torch."),
        "peaked": case.peaked,
        "filter_eps": case.filter_eps,
        "zero_fraction": case.zero_fraction,
        **{f"size_{name}": size for name, size in case.sizes.items()},
    }
