"""The Triton kernel of ``grouped_advantages``, which is launched once, whatever the method. The tensor is tiny, so the
kernel's benefits are this single launch and its handling of the edge cases.

A program takes a tile of whole groups and computes in float64. For ``gdpo`` a single program takes all groups, twice:
the first pass computes the batch's standard deviation, the second computes the same advantages again and divides them
by it. This module is imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.support import triton_math
from balcaprl.kernels.support.launch import KernelSpec, Launch, Work, launch, on_device

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _normalised(values_NG, weight, EPS: tl.constexpr):
    """Weighted z-scores of each group: weight * z. The result is 0 where a value is NaN (missing), and for groups with
    fewer than two values or with equal values."""
    present = values_NG == values_NG
    count = tl.sum(tl.where(present, 1.0, 0.0).to(tl.float64), axis=1)[:, None]
    low = tl.min(tl.where(present, values_NG, _INFINITY), axis=1)[:, None]
    high = tl.max(tl.where(present, values_NG, -_INFINITY), axis=1)[:, None]
    varied = (count > 1.5) & (high > low)
    # Subtracting the smallest value makes equal values exactly 0 and keeps the digits of a tiny spread on a large
    # offset. Dividing by a power of two keeps squares from overflowing or vanishing.
    scale = triton_math.inverse_power(tl.where(varied, high - low, 1.0))
    scaled = tl.where(present & varied, (values_NG - low) * scale, 0.0)
    mean = tl.sum(scaled, axis=1)[:, None] / tl.maximum(count, 1.0)
    deviation = tl.where(present & varied, scaled - mean, 0.0)
    variance = tl.sum(deviation * deviation, axis=1)[:, None] / tl.maximum(count - 1.0, 1.0)
    unit = 1.0 / scale
    factor = weight * (unit / tl.where(varied, unit * tl.sqrt(variance) + EPS, 1.0))
    return tl.where(varied, deviation * factor, 0.0)


@triton.jit
def _tile_advantages(
    first_group,
    rewards_RK,
    weights_K,
    lengths_R,
    reference_lengths_R,
    num_groups,
    group_size,
    masked_reward,
    NUM_REWARDS: tl.constexpr,
    SUM_FIRST: tl.constexpr,
    LENGTH_LOW: tl.constexpr,
    LENGTH_HIGH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Advantages of a tile of groups, from ``first_group`` on.

    Returns, in this order: the rollouts' indices; whether each rollout exists; advantages before the batch step;
    whether each rollout has a score; the sum of the weights' absolute values; status bits of invalid values.
    """
    groups = first_group.to(tl.int64) + tl.arange(0, BLOCK_N)[:, None]
    members = tl.arange(0, BLOCK_G)[None, :]
    rollouts = groups * group_size + members
    here = (groups < num_groups) & (members < group_size)
    bad = tl.zeros((BLOCK_N, BLOCK_G), tl.int32)
    rejected = tl.zeros((BLOCK_N, BLOCK_G), tl.int32)
    if lengths_R is not None:
        lengths = tl.load(lengths_R + rollouts, mask=here, other=1).to(tl.float64)
        reference_lengths = tl.load(reference_lengths_R + rollouts, mask=here, other=1).to(tl.float64)
        bad |= tl.where((lengths >= 0.0) & (lengths < _INFINITY), 0, 4)
        bad |= tl.where((reference_lengths > 0.0) & (reference_lengths < _INFINITY), 0, 8)
        ratio = lengths / reference_lengths
        rejected = tl.where((ratio < LENGTH_LOW) | (ratio > LENGTH_HIGH), 1, 0)
    totals = tl.zeros((BLOCK_N, BLOCK_G), tl.float64)
    scored = tl.zeros((BLOCK_N, BLOCK_G), tl.int32)
    size_of_weights = tl.full((), 0.0, tl.float64)
    for k in range(NUM_REWARDS):  # not unrolled, so that only one reward takes registers at a time
        weight = tl.full((), 1.0, tl.float64)
        if weights_K is not None:
            weight = tl.load(weights_K + k)
        bad |= tl.where(tl.abs(weight) <= 1e30, 0, 2)
        size_of_weights += tl.abs(weight)
        values = tl.load(rewards_RK + rollouts * NUM_REWARDS + k, mask=here, other=float("nan")).to(tl.float64)
        bad |= tl.where(tl.abs(values) > 1e150, 1, 0)
        present = values == values
        values = tl.where(present & (rejected != 0) & (masked_reward == k), 0.0, values)
        scored |= tl.where(present, 1, 0)
        if SUM_FIRST:
            totals += tl.where(present, weight * values, 0.0)
        else:
            totals += _normalised(values, weight, EPS)
    if SUM_FIRST:
        totals = _normalised(tl.where(scored != 0, totals, float("nan")), 1.0, EPS)
    return (
        rollouts,
        here,
        totals,
        scored,
        size_of_weights,
        tl.max(tl.max(bad & 1, axis=1), axis=0)
        | tl.max(tl.max(bad & 2, axis=1), axis=0)
        | tl.max(tl.max(bad & 4, axis=1), axis=0)
        | tl.max(tl.max(bad & 8, axis=1), axis=0),
    )


@triton.jit
def _grouped_advantages_kernel(
    rewards_RK,
    weights_K,
    lengths_R,
    reference_lengths_R,
    advantages_R,
    status,
    num_groups,
    group_size,
    masked_reward,
    NUM_REWARDS: tl.constexpr,
    METHOD: tl.constexpr,
    LENGTH_LOW: tl.constexpr,
    LENGTH_HIGH: tl.constexpr,
    EPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Writes the advantages: one program per tile of groups, or a single program for ``gdpo``. ``status`` gets the
    status bits of invalid values."""
    BLOCK_N: tl.constexpr = BLOCK_VALUES // BLOCK_G
    if METHOD == "gdpo":
        count, total, squares = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        low, high = tl.full((), _INFINITY, tl.float64), tl.full((), -_INFINITY, tl.float64)
        weights_size = tl.full((), 0.0, tl.float64)
        for first_group in range(0, num_groups, BLOCK_N):
            _, _, totals, scored, weights_size, bad = _tile_advantages(
                tl.full((), 0, tl.int64) + first_group,
                rewards_RK, weights_K, lengths_R, reference_lengths_R, num_groups, group_size, masked_reward,
                NUM_REWARDS, False, LENGTH_LOW, LENGTH_HIGH, EPS, BLOCK_N, BLOCK_G,
            )  # fmt: skip
            if bad != 0:
                tl.atomic_or(status, bad)
            is_scored = scored != 0
            # Dividing by the sum of the weights' absolute values keeps squares from overflowing or vanishing.
            units = totals / tl.where(weights_size > 0.0, weights_size, 1.0)
            count += tl.sum(tl.sum(tl.where(is_scored, 1.0, 0.0).to(tl.float64), axis=1), axis=0)
            total += tl.sum(tl.sum(units, axis=1), axis=0)
            squares += tl.sum(tl.sum(units * units, axis=1), axis=0)
            low = tl.minimum(low, tl.min(tl.min(tl.where(is_scored, units, _INFINITY), axis=1), axis=0))
            high = tl.maximum(high, tl.max(tl.max(tl.where(is_scored, units, -_INFINITY), axis=1), axis=0))
        # The advantages of a group sum to 0, so squares about 0 lose no digits to cancellation.
        variance = (squares - total * total / tl.maximum(count, 1.0)) / tl.maximum(count - 1.0, 1.0)
        std = tl.sqrt(tl.maximum(variance, 0.0)) * weights_size
        varied = (count > 1.5) & (high - low > ROUNDING)
        for first_group in range(0, num_groups, BLOCK_N):
            rollouts, here, totals, _, _, _ = _tile_advantages(
                tl.full((), 0, tl.int64) + first_group,
                rewards_RK, weights_K, lengths_R, reference_lengths_R, num_groups, group_size, masked_reward,
                NUM_REWARDS, False, LENGTH_LOW, LENGTH_HIGH, EPS, BLOCK_N, BLOCK_G,
            )  # fmt: skip
            whitened = tl.where(varied, totals / tl.where(varied, std + EPS, 1.0), 0.0)
            tl.store(advantages_R + rollouts, whitened.to(tl.float32), mask=here)
    else:
        rollouts, here, totals, _, _, bad = _tile_advantages(
            tl.program_id(0).to(tl.int64) * BLOCK_N,
            rewards_RK, weights_K, lengths_R, reference_lengths_R, num_groups, group_size, masked_reward,
            NUM_REWARDS, METHOD == "grpo", LENGTH_LOW, LENGTH_HIGH, EPS, BLOCK_N, BLOCK_G,
        )  # fmt: skip
        if bad != 0:
            tl.atomic_or(status, bad)
        tl.store(advantages_R + rollouts, totals.to(tl.float32), mask=here)


def grouped_advantages(
    rewards: Tensor,
    group_size: int,
    weights: Tensor | None,
    mask: tuple[Tensor | None, Tensor | None, int | None, tuple[float, float]],
    method: str,
    eps: float,
    rounding: float,
) -> tuple[Tensor, int]:
    """Advantages (R,) float32, and status bits that are read back from the device.

    The status is the sum of 1 for invalid rewards, 2 for invalid weights, 4 for invalid lengths and 8 for invalid
    reference lengths.

    Args:
        rewards: (R, K) float32 or float64.
        group_size: number of rollouts per group, at most the launch table's BLOCK_VALUES.
        weights: (K,) float64, or None for weights of 1.
        mask: the length mask as (lengths, reference lengths, index of the gated column of rewards, bounds of the length
            ratio).
        method: ``c-gdpo``, ``gdpo`` or ``grpo``; see ``balcaprl.kernels.advantages.grouped_advantages``.
        eps: number added to each std; see ``balcaprl.kernels.advantages.grouped_advantages``.
        rounding: largest spread of advantages at which a ``gdpo`` batch counts as flat, in units of the sum of the
            weights' absolute values.
    """
    num_rollouts, num_rewards = rewards.shape
    lengths, reference_lengths, masked_reward, (low, high) = mask
    advantages = torch.empty(num_rollouts, dtype=torch.float32, device=rewards.device)
    if not num_rollouts:
        return advantages, 0
    status = torch.zeros(1, dtype=torch.int32, device=rewards.device)
    row = launch("_grouped_advantages_kernel", rewards.device, rewards.dtype)
    block_g = triton.next_power_of_2(group_size)
    num_groups = num_rollouts // group_size
    tiles = triton.cdiv(num_groups, row.blocks["BLOCK_VALUES"] // block_g)
    with on_device(rewards.device):
        _grouped_advantages_kernel[(1 if method == "gdpo" else tiles,)](
            rewards.contiguous(),
            None if weights is None else weights.contiguous(),
            None if lengths is None else lengths.contiguous(),
            None if reference_lengths is None else reference_lengths.contiguous(),
            advantages,
            status,
            num_groups,
            group_size,
            -1 if masked_reward is None else masked_reward,
            num_rewards,
            method,
            low,
            high,
            eps,
            rounding,
            BLOCK_G=block_g,
            **row.kwargs(),
        )
    return advantages, int(status)


# The compile suite's shape: 4096 groups of 8 rollouts with 3 weighted rewards, one of them gated by the length mask.
_GROUPS, _SIZE, _REWARDS = 4096, 8, 3


def _spec(method: str) -> KernelSpec:
    def work(_: Launch) -> Work:
        floor = _GROUPS * _SIZE * (4 * _REWARDS + 8 + 4)
        read = floor - 4 * _GROUPS * _SIZE
        moved = floor + (read if method == "gdpo" else 0)
        return Work(f"N={_GROUPS} G={_SIZE} K={_REWARDS}", floor, moved, 15 * _GROUPS * _SIZE * _REWARDS, "fp64")

    return KernelSpec(
        kernel=_grouped_advantages_kernel,
        dtype=torch.float32,
        arguments={
            "rewards_RK": "*fp32",
            "weights_K": "*fp64",
            "lengths_R": "*fp32",
            "reference_lengths_R": "*fp32",
            "advantages_R": "*fp32",
            "status": "*i32",
            "num_groups": "i32",
            "group_size": "i32",
            "masked_reward": "i32",
        },
        constexprs={
            "NUM_REWARDS": _REWARDS,
            "METHOD": method,
            "LENGTH_LOW": 0.5,
            "LENGTH_HIGH": 2.0,
            "EPS": 1e-4,
            "ROUNDING": 1e-14,
            "BLOCK_G": _SIZE,
        },
        work=work,
        variant=method,
        wide_load=False,  # values of one reward are K elements apart in memory
    )


KERNEL_SPECS = [_spec(method) for method in ("c-gdpo", "gdpo", "grpo")]
