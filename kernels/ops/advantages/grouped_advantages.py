"""Advantages of the rollouts of a group, computed from the group's rewards.

For group i, rollout j, reward k, over the finite entries of the group only (NaN means that the judge gave no score)::

    z_k(i,j) = (r_k(i,j) - mean_j r_k(i,.)) / (std_j r_k(i,.) + eps)        std with ddof 1
    A(i,j)   = sum_k w_k z_k(i,j)

=============  ======================================================================================================
``c-gdpo``     the two lines above
``gdpo``       the two lines above, then ``A <- (A - mean A) / (std A + eps)`` over the scored rollouts of the whole
               batch. The mean is 0 by construction (every z sums to 0 over its group), so the code does not subtract
               it: a subtraction would only move rounding noise into flat groups
``grpo``       ``total(i,j) = sum_k w_k r_k(i,j)`` over the scores that exist, then one normalisation of the total
=============  ======================================================================================================

Edge rules:

- A missing score contributes 0 and is left out of its reward's mean and std. For ``grpo`` it is left out of the
  rollout's total, so that a rollout with some scores missing has a smaller total; a rollout counts as missing only if
  it has no score at all.
- A rollout with no score at all gets exactly 0, and is not part of the batch statistics of ``gdpo``.
- A reward contributes exactly 0 to a group in which it has fewer than two scores, or only equal scores.
- For ``gdpo`` a batch also counts as flat, with all advantages exactly 0, if its advantages differ by no more than the
  rounding of their terms: 64 units in the last place of ``sum_k |w_k|``. Dividing such noise by its own std would
  make it as large as a signal.
- Before anything else, the length mask sets ``masked_reward`` to 0 where ``lengths / reference_lengths`` is outside
  ``length_bounds`` (a ratio equal to a bound is inside). A missing score stays missing.

All arithmetic is in float64. Each implementation first subtracts one of the group's own values (the reference: the
smallest), so that rewards around 0.9999 with a spread of 1e-6 keep their order. It scales the differences where their
squares could overflow (the reference: by the group's range), so that rewards of 1e30 are allowed. Rewards carry no
gradient, and no gradient flows through this op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balcaprl.kernels.support import launch, native
from balcaprl.kernels.support.checks import check_choice, check_impl, check_number, check_tensor
from balcaprl.kernels.support.dispatch import fastest_impl

METHODS = ("c-gdpo", "gdpo", "grpo")
IMPLS = ("reference", "native", "triton")

# Larger values could overflow: a weighted sum in float64, or an advantage in float32.
_MAX_REWARD = 1e150
_MAX_WEIGHT = 1e30
_VALUE_ERRORS = {
    native.BAD_REWARDS: f"rewards: infinite, or beyond {_MAX_REWARD:g}; a missing score is NaN, all others are finite",
    native.BAD_WEIGHTS: f"weights: expected finite numbers within +-{_MAX_WEIGHT:g}",
    native.BAD_LENGTHS: "lengths: expected finite numbers >= 0",
    native.BAD_REFERENCE_LENGTHS: "reference_lengths: expected finite numbers > 0",
}
_ROUNDING = 64
_MAX_TRITON_GROUP = 512  # a group must fit in one tile
_LENGTH_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def grouped_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    weights: Sequence[float] | Tensor | None = None,
    lengths: Tensor | None = None,
    reference_lengths: Tensor | None = None,
    masked_reward: int | None = None,
    length_bounds: tuple[float, float] = (0.5, 2.0),
    method: str = "c-gdpo",
    eps: float = 1e-4,
    impl: str = "auto",
) -> Tensor:
    """Advantages of R rollouts from K rewards each; the module's docstring has the mathematics and the edge rules.

    Args:
        rewards: (R, K) float32 or float64; NaN is a missing score. The rollouts of a group are contiguous.
        group_size: rollouts per group; divides R.
        weights: K numbers, the weight of each reward; None means that all are 1.
        lengths: (R,) completion lengths, float or int, >= 0. ``lengths``, ``reference_lengths`` and ``masked_reward``
            must be given together or not at all.
        reference_lengths: (R,) reference lengths in the unit of ``lengths``, > 0.
        masked_reward: index of the column of ``rewards`` that the length mask gates; a negative index counts from the
            end.
        length_bounds: lowest and highest length ratio at which the masked reward counts; the highest may be infinite.
        method: ``c-gdpo``, ``gdpo`` or ``grpo``.
        eps: number >= 0 that is added to each standard deviation.
        impl: ``native`` (CPU), ``triton`` (CUDA, or CPU under Triton's interpreter; groups of at most 512),
            ``reference`` or ``auto``.

    Returns:
        Advantages, (R,) float32 on the device of ``rewards``, without gradient. The same input gives the same bits; for
        ``c-gdpo`` and ``grpo`` a group's advantages do not depend on the other groups.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, range or value; the message starts with its name.
        RuntimeError: ``impl`` is ``native`` and the compiled library is not available.
    """
    check_tensor("rewards", rewards, shape=("R", "K"), dtypes=(torch.float32, torch.float64))
    check_choice("method", method, METHODS)
    check_number("eps", eps, low=0.0)
    check_impl("grouped_advantages", impl, IMPLS)
    num_rollouts, num_rewards = rewards.shape
    if num_rewards == 0:
        raise ValueError("rewards: expected at least one column")
    if isinstance(group_size, bool) or not isinstance(group_size, int | torch.SymInt) or group_size < 1:
        raise ValueError(f"group_size: expected an integer >= 1, got {group_size!r}")
    if num_rollouts % group_size:
        raise ValueError(f"group_size: {group_size} does not divide the {num_rollouts} rollouts")
    if impl != "auto":
        resolve_impl(impl, rewards, group_size)
    column = _check_mask(rewards, lengths, reference_lengths, masked_reward)
    low, high = _check_bounds(length_bounds)
    return _grouped_advantages_op(
        rewards.detach(),
        group_size,
        _weights_tensor(weights, rewards),
        lengths,
        reference_lengths,
        column,
        low,
        high,
        method,
        float(eps),
        impl,
    )


def grouped_advantages_reference(
    rewards: Tensor,
    group_size: int,
    *,
    weights: Tensor | None = None,
    lengths: Tensor | None = None,
    reference_lengths: Tensor | None = None,
    masked_reward: int | None = None,
    length_bounds: tuple[float, float] = (0.5, 2.0),
    method: str = "c-gdpo",
    eps: float = 1e-4,
) -> Tensor:
    """The specification of ``grouped_advantages``, in plain PyTorch; takes the same arguments and does not check them.

    Computes in the dtype of ``rewards`` and returns (R,) advantages in that dtype.
    """
    num_rollouts, num_rewards = rewards.shape
    if num_rollouts == 0:
        return rewards.new_zeros(0)
    if lengths is not None and reference_lengths is not None and masked_reward is not None:
        rewards = _apply_length_mask(rewards, lengths, reference_lengths, masked_reward, length_bounds)
    weights = rewards.new_ones(num_rewards) if weights is None else weights.to(rewards)
    scored_R = ~rewards.isnan().all(dim=1)
    if method == "grpo":
        total_R = (rewards.masked_fill(rewards.isnan(), 0.0) * weights).sum(dim=1)
        rewards, weights = total_R.masked_fill(~scored_R, torch.nan)[:, None], rewards.new_ones(1)
    values_NGK = rewards.view(num_rollouts // group_size, group_size, -1)
    deviation, std, flat = _moments(values_NGK)
    z_NGK = torch.where(flat, 0.0, deviation / torch.where(flat, 1.0, std + eps))
    advantages_R = (z_NGK * weights).sum(dim=-1).flatten()
    if method == "gdpo":
        noise = _ROUNDING * torch.finfo(rewards.dtype).eps * weights.abs().sum()
        _, batch_std, batch_flat = _moments(advantages_R.masked_fill(~scored_R, torch.nan)[None, :, None], noise)
        # The mean is 0 and is not subtracted; the module's docstring says why.
        advantages_R = torch.where(
            batch_flat, 0.0, advantages_R / torch.where(batch_flat, 1.0, batch_std + eps)
        ).flatten()
    return advantages_R.masked_fill(~scored_R, 0.0)


def _apply_length_mask(
    rewards: Tensor, lengths: Tensor, reference_lengths: Tensor, masked_reward: int, length_bounds: tuple[float, float]
) -> Tensor:
    """A copy of ``rewards`` whose gated column is 0 where a score exists and the length ratio is outside the bounds."""
    ratio_R = lengths.double() / reference_lengths.double()
    outside_R = (ratio_R < length_bounds[0]) | (ratio_R > length_bounds[1])
    rewards = rewards.clone()
    column_R = rewards[:, masked_reward]
    rewards[:, masked_reward] = torch.where(outside_R & ~column_R.isnan(), 0.0, column_R)
    return rewards


def _moments(values_NGK: Tensor, noise: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations, standard deviation and flatness of the values along dim 1, with NaN entries excluded.

    Subtracting the smallest value makes equal entries exactly 0 and preserves a tiny spread on a large offset. Dividing
    by the range keeps the squares from overflowing or vanishing.

    Returns:
        Deviations from the mean, (N, G, K), 0 where the entry is NaN; std with ddof 1, (N, 1, K); and (N, 1, K) bool,
        true where there are fewer than two entries or the range does not exceed ``noise``.
    """
    present = ~values_NGK.isnan()
    count = present.sum(dim=1, keepdim=True)
    low = values_NGK.masked_fill(~present, torch.inf).amin(dim=1, keepdim=True)
    high = values_NGK.masked_fill(~present, -torch.inf).amax(dim=1, keepdim=True)
    flat = (count < 2) | ~(high - low > noise)
    spread = torch.where(flat, 1.0, high - low)
    scaled = ((values_NGK - low) / spread).masked_fill(~present, 0.0)
    mean = scaled.sum(dim=1, keepdim=True) / count.clamp(min=1)
    deviation = (scaled - mean).masked_fill(~present | flat, 0.0)
    std = spread * (deviation.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return deviation * spread, std, flat


def _check_mask(
    rewards: Tensor, lengths: Tensor | None, reference_lengths: Tensor | None, masked_reward: int | None
) -> int | None:
    """Checks the three arguments of the length mask; returns the gated column as an index >= 0, or None without a mask.

    The three arguments must be given together or not at all.
    """
    arguments = {"lengths": lengths, "reference_lengths": reference_lengths, "masked_reward": masked_reward}
    missing = [name for name, value in arguments.items() if value is None]
    if len(missing) == 3:
        return None
    if missing:
        raise ValueError(f"{missing[0]}: missing; the length mask needs lengths, reference_lengths and masked_reward")
    shape, device = (rewards.shape[0],), rewards.device
    check_tensor("lengths", lengths, shape=shape, dtypes=_LENGTH_DTYPES, device=device)
    check_tensor("reference_lengths", reference_lengths, shape=shape, dtypes=_LENGTH_DTYPES, device=device)
    num_rewards = rewards.shape[1]
    if isinstance(masked_reward, bool) or not isinstance(masked_reward, int):
        raise ValueError(f"masked_reward: expected a column index, got {masked_reward!r}")
    if not -num_rewards <= masked_reward < num_rewards:
        raise ValueError(f"masked_reward: {masked_reward} is not one of the {num_rewards} columns")
    return masked_reward % num_rewards


def _check_bounds(length_bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(length_bounds, tuple | list) or len(length_bounds) != 2:
        raise ValueError(f"length_bounds: expected two numbers (lowest, highest), got {length_bounds!r}")
    low, high = float(length_bounds[0]), float(length_bounds[1])
    if not 0.0 <= low <= high:
        raise ValueError(f"length_bounds: expected 0 <= lowest <= highest, got {length_bounds!r}")
    return low, high


def _weights_tensor(weights: Sequence[float] | Tensor | None, rewards: Tensor) -> Tensor | None:
    """Checks the weights and returns them as (K,) float64 on the device of ``rewards``, or None for no weights."""
    if weights is None:
        return None
    num_rewards = rewards.shape[1]
    if isinstance(weights, Tensor):
        check_tensor("weights", weights, shape=(num_rewards,), device=rewards.device)
        return weights.detach().double()
    if len(weights) != num_rewards:
        raise ValueError(f"weights: expected {num_rewards} numbers, one per reward, got {len(weights)}")
    return torch.tensor([float(w) for w in weights], dtype=torch.float64, device=rewards.device)


# The op is defined and implemented by hand because torch.library.custom_op would wrap each call in checks for mutation
# and autograd, which take longer than the op's own work.
_LIBRARY = torch.library.Library("balcaprl", "FRAGMENT")
_LIBRARY.define(
    "grouped_advantages(Tensor rewards, int group_size, Tensor? weights, Tensor? lengths, Tensor? reference_lengths, "
    "int? masked_reward, float length_low, float length_high, str method, float eps, str impl) -> Tensor"
)


@torch.library.impl(_LIBRARY, "grouped_advantages", "CompositeExplicitAutograd")
def _grouped_advantages_impl(
    rewards, group_size, weights, lengths, reference_lengths, masked_reward, length_low, length_high, method, eps, impl
):
    """Chooses the implementation and checks values; a tracer does not see this body."""
    impl = resolve_impl(impl, rewards, group_size)
    mask = (lengths, reference_lengths, masked_reward, (length_low, length_high))
    if impl == "native":
        return _grouped_advantages_native(rewards, group_size, weights, *mask, method, eps)
    if impl == "triton":
        from balcaprl.kernels.advantages import triton

        rounding = _ROUNDING * torch.finfo(torch.float64).eps
        advantages, bad = triton.grouped_advantages(rewards, group_size, weights, mask, method, eps, rounding)
        for bit, status in enumerate(_VALUE_ERRORS):
            if bad >> bit & 1:
                raise ValueError(_VALUE_ERRORS[status])
        return advantages
    _check_values(rewards, weights, lengths, reference_lengths)
    return grouped_advantages_reference(
        rewards.double(),
        group_size,
        weights=weights,
        lengths=lengths,
        reference_lengths=reference_lengths,
        masked_reward=masked_reward,
        length_bounds=(length_low, length_high),
        method=method,
        eps=eps,
    ).float()


@torch.library.register_fake("balcaprl::grouped_advantages")
def _grouped_advantages_fake(rewards, *_):
    return rewards.new_empty(rewards.shape[0], dtype=torch.float32)


_grouped_advantages_op = torch.ops.balcaprl.grouped_advantages.default


def resolve_impl(impl: str, rewards: Tensor, group_size: int = 1) -> str:
    """Returns the implementation to run for ``rewards``; ``auto`` becomes the fastest one that can run.

    Raises:
        ValueError: ``impl`` cannot run on such groups; the message starts with ``impl`` or ``group_size``.
    """
    if impl == "auto":
        return fastest_impl(rewards.device, triton_fits=group_size <= _MAX_TRITON_GROUP)
    if impl == "native" and rewards.device.type != "cpu":
        raise ValueError(f"impl: 'native' runs on the CPU, rewards are on {rewards.device}")
    if impl == "triton":
        launch.check_triton(rewards.device)
        if group_size > _MAX_TRITON_GROUP:
            raise ValueError(f"group_size: impl='triton' takes at most {_MAX_TRITON_GROUP}, got {group_size}")
    return impl


def _check_values(
    rewards: Tensor, weights: Tensor | None, lengths: Tensor | None, reference_lengths: Tensor | None
) -> None:
    """Checks values for the reference; the native and Triton implementations check values themselves."""
    if (rewards.abs() > _MAX_REWARD).any():
        raise ValueError(_VALUE_ERRORS[native.BAD_REWARDS])
    if weights is not None and not (weights.abs() <= _MAX_WEIGHT).all():
        raise ValueError(_VALUE_ERRORS[native.BAD_WEIGHTS])
    if lengths is not None and not ((lengths >= 0) & lengths.isfinite()).all():
        raise ValueError(_VALUE_ERRORS[native.BAD_LENGTHS])
    if reference_lengths is not None and not ((reference_lengths > 0) & reference_lengths.isfinite()).all():
        raise ValueError(_VALUE_ERRORS[native.BAD_REFERENCE_LENGTHS])


def _grouped_advantages_native(
    rewards: Tensor,
    group_size: int,
    weights: Tensor | None,
    lengths: Tensor | None,
    reference_lengths: Tensor | None,
    masked_reward: int | None,
    length_bounds: tuple[float, float],
    method: str,
    eps: float,
) -> Tensor:
    """Runs ``kernels/csrc/grouped_advantages.cpp``, which reads the rewards once."""
    library = native.library()
    function = (
        library.balcaprl_grouped_advantages_f64
        if rewards.dtype == torch.float64
        else library.balcaprl_grouped_advantages_f32
    )
    rewards = rewards.contiguous()
    # The list keeps the converted copies alive until the call returns.
    doubles = [None if t is None else t.double().contiguous() for t in (weights, lengths, reference_lengths)]
    advantages = torch.empty(rewards.shape[0], dtype=torch.float32)
    status = function(
        rewards.data_ptr(),
        *rewards.shape,
        group_size,
        *(None if t is None else t.data_ptr() for t in doubles),
        masked_reward or 0,
        *length_bounds,
        METHODS.index(method),
        eps,
        advantages.data_ptr(),
    )
    if status == native.OUT_OF_MEMORY:
        raise MemoryError(f"grouped_advantages: no memory for {rewards.shape[0]} rollouts")
    if status != native.OK:
        raise ValueError(_VALUE_ERRORS[status])
    return advantages
