"""Functions that Triton kernels call on values in registers. All but ``expm1_float32`` work on float64 values.

The kernels that use the float64 functions move a few values per token or per rollout. They are bound by memory, so
float64 costs them nothing on the data-centre GPUs that they are compiled for. In float32, the rounding error of exp
could be as large as a divergence that is computed from it. This module is imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_power(x):
    """2^-e for a positive x = 2^e * m with m in [1, 2); 2^1023 for a subnormal x and for 0."""
    exponent = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return (0x7FE0000000000000 - exponent).to(tl.float64, bitcast=True)


@triton.jit
def expm1(x):
    """e^x - 1, with an error of at most 2e-11 times e^x.

    x is first clamped to +-700; beyond that, the result is infinity or -1 in float32 anyway. The function then splits
    x = n log 2 + r with |r| <= log(2) / 2 and evaluates e^r by its Taylor series.
    """
    x = tl.minimum(tl.maximum(x, -700.0), 700.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.6931471805599453
    curve = r * (1.0 / 3628800.0) + 1.0 / 362880.0
    curve = curve * r + 1.0 / 40320.0
    curve = curve * r + 1.0 / 5040.0
    curve = curve * r + 1.0 / 720.0
    curve = curve * r + 1.0 / 120.0
    curve = curve * r + 1.0 / 24.0
    curve = curve * r + 1.0 / 6.0
    curve = curve * r + 0.5
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return power * (curve * r * r + r) + (power - 1.0)


@triton.jit
def expm1_float32(x):
    """e^x - 1 in float32, accurate near x = 0 too."""
    series = 1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040))))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1.0)


@triton.jit
def token_loss(
    logprobs,
    old_logprobs,
    advantages,
    sampling_logprobs,
    reference_logprobs,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    SAMPLING_CAP: tl.constexpr,
    KL_COEF: tl.constexpr,
):
    """Loss of each token before scale and sum, its gradient and metrics; ``policy_loss.py`` has the mathematics.

    Without old or reference log-probabilities, the caller passes ``logprobs`` in their place; without sampling
    log-probabilities, it passes ``old_logprobs``. A ``SAMPLING_CAP`` of 0 means no importance sampling.

    Returns the loss, its gradient with respect to ``logprobs``, clipped (0 or 1), the ratio, and the k3 estimates of
    the divergences from the reference and from the sampler.
    """
    ratio = expm1(logprobs - old_logprobs) + 1.0
    # An advantage of 0 gives a loss of exactly 0, even where the ratio overflows.
    surrogate = tl.where(advantages == 0.0, 1.0, ratio)
    clipped = ((advantages > 0.0) & (ratio > 1.0 + CLIP_HIGH)) | ((advantages < 0.0) & (ratio < 1.0 - CLIP_LOW))
    bounded = tl.minimum(tl.maximum(surrogate, 1.0 - CLIP_LOW), 1.0 + CLIP_HIGH)
    loss = -tl.minimum(surrogate * advantages, bounded * advantages)
    gradient = tl.where(clipped, 0.0, -surrogate * advantages)
    sampling_difference = old_logprobs - sampling_logprobs
    sampling_excess = expm1(sampling_difference)
    if SAMPLING_CAP > 0.0:
        importance = tl.minimum(sampling_excess + 1.0, SAMPLING_CAP)
        loss *= importance
        gradient *= importance
    reference_difference = reference_logprobs - logprobs
    reference_excess = expm1(reference_difference)
    k3_reference = reference_excess - reference_difference
    if KL_COEF > 0.0:
        loss += KL_COEF * k3_reference
        gradient -= KL_COEF * reference_excess
    return loss, gradient, tl.where(clipped, 1.0, 0.0), ratio, k3_reference, sampling_excess - sampling_difference
