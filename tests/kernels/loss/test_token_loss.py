"""The shared middle of the policy losses: any cut of the tokens adds up to the whole, for each implementation."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from tile_sizes import overridden
from torch import Tensor

from balcaprl.kernels.loss.records import LossArguments, LossSettings, TokenBatch, TokenLoss
from balcaprl.kernels.loss.token_loss import (
    REDUCTIONS,
    check_parts,
    policy_loss_metrics,
    raise_invalid,
    spread,
    token_batch,
    token_loss,
)
from balcaprl.kernels.support import native

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


def ragged(seed: int) -> tuple[LossArguments, int]:
    """Up to 20 rollouts of up to 9 tokens, some empty; and the number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(-3, 10, (seed % 21,), generator=generator).clamp(min=0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    num_tokens = int(offsets[-1])
    old, sampling = torch.randn(2, num_tokens, generator=generator)
    arguments = LossArguments(old, torch.randn(len(lengths), generator=generator).bfloat16(), offsets)
    return arguments._replace(sampling_logprobs=sampling.double()), num_tokens


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalizer", [None, 7.5])
def test_batch_is_checked_and_spread_as_by_plain_ops(impl: str, reduction: str, normalizer: float | None) -> None:
    with overridden("_token_batch_kernel", BLOCK_T=16):
        for seed in range(42):
            arguments, num_tokens = ragged(seed)
            arguments = arguments._replace(reduction=reduction, normalizer=normalizer)
            actual = token_batch(arguments, num_tokens, torch.float32, impl)
            expected = spread(arguments, num_tokens, torch.float32)
            torch.testing.assert_close(actual.per_token, expected.per_token, rtol=1e-6, atol=0.0)
            assert actual.status is None or not actual.status.any()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 2, 40])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 39])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 41, 40])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, -(2**31), 40])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2**31 - 1, 40])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0]), "advantages": torch.zeros(0)}),
        ("advantages", {"advantages": torch.tensor([0.0, math.inf])}),
        ("advantages", {"advantages": torch.tensor([math.nan, 0.0])}),
        ("old_logprobs", {"old_logprobs": torch.zeros(40).index_fill(0, torch.tensor([39]), -math.inf)}),
        ("sampling_logprobs", {"sampling_logprobs": torch.zeros(40).index_fill(0, torch.tensor([17]), math.nan)}),
        ("reference_logprobs", {"reference_logprobs": torch.zeros(40).index_fill(0, torch.tensor([0]), math.inf)}),
        ("advantages or log", {"old_logprobs": torch.full((40,), 1e300, dtype=torch.float64)}),
    ],
)
def test_batch_with_a_bad_value_names_it(impl: str, name: str, changed: dict[str, Tensor]) -> None:
    if impl == "reference" and name.endswith("log"):
        pytest.skip("the plain ops turn a number beyond float32 into an infinity")
    arguments = LossArguments(None, torch.zeros(2), torch.tensor([0, 20, 40]))._replace(**changed)
    arguments = arguments._replace(cu_seqlens=arguments.cu_seqlens.int())

    def checked() -> None:
        part = token_loss(torch.zeros(40), token_batch(arguments, 40, torch.float32, impl), LossSettings(), impl)
        assert part.loss_sum.isnan()
        assert part.grad_logprobs.isnan().all()
        check_parts([part], partial(raise_invalid, arguments, 40))

    with overridden("_token_batch_kernel", BLOCK_T=16), pytest.raises(ValueError, match=f"^{name}"):
        checked()


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_triton_turns_a_bad_logprob_into_nan(value: float) -> None:
    """Where the error is raised late, nobody takes what was computed for sound."""
    logprobs, batch = tokens(40, torch.float32)
    logprobs[17] = value
    part = token_loss(logprobs, batch, SETTINGS, "triton")
    assert part.num_bad is not None
    assert part.num_bad.item() == 1.0
    assert part.loss_sum.isnan()
    assert part.grad_logprobs.isnan().nonzero().tolist() == [[17]]
