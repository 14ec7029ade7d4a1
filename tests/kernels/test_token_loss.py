"""The shared middle of the policy losses: any cut of the tokens adds up to the whole, for each implementation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from balcaprl.kernels import native
from balcaprl.kernels.token_loss import (
    LossArguments,
    LossSettings,
    TokenBatch,
    TokenLoss,
    policy_loss_metrics,
    token_batch,
    token_loss,
)

SETTINGS = LossSettings(clip_low=0.2, clip_high=0.28, sampling_ratio_cap=1.1, kl_coef=0.3)
IMPLS = ("reference", "native", pytest.param("triton", marks=pytest.mark.interpreter))


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.is_available():
        pytest.skip(f"no native library: {native.unavailable_reason()}")
    return request.param


def tokens(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, TokenBatch]:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(6, num_tokens, generator=generator, dtype=torch.float64) * 0.5
    columns[4].abs_()
    logprobs, old, advantages, sampling, scale, reference = columns.to(dtype).unbind()
    return logprobs, TokenBatch(old, advantages, scale, sampling, reference)


def test_parts_add_up_to_the_whole(impl: str) -> None:
    logprobs, batch = tokens(1000, torch.float32)
    whole = token_loss(logprobs, batch, SETTINGS, impl)
    cuts = (0, 0, 1, 400, 401, 1000)
    ranges = list(itertools.pairwise(cuts))
    parts = [token_loss(logprobs[a:b], batch.rows(a, b), SETTINGS, impl) for a, b in ranges]
    torch.testing.assert_close(torch.stack([part.loss_sum for part in parts]).sum(), whole.loss_sum)
    metrics = policy_loss_metrics(torch.stack([part.metric_sums for part in parts]))
    torch.testing.assert_close(metrics, policy_loss_metrics(whole.metric_sums))
    gradients = torch.cat([part.grad_logprobs for part in parts])
    if impl != "reference":
        assert torch.equal(gradients, whole.grad_logprobs)
    torch.testing.assert_close(gradients, whole.grad_logprobs)


def test_no_tokens(impl: str) -> None:
    logprobs, batch = tokens(0, torch.float32)
    result = token_loss(logprobs, batch, SETTINGS, impl)
    assert isinstance(result, TokenLoss)
    assert result.loss_sum.item() == 0.0
    assert torch.equal(policy_loss_metrics(result.metric_sums), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("reduction", "scale"),
    [("token-mean", [1 / 3] * 3), ("sequence-mean", [1 / 3, 1 / 6, 1 / 6]), ("constant", [1 / 6] * 3)],
)
def test_scale_by_hand(impl: str, reduction: str, scale: list[float]) -> None:
    offsets = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    arguments = LossArguments(None, torch.tensor([1.0, 2.0, 3.0]), offsets, reduction=reduction)
    batch = token_batch(arguments, 3, torch.float32, impl)
    assert batch.advantages.tolist() == [1.0, 3.0, 3.0]
    torch.testing.assert_close(batch.scale, torch.tensor(scale))
    halved = token_batch(arguments._replace(normalizer=2.0), 3, torch.float32, impl)
    assert halved.scale[0].item() == 0.5
