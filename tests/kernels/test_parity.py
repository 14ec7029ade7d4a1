"""Equal to the peers within float32 rounding, each by name: TRL 1.16, NVlabs' trainer of GDPO, Liger.

``bench/ops/peers.py`` calls their own code. Where a peer differs in a documented way, the test says by which settings, or
on which inputs, both compute the same. "Rounding" is measured, not assumed: ours may differ from the peer by what the
peer itself loses against float64 (which our reference computes), and by one part in 10^6 of the largest value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from balcaprl.kernels import grouped_advantages, linear_logprobs, linear_policy_loss, logits_policy_loss, policy_loss
from balcaprl.kernels.advantages.grouped_advantages import grouped_advantages_reference
from balcaprl.kernels.head.linear_logprobs import linear_logprobs_reference
from balcaprl.kernels.loss.policy_loss import policy_loss_reference
from balcaprl.kernels.support import native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from ops import peers

GROUP = 8
SEEDS = range(5)
PEER_LOSSES = {
    # TRL's and Liger's name: our reduction, and whether it needs the number of tokens that "max length" makes of it.
    "grpo": "sequence-mean",
    "dapo": "token-mean",
    "bnpo": "token-mean",  # differs from dapo in gradient accumulation only: dapo's denominator is the global batch's
    "dr_grpo": "constant",
}
CASES = {
    "on-policy": {},
    "off-policy": {"old_logprobs"},
    "divergence": {"old_logprobs", "reference_logprobs"},
    "truncated importance sampling": {"old_logprobs", "sampling_logprobs"},
}
CAP, KL_COEF, CLIP, TEMPERATURE = 1.5, 0.05, (0.2, 0.28), 0.9


@pytest.fixture
def trl() -> None:
    pytest.importorskip("trl", reason="TRL is a peer to compare with, in the extras trl and test")


@pytest.fixture
def liger() -> None:
    pytest.importorskip("liger_kernel", reason="Liger is a peer to compare with, in the extras trl and test")


def impls(op: Callable) -> list[str]:
    """The implementations of an op that run on this machine's CPU without an interpreter."""
    names = [i for i in sys.modules[op.__module__].IMPLS if i != "triton"]
    return [i for i in names if i != "native" or native.is_available()]


def assert_within_rounding(ours: Tensor, peer: Tensor, exact: Tensor, name: str = "") -> None:
    """``ours`` is where the peer is, up to the peer's own distance from the exact values and one float32 rounding."""
    ours, peer = ours.detach().double(), peer.detach().double()
    allowed = float((peer - exact).abs().max()) + 1e-6 * float(exact.abs().max())
    assert (ours - exact).abs().max() <= allowed, f"{name}: further from float64 than the peer"
    assert (ours - peer).abs().max() <= 2 * allowed, f"{name}: not where the peer is"
    # The peer's own error must be a rounding too, or the test would say nothing.
    assert allowed <= 1e-4 * max(float(exact.abs().max()), 1e-3), f"{name}: the peer computes something else"


# Advantages.


def rewards_batch(seed: int, num_groups: int = 16) -> Tensor:
    """(R, 3) float32 in [0, 1], as judges give them."""
    return torch.rand(num_groups * GROUP, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("impl", impls(grouped_advantages))
@pytest.mark.parametrize("missing", [0.0, 0.15])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
@pytest.mark.parametrize(("aggregation", "method"), [("normalize_then_sum", "gdpo"), ("sum_then_normalize", "grpo")])
@pytest.mark.parametrize("seed", SEEDS)
def test_trl_advantages(seed: int, aggregation: str, method: str, weights, missing: float, impl: str) -> None:
    """TRL 1.16: eps 1e-4 and ddof 1 at both steps, as ours, a missing score NaN on both sides.

    TRL's batch step takes the batch mean away as well; that is 0 up to rounding, since each normalised reward sums to
    0 over its group. Its groups of equal rewards are left out: there TRL divides rounding noise by eps, ours is exactly 0.
    """
    rewards = rewards_batch(seed)
    rewards[torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed + 100)) < missing] = torch.nan
    rewards[: GROUP // 2] = torch.nan  # rollouts without any score
    as_tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    exact = grouped_advantages_reference(rewards.double(), GROUP, weights=as_tensor, method=method)
    peer = peers.trl_grouped_advantages(rewards, GROUP, weights, aggregation)
    assert_within_rounding(grouped_advantages(rewards, GROUP, weights=weights, method=method, impl=impl), peer, exact)
    # Its ddof correction, a ratio of integers, is float32 whatever the rewards are: 6e-8.
    in_double = peers.trl_grouped_advantages(rewards.double(), GROUP, weights, aggregation)
    torch.testing.assert_close(in_double, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("impl", impls(grouped_advantages))
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25]])
@pytest.mark.parametrize("seed", SEEDS)
def test_nvlabs_advantages(seed: int, weights, impl: str) -> None:
    """NVlabs' fork of TRL: as ``gdpo`` where every score is there. It counts a missing score as 0: so do we if told so."""
    rewards = rewards_batch(seed)
    rewards[::7, 1] = torch.nan
    filled = rewards.nan_to_num()
    as_tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    exact = grouped_advantages_reference(filled.double(), GROUP, weights=as_tensor, method="gdpo")
    peer = peers.nvlabs_grouped_advantages(rewards, GROUP, weights)
    assert_within_rounding(grouped_advantages(filled, GROUP, weights=weights, method="gdpo", impl=impl), peer, exact)
    in_double = peers.nvlabs_grouped_advantages(rewards.double(), GROUP, weights)
    torch.testing.assert_close(in_double, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("trl")
def test_trl_and_nvlabs_agree_where_every_score_is_there() -> None:
    rewards = rewards_batch(0).double()
    trl_advantages = peers.trl_grouped_advantages(rewards, GROUP)
    torch.testing.assert_close(trl_advantages, peers.nvlabs_grouped_advantages(rewards, GROUP), rtol=1e-7, atol=1e-7)


# Losses.


def ragged_batch(seed: int, case: str) -> dict[str, Tensor]:
    """Per-token values float32, (T,), of 7 completions of 1 to 12 tokens; ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (7,), generator=generator)
    num_tokens = int(lengths.sum())
    batch = {
        "logprobs": -3.0 * torch.rand(num_tokens, generator=generator),
        "advantages": torch.randn(7, generator=generator),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
    }
    for name in sorted(CASES[case]):
        batch[name] = batch["logprobs"] + 0.3 * torch.randn(num_tokens, generator=generator)
    batch.setdefault("old_logprobs", None)
    return batch


def our_options(batch: dict[str, Tensor], loss_type: str) -> dict:
    options: dict = {"clip_low": CLIP[0], "clip_high": CLIP[1], "reduction": PEER_LOSSES[loss_type]}
    if "reference_logprobs" in batch:
        options |= {"kl_coef": KL_COEF, "reference_logprobs": batch["reference_logprobs"]}
    if "sampling_logprobs" in batch:
        options |= {"sampling_ratio_cap": CAP, "sampling_logprobs": batch["sampling_logprobs"]}
    return options


def peer_settings(batch: dict[str, Tensor], loss_type: str) -> peers.LossSettings:
    """The same settings in the peers' words; ``dr_grpo`` is told the longest completion as its maximum."""
    cu_seqlens = batch["cu_seqlens"]
    options: dict = {"loss_type": loss_type, "clip": CLIP, "max_length": int(cu_seqlens.diff().max())}
    if batch["old_logprobs"] is not None:
        options["old_logprobs"] = peers.pad_ragged(batch["old_logprobs"], cu_seqlens)
    if "reference_logprobs" in batch:
        options |= {
            "kl_coef": KL_COEF,
            "reference_logprobs": peers.pad_ragged(batch["reference_logprobs"], cu_seqlens),
        }
    if "sampling_logprobs" in batch:
        ratio = (batch["old_logprobs"] - batch["sampling_logprobs"]).exp().clamp(max=CAP)
        options["sampling_ratio"] = peers.pad_ragged(ratio, cu_seqlens)
    return peers.LossSettings(**options)


def in_float64(batch: dict) -> dict:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("impl", impls(policy_loss))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss_type", PEER_LOSSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_trl_losses(seed: int, loss_type: str, case: str, impl: str) -> None:
    """TRL's ``_compute_loss`` in one process without accumulation, where its denominators are this batch's, as ours."""
    batch = ragged_batch(seed, case)
    cu_seqlens = batch["cu_seqlens"]
    results = {}
    for name, data in (("ours", batch), ("peer", batch), ("exact", in_float64(batch))):
        logprobs = data["logprobs"].clone().requires_grad_()
        if name == "peer":
            padded = peers.pad_ragged(logprobs, cu_seqlens)
            mask = peers.completion_mask(cu_seqlens)
            loss = peers.trl_policy_loss(padded, mask, data["advantages"], peer_settings(data, loss_type))
        else:
            function = policy_loss_reference if name == "exact" else policy_loss
            options = our_options(data, loss_type) | ({} if name == "exact" else {"impl": impl})
            loss = function(logprobs, data["old_logprobs"], data["advantages"], cu_seqlens, **options).loss
        results[name] = (loss, *torch.autograd.grad(loss, logprobs))
    for index, quantity in enumerate(("loss", "gradient")):
        assert_within_rounding(*(results[name][index].detach() for name in ("ours", "peer", "exact")), quantity)


# Heads.


def head_batch(seed: int, case: str) -> dict[str, Tensor]:
    """``ragged_batch`` whose log-probabilities come from hidden (T, 24) and weight (301, 24)."""
    batch = ragged_batch(seed, case)
    generator = torch.Generator().manual_seed(seed + 50)
    num_tokens = batch.pop("logprobs").shape[0]
    batch["hidden"] = torch.randn(num_tokens, 24, generator=generator)
    batch["weight"] = 0.3 * torch.randn(301, 24, generator=generator)
    batch["targets"] = torch.randint(0, 301, (num_tokens,), generator=generator)
    with torch.no_grad():
        logprobs = linear_logprobs_reference(
            batch["hidden"], batch["weight"], batch["targets"], temperature=TEMPERATURE
        )[0]
    for name in sorted(CASES[case]):
        batch[name] = logprobs + 0.3 * torch.randn(num_tokens, generator=generator)
    return batch


def two_ops(impl: str) -> Callable:
    """linear_logprobs, then policy_loss."""

    def loss(hidden, weight, targets, old_logprobs, advantages, cu_seqlens, *, temperature, **options):
        logprobs = linear_logprobs(hidden, weight, targets, temperature=temperature, impl=impl).logprobs
        return policy_loss(logprobs, old_logprobs, advantages, cu_seqlens, **options)

    return loss


def exact_head_loss(hidden, weight, targets, old_logprobs, advantages, cu_seqlens, *, temperature, **options):
    logprobs = linear_logprobs_reference(hidden, weight, targets, temperature=temperature).logprobs
    return policy_loss_reference(logprobs, old_logprobs, advantages, cu_seqlens, **options)


def head_losses() -> list:
    """Every way of ours from hidden states to a loss."""
    ways = [pytest.param(two_ops(impl), id=f"linear_logprobs-{impl}") for impl in impls(linear_logprobs)]
    for impl in impls(linear_policy_loss):
        ways.append(pytest.param(partial(linear_policy_loss, impl=impl), id=f"linear_policy_loss-{impl}"))
    return ways


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("ours", head_losses())
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss_type", PEER_LOSSES)
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_liger_loss_and_gradients(seed: int, loss_type: str, case: str, ours: Callable) -> None:
    """Liger's fused linear GRPO loss: its denominators are the batch's, its per-token terms are TRL's."""
    batch = head_batch(seed, case)
    cu_seqlens = batch["cu_seqlens"]
    results = {}
    for name, data in (("ours", batch), ("peer", batch), ("exact", in_float64(batch))):
        hidden, weight = (data[k].clone().requires_grad_() for k in ("hidden", "weight"))
        if name == "peer":
            loss = peers.liger_linear_policy_loss(
                peers.pad_ragged(hidden, cu_seqlens),
                weight,
                peers.pad_ragged(data["targets"], cu_seqlens),
                peers.completion_mask(cu_seqlens),
                data["advantages"],
                peer_settings(data, loss_type),
                temperature=TEMPERATURE,
            )
        else:
            arguments = (hidden, weight, data["targets"], data["old_logprobs"], data["advantages"], cu_seqlens)
            function = exact_head_loss if name == "exact" else ours
            loss = function(*arguments, temperature=TEMPERATURE, **our_options(data, loss_type)).loss
        results[name] = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for index, quantity in enumerate(("loss", "hidden", "weight")):
        assert_within_rounding(*(results[name][index].detach() for name in ("ours", "peer", "exact")), quantity)


def exact_logits_loss(logits, targets, *rest, temperature, **options):
    logprobs = (logits / temperature).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return policy_loss_reference(logprobs, *rest, **options)


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("impl", impls(logits_policy_loss))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss_type", PEER_LOSSES)
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_trl_losses_from_logits(seed: int, loss_type: str, case: str, impl: str) -> None:
    """TRL's log-probabilities of logits, divided by the temperature beforehand, and its ``_compute_loss``."""
    batch = head_batch(seed, case)
    batch["logits"] = batch.pop("hidden") @ batch.pop("weight").T
    cu_seqlens, results = batch["cu_seqlens"], {}
    for name, data in (("ours", batch), ("peer", batch), ("exact", in_float64(batch))):
        logits = data["logits"].clone().requires_grad_()
        if name == "peer":
            padded = peers.pad_ragged(peers.trl_logprobs_of_logits(logits / TEMPERATURE, data["targets"]), cu_seqlens)
            mask = peers.completion_mask(cu_seqlens)
            loss = peers.trl_policy_loss(padded, mask, data["advantages"], peer_settings(data, loss_type))
        else:
            function = exact_logits_loss if name == "exact" else partial(logits_policy_loss, impl=impl)
            arguments = (logits, data["targets"], data["old_logprobs"], data["advantages"], cu_seqlens)
            loss = function(*arguments, temperature=TEMPERATURE, **our_options(data, loss_type)).loss
        results[name] = (loss, *torch.autograd.grad(loss, logits))
    for index, quantity in enumerate(("loss", "gradient")):
        assert_within_rounding(*(results[name][index].detach() for name in ("ours", "peer", "exact")), quantity)


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("impl", impls(linear_logprobs))
@pytest.mark.parametrize("seed", SEEDS)
def test_trl_head(seed: int, impl: str) -> None:
    """TRL's chunked head: log-probabilities, entropy and gradients. Its entropy can carry a gradient, ours is detached."""
    batch = head_batch(seed, "on-policy")
    upstream = torch.randn(batch["hidden"].shape[0], generator=torch.Generator().manual_seed(seed))
    results = {}
    for name, data in (("ours", batch), ("peer", batch), ("exact", in_float64(batch))):
        hidden, weight = (data[k].clone().requires_grad_() for k in ("hidden", "weight"))
        if name == "peer":
            outputs = peers.trl_logprobs(hidden, weight, data["targets"], TEMPERATURE)
        elif name == "ours":
            outputs = linear_logprobs(hidden, weight, data["targets"], temperature=TEMPERATURE, impl=impl)
        else:
            outputs = linear_logprobs_reference(hidden, weight, data["targets"], temperature=TEMPERATURE)
        logprobs, entropy = outputs
        total = (logprobs * upstream.to(logprobs)).sum()
        results[name] = (logprobs, entropy, *torch.autograd.grad(total, (hidden, weight)))
    for index, quantity in enumerate(("logprobs", "entropy", "hidden", "weight")):
        assert_within_rounding(*(results[name][index].detach() for name in ("ours", "peer", "exact")), quantity)
