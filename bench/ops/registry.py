"""The registry of what is measured: ops x cases x providers (``providers.py``). A new op adds one entry to ``OPS``.

Cases in which a peer beats our code are kept. Two things are ceilings and not peers: ``gemms``, the bare matrix
products of the language-model head (one in the forward, two more for the gradients), and, for ops that only stream
memory, the bandwidth of a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balcaprl import kernels
from balcaprl.kernels.advantages.grouped_advantages import grouped_advantages_reference
from balcaprl.kernels.head.linear_logprobs import linear_logprobs_reference
from balcaprl.kernels.loss.policy_loss import policy_loss_reference
from ops import inputs, peers
from ops.inputs import Case, Inputs
from ops.providers import Op, Provider, implementations, padded, plain, plain_loss, trl_loss

LOSS = ("old_logprobs", "advantages", "cu_seqlens")
FILTER_EPS = 2.0**-12


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
        **implementations(
            "grouped_advantages",
            lambda made, case, impl: kernels.grouped_advantages(
                made["rewards"], case.sizes["size"], method="gdpo", impl=impl
            ),
        ),
        **plain(_advantages_eager),
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
        **implementations(
            "policy_loss",
            lambda made, case, impl: kernels.policy_loss(made["logprobs"], *(made[k] for k in LOSS), impl=impl).loss,
        ),
        **plain(lambda made, case: plain_loss(made["logprobs"], made)),
        "trl": Provider(lambda made, case: trl_loss(made["logprobs"], made), needs="trl"),
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
    """Computes the three matrix products. Logits go into a buffer that is reused, and gradients into new tensors, as
    with every provider."""
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
        **implementations(
            "linear_logprobs",
            lambda made, case, impl: (
                kernels.linear_logprobs(made["hidden"], made["weight"], made["targets"], impl=impl).logprobs
            ),
        ),
        "gemms": _GEMMS,
        **plain(_eager_logprobs_and_entropy),
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
    hidden, targets, old = padded(made, ("hidden", "targets", "old_logprobs"))
    return peers.liger_linear_policy_loss(
        hidden,
        made["weight"],
        targets,
        torch.ones_like(old),
        made["advantages"],
        peers.LossSettings("dapo", old),
        chunk_size=hidden.shape[0] if whole else 1,
        compiled=hidden.is_cuda,  # Liger compiles by default; on a CPU its uncompiled code is measured
    )


def _head_loss_trl(made: Inputs, case: Case) -> Tensor:
    logprobs, _ = peers.trl_logprobs(made["hidden"], made["weight"], made["targets"], outputs=())
    return trl_loss(logprobs, made)


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
        **implementations("linear_policy_loss", _head_loss_ours),
        "native-every-token": Provider(_head_loss_every_token, devices=("cpu",), every_token=True),
        "gemms": _GEMMS,
        **plain(lambda made, case: plain_loss(_eager_logprobs(made), made)),
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
    return trl_loss(peers.trl_logprobs_of_logits(made["logits"], made["targets"]), made)


def _eager_logits_loss(made: Inputs, case: Case) -> Tensor:
    logprobs = made["logits"].float().log_softmax(dim=-1).gather(1, made["targets"][:, None])[:, 0]
    return plain_loss(logprobs, made)


def _logits_liger(made: Inputs, case: Case) -> Tensor:
    """Liger's loss. Liger requires one more position per completion than it scores, so it gets its own padded logits,
    made at the first call."""
    targets, old = padded(made, ("targets", "old_logprobs"))
    if "_longer" not in made:
        logits = made["logits"].detach().unflatten(0, (targets.shape[0], -1))
        made["_longer"] = torch.nn.functional.pad(logits, (0, 0, 0, 1)).requires_grad_()
    return peers.liger_logits_policy_loss(
        made["_longer"], targets, torch.ones_like(old), made["advantages"], peers.LossSettings("dapo", old)
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
        **implementations("logits_policy_loss", _logits_ours),
        **plain(_eager_logits_loss),
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
