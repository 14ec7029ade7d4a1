"""policy_loss: the formula by hand, its gradient, the reductions, the metrics, bad input, registration."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from tile_sizes import overridden
from torch import Tensor

from balcaprl.kernels import PolicyLoss, policy_loss
from balcaprl.kernels.loss.policy_loss import policy_loss_reference
from balcaprl.kernels.loss.token_loss import REDUCTIONS
from balcaprl.kernels.support import native
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

LENGTHS = (3, 0, 5, 1, 4)
needs_native = pytest.mark.skipif(not native.is_available(), reason=f"no native library: {native.unavailable_reason()}")


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def batch(dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    """A ragged batch with an empty completion, ratios on both sides of the clip, and all four log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(num_tokens, generator=generator, dtype=torch.float64)

    logprobs = -3.0 * torch.rand(num_tokens, generator=generator, dtype=torch.float64) - 0.1
    per_token = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + noise(0.3),
        "sampling_logprobs": logprobs + noise(0.3),
        "reference_logprobs": logprobs + noise(0.5),
    }
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return {
        **{name: value.to(dtype) for name, value in per_token.items()},
        "advantages": advantages.to(dtype),
        "cu_seqlens": offsets(lengths),
    }


FULL = {"clip_low": 0.2, "clip_high": 0.28, "sampling_ratio_cap": 1.1, "kl_coef": 0.3}


def one_token(ratio: float, advantage: float, **arguments) -> tuple[PolicyLoss, float]:
    """The loss of one token and its gradient with respect to the token's log-probability."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - math.log(ratio)
    result = policy_loss(logprobs, old, torch.tensor([advantage]), offsets((1,)), **arguments)
    result.loss.backward()
    assert logprobs.grad is not None
    return result, logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: gradient -A * ratio
        (1.5, 2.0, -2.4, 0.0),  # above, A > 0: clipped
        (0.5, 2.0, -1.0, -1.0),  # below, A > 0: not clipped
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # below, A < 0: clipped
        (1.5, -2.0, 3.0, 3.0),  # above, A < 0: not clipped
    ],
)
def test_clip_stops_the_gradient_on_the_right_side(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    result, actual_gradient = one_token(ratio, advantage)
    assert result.loss.item() == pytest.approx(loss)
    assert actual_gradient == pytest.approx(gradient, abs=1e-12)
    assert result.clip_fraction.item() == float(gradient == 0.0)


def test_zero_advantage_gives_exactly_zero_whatever_the_ratio() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    result = policy_loss(logprobs, torch.tensor([-500.0]), torch.zeros(1), offsets((1,)))  # exp(499) overflows
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0.0


def test_formula_by_hand() -> None:
    """Every term at once, token by token in plain Python."""
    data = batch()
    result = policy_loss(**data, **FULL)
    total, position = 0.0, 0
    for length, advantage in zip(LENGTHS, data["advantages"].tolist(), strict=True):
        for t in range(position, position + length):
            new, old, sampled, reference = (
                data[f"{name}logprobs"][t].item() for name in ("", "old_", "sampling_", "reference_")
            )
            ratio, d = math.exp(new - old), reference - new
            token = -min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            token *= min(math.exp(old - sampled), 1.1)
            total += token + 0.3 * (math.exp(d) - d - 1)
        position += length
    assert result.loss.item() == pytest.approx(total / sum(LENGTHS), rel=1e-12)


def test_on_policy_is_the_detached_forward() -> None:
    data = batch()
    logprobs = data["logprobs"].requires_grad_()
    result = policy_loss(logprobs, None, data["advantages"], data["cu_seqlens"])
    result.loss.backward()
    advantages = data["advantages"].repeat_interleave(torch.tensor(LENGTHS))
    torch.testing.assert_close(result.loss.detach(), -advantages.mean())
    torch.testing.assert_close(logprobs.grad, -advantages / sum(LENGTHS))
    assert result.ratio_mean.item() == result.ratio_max.item() == 1.0
    assert result.clip_fraction.item() == 0.0


# Gradients.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("extra", [{}, FULL])
def test_gradcheck(reduction: str, extra: dict) -> None:
    data = batch()
    logprobs = data.pop("logprobs").requires_grad_()
    torch.autograd.gradcheck(lambda x: policy_loss(x, **data, reduction=reduction, **extra).loss, (logprobs,))
    torch.autograd.gradcheck(lambda x: policy_loss_reference(x, **data, reduction=reduction, **extra).loss, (logprobs,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (0, 0, 7), (200, 1, 300)])
def test_op_agrees_with_autograd_of_the_reference(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    assert_as_accurate_over(lambda seed: compared("auto", dtype, lengths, seed))


def ragged_lengths(seed: int, longest: int) -> tuple[int, ...]:
    """Up to 7 completions, some empty."""
    generator = torch.Generator().manual_seed(seed + 1000 * longest)
    num_rollouts = int(torch.randint(1, 8, (), generator=generator))
    return tuple(torch.randint(0, longest, (num_rollouts,), generator=generator).tolist())


def compared(impl: str, dtype: torch.dtype, lengths: tuple[int, ...], seed: int) -> Iterator[Compared]:
    """Loss, metrics and gradient of the op."""
    data = batch(dtype, lengths, seed)
    results, gradients = [], []
    op = functools.partial(policy_loss, impl=impl)
    cases = ((op, dtype), (policy_loss_reference, dtype), (policy_loss_reference, torch.float64))
    for function, precision in cases:
        inputs = {k: v if k == "cu_seqlens" else v.to(precision) for k, v in data.items()}
        logprobs = inputs["logprobs"] = inputs["logprobs"].clone().requires_grad_()
        results.append(function(**inputs, **FULL))
        (results[-1].loss * 3.0).backward()
        gradients.append(logprobs.grad)
    for name, *values in zip(PolicyLoss._fields, *results, strict=True):
        # Sums and means of terms of a size of about 1 and of both signs: theirs are the roundings that count.
        yield Compared(name, *(v.detach() for v in values), scale=1.0)
    assert gradients[0].dtype == dtype
    yield Compared("gradient", *gradients, "gradient")


@needs_native
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_is_as_accurate_as_the_reference(dtype: torch.dtype) -> None:
    """48 ragged shapes, each instruction set of this machine."""
    for longest in (2, 9, 40, 300):
        assert_as_accurate_over(
            lambda seed, longest=longest: compared("native", dtype, ragged_lengths(seed, longest), seed),
            num_problems=12,
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_is_as_accurate_as_the_reference(dtype: torch.dtype) -> None:
    """48 ragged shapes, of one tile and of several, partial sums in one tile and in several."""
    with overridden("_token_loss_kernel", BLOCK_T=32), overridden("_token_sums_kernel", BLOCK_P=4):
        for longest in (2, 9, 40, 90):
            assert_as_accurate_over(
                lambda seed, longest=longest: compared("triton", dtype, ragged_lengths(seed, longest), seed),
                num_problems=12,
            )


@pytest.mark.interpreter
def test_triton_on_policy_same_bits_and_bad_input() -> None:
    data = batch(torch.float32, (300, 0, 1200))
    del data["old_logprobs"]
    first, second = (policy_loss(**data, old_logprobs=None, **FULL, impl="triton") for _ in range(2))
    assert torch.equal(torch.stack(first), torch.stack(second))
    expected = policy_loss(**data, old_logprobs=None, **FULL, impl="reference")
    torch.testing.assert_close(torch.stack(first), torch.stack(expected))
    with pytest.raises(ValueError, match=r"^logprobs: "):
        policy_loss(**{**data, "logprobs": data["logprobs"] * math.nan}, old_logprobs=None, impl="triton")
    with pytest.raises(ValueError, match=r"^impl: .*float64"):
        policy_loss(**batch(), impl="triton")


@needs_native
@pytest.mark.parametrize("num_tokens", [1, 15, 17, 8191, 8193, 40_000])
def test_native_gives_the_same_bits_at_any_thread_count(num_tokens: int) -> None:
    data = batch(torch.float32, (num_tokens - 1, 1))
    data["logprobs"].requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            result = policy_loss(**data, **FULL, impl="native")
            results.append([*result, *torch.autograd.grad(result.loss, data["logprobs"])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_native_takes_strided_and_mixed_inputs() -> None:
    data = batch(torch.float32, (5, 7, 40))
    expected = policy_loss(**data, **FULL, impl="native")
    strided = {k: torch.stack([v, v + 9], dim=1)[:, 0] for k, v in data.items() if k != "cu_seqlens"}
    offsets_of_two = torch.stack([data["cu_seqlens"]] * 2, dim=1)[:, 1]
    actual = policy_loss(**strided, cu_seqlens=offsets_of_two, **FULL, impl="native")
    assert torch.equal(torch.stack(actual), torch.stack(expected))
    data["old_logprobs"] = data["old_logprobs"].double()
    assert torch.equal(torch.stack(policy_loss(**data, **FULL, impl="native")), torch.stack(expected))


@pytest.mark.parametrize("difference", [-800.0, -100.0, 88.5, 100.0, 800.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_overflow_gives_infinities_in_the_same_places_and_no_nan(
    impl: str, difference: float, advantage: float
) -> None:
    logprobs = torch.tensor([-1.0, -1.0]).requires_grad_()
    other = torch.tensor([-1.0 - difference, -1.0])
    arguments = {"advantages": torch.full((2,), advantage), "cu_seqlens": offsets((1, 1)), "kl_coef": 0.5}
    results = []
    for each in (impl, "reference"):
        result = policy_loss(logprobs, other, reference_logprobs=other, **arguments, impl=each)
        results.append([*result[:-1], *torch.autograd.grad(result.loss, logprobs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert not actual.isnan().any()


def test_metrics_and_other_inputs_carry_no_gradient() -> None:
    data = {k: v if k == "cu_seqlens" else v.requires_grad_() for k, v in batch().items()}
    result = policy_loss(**data, **FULL)
    assert all(not metric.requires_grad for metric in result[1:])
    result.loss.backward()
    assert data["logprobs"].grad is not None
    assert all(v.grad is None for k, v in data.items() if k != "logprobs")


# Reductions.


def split(data: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Rollouts begin to end of a batch."""
    cu_seqlens = data["cu_seqlens"]
    tokens = slice(int(cu_seqlens[begin]), int(cu_seqlens[end]))
    part = {k: v[tokens] for k, v in data.items() if k not in ("advantages", "cu_seqlens")}
    offsets_of_part = cu_seqlens[begin : end + 1] - cu_seqlens[begin]
    return {**part, "advantages": data["advantages"][begin:end], "cu_seqlens": offsets_of_part}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_with_the_global_normalizer_add_up_to_the_whole(reduction: str) -> None:
    data = batch()
    normalizer = {"token-mean": sum(LENGTHS), "sequence-mean": len(LENGTHS), "constant": len(LENGTHS) * max(LENGTHS)}
    data["logprobs"].requires_grad_()
    whole = policy_loss(**data, **FULL, reduction=reduction).loss
    (whole_gradient,) = torch.autograd.grad(whole, data["logprobs"])
    parts = [split(data, 0, 2), split(data, 2, 3), split(data, 3, 5)]
    losses = [policy_loss(**p, **FULL, reduction=reduction, normalizer=normalizer[reduction]).loss for p in parts]
    total = torch.stack(losses).sum()
    (gradient,) = torch.autograd.grad(total, data["logprobs"])
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient, whole_gradient)


def test_reductions_by_hand() -> None:
    logprobs = torch.zeros(3, dtype=torch.float64)
    advantages = torch.tensor([-1.0, -5.0, -10.0], dtype=torch.float64)  # token losses 1, 10, 10
    arguments = (logprobs, None, advantages, offsets((1, 0, 2)))
    assert policy_loss(*arguments, reduction="token-mean").loss.item() == pytest.approx(21 / 3)
    assert policy_loss(*arguments, reduction="sequence-mean").loss.item() == pytest.approx((1 + 0 + 10) / 3)
    assert policy_loss(*arguments, reduction="constant").loss.item() == pytest.approx(21 / (3 * 2))
    assert policy_loss(*arguments, reduction="constant", normalizer=42).loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lengths", [(0, 0), ()])
def test_no_tokens(reduction: str, lengths: tuple[int, ...]) -> None:
    data = batch(lengths=lengths)
    logprobs = data["logprobs"].requires_grad_()
    result = policy_loss(**data, **FULL, reduction=reduction)
    result.loss.backward()
    assert all(value.item() == 0.0 for value in result)
    assert logprobs.grad is not None
    assert logprobs.grad.shape == (0,)


# Metrics.


def test_metrics_by_hand() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.0, 1.5], dtype=torch.float64)
    logprobs = torch.full((4,), -1.0, dtype=torch.float64)
    old = logprobs - ratio.log()
    reference = logprobs + math.log(2.0)
    sampling = old - math.log(3.0)
    advantages = torch.tensor([1.0, -1.0, 0.0, -1.0], dtype=torch.float64)
    result = policy_loss(
        logprobs, old, advantages, offsets((1,) * 4), sampling_logprobs=sampling, reference_logprobs=reference
    )
    assert result.clip_fraction.item() == 0.5
    assert result.ratio_mean.item() == pytest.approx(4.5 / 4)
    assert result.ratio_max.item() == pytest.approx(1.5)
    assert result.kl.item() == pytest.approx(2 - math.log(2) - 1)
    assert result.sampling_kl.item() == pytest.approx(3 - math.log(3) - 1)


def test_metrics_without_their_input_are_nan() -> None:
    data = batch()
    result = policy_loss(*(data[k] for k in ("logprobs", "old_logprobs", "advantages", "cu_seqlens")))
    assert math.isnan(result.kl.item())
    assert math.isnan(result.sampling_kl.item())


def test_reference_is_only_measured_at_kl_coef_zero() -> None:
    data = batch()
    assert policy_loss(**data).kl.item() > 0.0
    without = {k: v for k, v in data.items() if k != "reference_logprobs"}
    assert policy_loss(**data).loss.item() == policy_loss(**without).loss.item()


def test_same_input_gives_the_same_bits() -> None:
    data = batch(torch.float32, (300, 0, 400))
    assert torch.equal(policy_loss(**data, **FULL).loss, policy_loss(**data, **FULL).loss)


# Bad input.


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("logprobs", {"logprobs": torch.zeros(2, 2)}),
        ("logprobs", {"logprobs": torch.zeros(13, dtype=torch.int64)}),
        ("logprobs", {"logprobs": torch.full((13,), math.nan)}),
        ("old_logprobs", {"old_logprobs": torch.zeros(12)}),
        ("old_logprobs", {"old_logprobs": torch.full((13,), -math.inf)}),
        ("sampling_logprobs", {"sampling_logprobs": torch.zeros(13, 1)}),
        ("sampling_logprobs", {"sampling_logprobs": torch.full((13,), math.nan)}),
        ("sampling_logprobs", {"sampling_logprobs": None, "sampling_ratio_cap": 2.0}),
        ("reference_logprobs", {"reference_logprobs": torch.full((13,), math.nan)}),
        ("reference_logprobs", {"reference_logprobs": None, "kl_coef": 0.1}),
        ("advantages", {"advantages": torch.zeros(5, 1)}),
        ("advantages", {"advantages": torch.full((5,), math.nan)}),
        ("advantages", {"advantages": torch.zeros(5, device="meta")}),
        ("cu_seqlens", {"cu_seqlens": offsets(LENGTHS).long()}),
        ("cu_seqlens", {"cu_seqlens": offsets(LENGTHS)[:-1]}),
        ("cu_seqlens", {"cu_seqlens": offsets((3, 0, 5, 1, 3))}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 3, 8, 9, 13], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 3, 3, 8, 9, 13], dtype=torch.int32)}),
        ("clip_low", {"clip_low": 1.5}),
        ("clip_low", {"clip_low": None}),
        ("clip_high", {"clip_high": -0.1}),
        ("kl_coef", {"kl_coef": math.inf}),
        ("sampling_ratio_cap", {"sampling_ratio_cap": 0.0}),
        ("reduction", {"reduction": "mean"}),
        ("normalizer", {"normalizer": 0.0}),
        ("normalizer", {"normalizer": torch.tensor(3.0)}),
        ("impl", {"impl": "cuda"}),
        ("impl", {"impl": "native"}),  # float64
    ],
)
def test_bad_argument_is_named(argument: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        policy_loss(**{**batch(), **changed})


# Registration.


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool) -> None:
    data = batch(torch.float32)
    arguments = (
        data["logprobs"].requires_grad_(),
        data["old_logprobs"] if full else None,
        data["advantages"],
        data["cu_seqlens"],
        0.2,
        0.2,
        data["sampling_logprobs"] if full else None,
        1.5 if full else None,
        data["reference_logprobs"] if full else None,
        0.1 if full else 0.0,
        "sequence-mean",
        None,
        "auto",
    )
    torch.library.opcheck(torch.ops.balcaprl.policy_loss.default, arguments)


def test_fullgraph_compile() -> None:
    def step(logprobs: Tensor, old: Tensor, advantages: Tensor, cu_seqlens: Tensor) -> PolicyLoss:
        return policy_loss(logprobs * 2.0, old * 2.0, advantages, cu_seqlens, normalizer=13)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (2, 2), (4, 0, 9)):
        data = batch(torch.float32, lengths)
        arguments = [data[k] for k in ("old_logprobs", "advantages", "cu_seqlens")]
        gradients = []
        for function in (step, compiled):
            logprobs = data["logprobs"].clone().requires_grad_()
            result = function(logprobs, *arguments)
            result.loss.backward()
            gradients.append(logprobs.grad)
        torch.testing.assert_close(gradients[0], gradients[1])
