"""logits_policy_loss: policy_loss behind a log-softmax, its accuracy, the in-place gradient, bad input, registration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tile_sizes import overridden
from torch import Tensor

from balcaprl.kernels import logits_policy_loss
from balcaprl.kernels.loss.logits_policy_loss import logits_policy_loss_reference
from balcaprl.kernels.loss.policy_loss import policy_loss_reference
from balcaprl.kernels.loss.records import PolicyLoss
from balcaprl.kernels.support import native
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

IMPLS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.is_available(), reason="no native library")),
    pytest.param("triton", marks=pytest.mark.interpreter),
]
FULL = {"clip_low": 0.2, "clip_high": 0.28, "sampling_ratio_cap": 1.1, "kl_coef": 0.3}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (lengths of the completions, vocabulary): odd sizes, one token, one column, empty completions, tiles that are full and not.
SHAPES = [
    ((1,), 1),
    ((1,), 2),
    ((2,), 3),
    ((1, 1), 7),
    ((3, 0, 5, 1, 4), 301),
    ((0, 0, 7), 63),
    ((0, 9), 64),
    ((5,), 65),
    ((2, 2), 127),
    ((3,), 128),
    ((4, 1), 129),
    ((6,), 1000),
    ((1, 2, 3), 1023),
    ((2,), 1024),
    ((3,), 1025),
    ((1,), 2047),
    ((2,), 4099),
    ((17, 16), 33),
    ((31,), 17),
    ((8, 9, 10), 50),
    ((1,), 5003),
    ((3,), 1),
    ((4, 4), 2),
    ((0, 0, 1), 5),
    ((2, 1), 8),
    ((1, 0, 2), 16),
    ((7,), 31),
    ((2, 3), 47),
    ((1, 1, 1, 1), 62),
    ((4,), 66),
    ((2, 5), 95),
    ((1,), 126),
    ((3, 2), 191),
    ((2,), 192),
    ((1, 4), 193),
    ((2, 0, 1), 255),
    ((3,), 257),
    ((1, 1), 383),
    ((2,), 511),
    ((1, 2), 640),
    ((2,), 777),
    ((1,), 3001),
]


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several tiles to a row, but not many: the interpreter is slow."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    tile = 64 if parameters.get("vocabulary", 0) < 700 else 512
    with (
        overridden("_logits_stats_kernel", BLOCK_V=tile),
        overridden("_logits_gradient_kernel", BLOCK_V=2 * tile),
    ):
        yield


def batch(
    lengths: tuple[int, ...] = (3, 0, 5, 1, 4),
    vocabulary: int = 37,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    peak: float = 3.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Logits, targets and a ragged batch around them, with ratios on both sides of the clip and one advantage of 0."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    logits = (peak * torch.randn(num_tokens, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    logprobs = (logits.double() / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    advantages = torch.randn(len(lengths), generator=generator)
    if len(lengths) > 1:
        advantages[-1] = 0.0

    def near() -> Tensor:
        return (logprobs + 0.3 * torch.randn(num_tokens, generator=generator)).to(dtype)

    return {
        "logits": logits,
        "targets": targets,
        "old_logprobs": near(),
        "advantages": advantages,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "sampling_logprobs": near(),
        "reference_logprobs": near(),
    }


def run(function, data: dict[str, Tensor], dtype: torch.dtype | None = None, **options) -> tuple[PolicyLoss, Tensor]:
    """Results, and the gradient of the logits with a factor that the backward must apply."""
    data = {k: v.to(dtype) if dtype is not None and v.is_floating_point() else v for k, v in data.items()}
    leaf = data["logits"].clone().requires_grad_()
    result = function(**{**data, "logits": leaf * 1.0}, **options)
    (result.loss * 3.0).backward()
    assert leaf.grad is not None
    return result, leaf.grad


# Values.


def test_by_hand() -> None:
    """Two tokens of a vocabulary of two: p = 3/4 and 1/4 of the targets, advantages 1 and -2, on-policy."""
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]], dtype=torch.float64, requires_grad=True)
    arguments = (torch.tensor([0, 1]), None, torch.tensor([1.0, -2.0]), torch.tensor([0, 1, 2], dtype=torch.int32))
    result = logits_policy_loss(logits, *arguments)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.5)
    # g = -A / 2 tokens: -0.5 and 1; d z = g ([v = y] - p).
    expected = torch.tensor([[-0.125, 0.125], [-0.75, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected)


def test_reference_is_policy_loss_of_the_log_softmax() -> None:
    data = batch()
    logits, targets = data.pop("logits"), data.pop("targets")
    logprobs = (logits / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = policy_loss_reference(logprobs, **data, **FULL)
    actual = logits_policy_loss_reference(logits, targets, **data, **FULL, temperature=0.7)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("extra", [{}, FULL])
def test_gradcheck(extra: dict) -> None:
    data = batch((3, 0, 2), 5)
    logits = data.pop("logits").requires_grad_()
    torch.autograd.gradcheck(lambda x: logits_policy_loss(x, **data, **extra, temperature=0.7).loss, (logits,))
    torch.autograd.gradcheck(lambda x: logits_policy_loss_reference(x, **data, **extra).loss, (logits,))


EXTRAS = [{}, {**FULL, "temperature": 0.6, "reduction": "sequence-mean"}]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "vocabulary"), SHAPES)
def test_accuracy(impl: str, dtype: torch.dtype, lengths: tuple[int, ...], vocabulary: int) -> None:
    """The rule over several batches: of a few numbers the plain version's error is small by luck now and then."""
    num_problems = 8 if impl != "triton" else 2 if sum(lengths) > 6 else 4  # the interpreter is slow
    for extra in EXTRAS:

        def compared(seed: int, extra: dict[str, Any] = extra) -> Iterator[Compared]:
            data = batch(lengths, vocabulary, dtype, seed=seed, temperature=extra.get("temperature", 1.0))
            (result, gradient), *others = (
                run(logits_policy_loss, data, impl=impl, **extra),
                run(logits_policy_loss_reference, data, **extra),
                run(logits_policy_loss_reference, data, torch.float64, **extra),
            )
            assert gradient.dtype == dtype
            yield Compared("gradient", gradient, *(each for _, each in others), "gradient")
            scalars = [result, *(each for each, _ in others)]
            if impl == "triton":
                actual, _, exact = (torch.stack([value.detach() for value in each]) for each in scalars)
                torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
                return
            for name, *values in zip(PolicyLoss._fields, *scalars, strict=True):
                # Sums and means of terms of a size of about 1 and of both signs: theirs are the roundings that count.
                yield Compared(name, *(value.detach() for value in values), scale=1.0)

        assert_as_accurate_over(compared, num_problems=num_problems)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "vocabulary"), SHAPES)
def test_accuracy_of_the_log_probabilities(
    impl: str, dtype: torch.dtype, lengths: tuple[int, ...], vocabulary: int
) -> None:
    def compared(seed: int) -> Iterator[Compared]:
        data = batch(lengths, vocabulary, dtype, seed=seed)
        targets = data["targets"][:, None]
        actual = torch.ops.balcaprl.logits_policy_loss(*op_arguments(data, impl))[4]
        working = (data["logits"].float() / 0.7).log_softmax(-1).gather(1, targets)[:, 0]
        exact = (data["logits"].double() / 0.7).log_softmax(-1).gather(1, targets)[:, 0]
        yield Compared("logprobs", actual, working, exact)

    assert_as_accurate_over(compared, num_problems=4 if impl != "triton" else 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("peak", [0.0, 30.0, 3e4])
def test_flat_peaked_and_huge_logits(impl: str, peak: float) -> None:
    """From p = 1 / V to targets whose probability rounds to 1, where 1 - p must keep its digits."""

    def on_policy(data: dict[str, Any], function, dtype: torch.dtype, **options) -> tuple[Tensor, Tensor]:
        leaf, targets = data["logits"].to(dtype).requires_grad_(), data["logits"].argmax(-1)
        loss = function(leaf, targets, None, data["advantages"], data["cu_seqlens"], **options).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def compared(seed: int) -> Iterator[Compared]:
        data = batch((4, 3), 203, torch.float32, seed=seed, peak=peak)
        losses, gradients = zip(
            on_policy(data, logits_policy_loss, torch.float32, impl=impl),
            on_policy(data, logits_policy_loss_reference, torch.float32),
            on_policy(data, logits_policy_loss_reference, torch.float64),
            strict=True,
        )
        yield Compared("loss", *losses)
        yield Compared("gradient", *gradients, "gradient")

    assert_as_accurate_over(compared)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_without_gradient_is_exactly_zero_and_not_read(impl: str) -> None:
    data = batch((3, 2), 300, torch.float32)  # the last completion has advantage 0
    _, gradient = run(logits_policy_loss, data, impl=impl)
    assert torch.equal(gradient[3:], torch.zeros(2, 300))
    assert (gradient[:3] != 0).any()
    logits, num_tokens = data["logits"].clone(), 5
    logits[3:] = math.nan
    per_token = [torch.ones(num_tokens) for _ in range(3)]
    grad_logprobs = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0])
    backward = torch.ops.balcaprl.logits_policy_loss_backward
    result = backward(logits, data["targets"], *per_token, grad_logprobs, torch.ones(()), 1.0, impl)
    assert result[:3].isfinite().all()
    assert torch.equal(result[3:], torch.zeros(2, 300))


@pytest.mark.parametrize("impl", IMPLS)
def test_forbidden_tokens(impl: str) -> None:
    """-inf beside the target: probability 0, gradient 0; a whole first tile of it too."""
    data = batch((4,), 300, torch.float32)
    data["targets"] = torch.full((4,), 200)
    data["logits"][:, :150] = -math.inf
    actual, gradient = run(logits_policy_loss, data, impl=impl)
    kept = {**data, "logits": data["logits"][:, 150:], "targets": data["targets"] - 150}
    expected, expected_gradient = run(logits_policy_loss_reference, kept)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(gradient[:, 150:], expected_gradient)
    assert torch.equal(gradient[:, :150], torch.zeros(4, 150))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_without_meaning_are_an_error(impl: str, value: float, dtype: torch.dtype) -> None:
    data = batch((3, 2), 200, dtype)
    data["logits"][1, int(data["targets"][1])] = value
    with pytest.raises(ValueError, match=r"^logits: 1 rows, the first of them 1, hold NaN"):
        logits_policy_loss(**data, impl=impl)
    if math.isnan(value):
        data = batch((3, 2), 200, dtype)
        data["logits"][4, 77] = value
        with pytest.raises(ValueError, match=r"^logits: 1 rows, the first of them 4"):
            logits_policy_loss(**data, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_forbidden_tokens_is_an_error(impl: str) -> None:
    data = batch((3, 2), 200, torch.float32)
    data["logits"][2] = -math.inf
    with pytest.raises(ValueError, match=r"^logits: 1 rows, the first of them 2"):
        logits_policy_loss(**data, impl=impl)


# Memory: layouts, offsets, threads.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_of_a_wider_buffer(impl: str, inplace: bool) -> None:
    """Padded vocabulary: what stands beyond it is neither read nor written."""
    data = batch((3, 2), 301, torch.bfloat16)
    expected, expected_gradient = run(logits_policy_loss, data, impl=impl)
    buffer = torch.full((5, 340), math.nan, dtype=torch.bfloat16)
    logits = buffer[:, 7:308]
    logits.copy_(data["logits"])
    leaf = logits.detach().requires_grad_()  # the same storage
    actual = logits_policy_loss(**{**data, "logits": leaf}, impl=impl, inplace_grad=inplace)
    (actual.loss * 3.0).backward()
    assert torch.equal(actual.loss, expected.loss)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected_gradient)
    assert buffer[:, :7].isnan().all()
    assert buffer[:, 308:].isnan().all()
    assert torch.equal(logits, expected_gradient if inplace else data["logits"])


@pytest.mark.parametrize("impl", IMPLS)
def test_transposed_and_expanded_logits(impl: str) -> None:
    data = batch((3, 2), 70, torch.float32)
    expected = run(logits_policy_loss, data, impl=impl)
    leaf = data["logits"].t().contiguous().requires_grad_()
    actual = logits_policy_loss(**{**data, "logits": leaf.t()}, impl=impl)
    (actual.loss * 3.0).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.t(), expected[1])
    row = data["logits"][:1].clone().requires_grad_()
    expanded = logits_policy_loss(**{**data, "logits": row.expand(5, 70)}, impl=impl)
    expanded.loss.backward()
    copied, gradient = run(logits_policy_loss, {**data, "logits": data["logits"][:1].repeat(5, 1)}, impl=impl)
    assert torch.equal(expanded.loss, copied.loss)
    torch.testing.assert_close(row.grad * 3.0, gradient.sum(0, keepdim=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_past_2_to_the_31(impl: str, inplace: bool) -> None:
    """Two rows 2^31 + 16 values apart; the memory between them is reserved, but never touched."""
    vocabulary, stride = 150, (1 << 31) + 16
    data = batch((2,), vocabulary, torch.bfloat16)
    expected, expected_gradient = run(logits_policy_loss, data, impl=impl)
    logits = torch.empty(stride + vocabulary, dtype=torch.bfloat16).as_strided((2, vocabulary), (stride, 1))
    logits.copy_(data["logits"])
    leaf = logits.detach().requires_grad_()
    actual = logits_policy_loss(**{**data, "logits": leaf}, impl=impl, inplace_grad=inplace)
    (gradient,) = torch.autograd.grad(actual.loss * 3.0, leaf)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_gives_the_same_bits(impl: str) -> None:
    data = batch((7, 6), 1500, torch.float32)
    first, second = (run(logits_policy_loss, data, impl=impl) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1])


@pytest.mark.skipif(not native.is_available(), reason="no native library")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    data = batch((70, 60), 20000, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(logits_policy_loss, data, impl="native"))
    finally:
        torch.set_num_threads(threads)
    for result, gradient in results[1:]:
        assert torch.equal(result.loss, results[0][0].loss)
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_tokens(impl: str, lengths: tuple[int, ...], inplace: bool) -> None:
    result, gradient = run(
        logits_policy_loss, batch(lengths, 9, torch.float32), impl=impl, inplace_grad=inplace, **FULL
    )
    assert all(value.item() == 0.0 for value in result)
    assert gradient.shape == (0, 9)


# The in-place gradient.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_inplace_gradient_is_the_same_and_takes_the_logits_storage(impl: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and impl != "reference":
        pytest.skip("only the reference has float64")
    data = batch((3, 0, 5, 1, 4), 301, dtype)
    expected = run(logits_policy_loss, data, impl=impl)
    leaf = data["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    storage, seen = logits.data_ptr(), []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    result = logits_policy_loss(**{**data, "logits": logits}, impl=impl, inplace_grad=True)
    (result.loss * 3.0).backward()
    assert torch.equal(result.loss, expected[0].loss)
    assert torch.equal(leaf.grad, expected[1])
    assert seen == [storage]
    assert torch.equal(logits, expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_after_an_inplace_gradient_autograd_refuses_the_logits(impl: str) -> None:
    data = batch((3, 2), 70, torch.float32)
    leaf = data["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    other = logits.square().sum()  # saves the logits
    loss = logits_policy_loss(**{**data, "logits": logits}, impl=impl, inplace_grad=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_inplace_a_second_backward_works(impl: str) -> None:
    data = batch((3, 2), 70, torch.float32)
    leaf = data["logits"].clone().requires_grad_()
    loss = logits_policy_loss(**{**data, "logits": leaf}, impl=impl).loss
    first, second = (
        torch.autograd.grad(loss, leaf, factor, retain_graph=True)[0] for factor in torch.tensor([1.0, 2.0])
    )
    torch.testing.assert_close(second, 2.0 * first)


def test_inplace_gradient_beside_another_use_that_needs_no_values() -> None:
    """Gradients of several uses of the logits add up; the accumulation must not touch the wrong storage."""
    data = batch((3, 2), 70, torch.float32)
    gradients = []
    for inplace in (False, True):
        leaf = data["logits"].clone().requires_grad_()
        logits = leaf * 1.0
        loss = logits_policy_loss(**{**data, "logits": logits}, inplace_grad=inplace).loss
        (loss + logits.sum()).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    data = batch((3, 2), 70, torch.float32)
    before = data["logits"].clone()
    result = logits_policy_loss(**data, inplace_grad=True)
    assert not result.loss.requires_grad
    assert torch.equal(data["logits"], before)


# Bad input.


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("logits", {"logits": torch.zeros(13)}),
        ("logits", {"logits": torch.zeros(13, 37, dtype=torch.int64)}),
        ("logits", {"logits": torch.zeros(1, 37).expand(13, 37), "inplace_grad": True}),
        ("logits", {"logits": torch.zeros(37, 13).t(), "inplace_grad": True}),
        ("logits", {"logits": torch.zeros(600).as_strided((13, 37), (36, 1)), "inplace_grad": True}),
        ("targets", {"targets": torch.zeros(12, dtype=torch.int64)}),
        ("targets", {"targets": torch.zeros(13, dtype=torch.int32)}),
        ("targets", {"targets": torch.full((13,), 37)}),
        ("targets", {"targets": torch.full((13,), -1)}),
        ("targets", {"targets": torch.zeros(13, dtype=torch.int64, device="meta")}),
        ("targets", {"logits": torch.zeros(13, 0)}),
        ("old_logprobs", {"old_logprobs": torch.zeros(12)}),
        ("old_logprobs", {"old_logprobs": torch.full((13,), math.nan)}),
        ("advantages", {"advantages": torch.full((5,), math.nan)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 3, 8, 9, 13], dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, -5, 3, 8, 9, 13], dtype=torch.int32)}),
        ("sampling_logprobs", {"sampling_logprobs": None, "sampling_ratio_cap": 2.0}),
        ("reference_logprobs", {"reference_logprobs": None, "kl_coef": 0.1}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": math.nan}),
        ("reduction", {"reduction": "mean"}),
        ("normalizer", {"normalizer": -1.0}),
        ("impl", {"impl": "cuda"}),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_bad_argument_is_named(argument: str, changed: dict, impl: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        logits_policy_loss(**{**batch(dtype=torch.float32), "impl": impl, **changed})


def test_only_the_reference_has_float64() -> None:
    data = batch()
    assert logits_policy_loss(**data).loss.dtype == torch.float64
    with pytest.raises(ValueError, match=r"^impl: 'native' has no float64"):
        logits_policy_loss(**data, impl="native")


def test_triton_says_how_to_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^impl: 'triton' (runs on CPU tensors only|needs the triton package)"):
        logits_policy_loss(**batch(dtype=torch.float32), impl="triton")


# Registration.


def op_arguments(data: dict[str, Tensor], impl: str, inplace: bool = False) -> tuple:
    return (
        data["logits"],
        data["targets"],
        data["old_logprobs"],
        data["advantages"],
        data["cu_seqlens"],
        0.2,
        0.2,
        data["sampling_logprobs"],
        1.5,
        data["reference_logprobs"],
        0.1,
        "sequence-mean",
        None,
        0.7,
        inplace,
        impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(impl: str, dtype: torch.dtype) -> None:
    data = batch((3, 2), 70, dtype)
    *_, row_max, row_sum, logprobs, grad_logprobs = torch.ops.balcaprl.logits_policy_loss(*op_arguments(data, impl))
    per_row = (data["targets"], row_max, row_sum, logprobs, grad_logprobs, torch.ones(()), 0.7, impl)
    logits = data["logits"]
    torch.library.opcheck(torch.ops.balcaprl.logits_policy_loss_backward.default, (logits, *per_row))
    torch.library.opcheck(torch.ops.balcaprl.logits_policy_loss_backward_.default, (logits.clone(), *per_row))
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.balcaprl.logits_policy_loss.default, op_arguments(data, impl))


@pytest.mark.parametrize("inplace", [False, True])
def test_fullgraph_compile(inplace: bool) -> None:
    def step(hidden: Tensor, weight: Tensor, data: dict[str, Tensor]) -> PolicyLoss:
        logits = hidden @ weight.T  # made here: what is written over is the graph's own
        return logits_policy_loss(logits, inplace_grad=inplace, normalizer=13, **data)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ((3, 0, 5), (2, 2), (4, 0, 9)):
        data = batch(lengths, 41, torch.float32)
        data.pop("logits")
        hidden = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(1))
        weight = torch.randn(41, 8, generator=torch.Generator().manual_seed(2))
        gradients = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            result = function(*leaves, data)
            gradients.append(torch.autograd.grad(result.loss, leaves))
        torch.testing.assert_close(gradients[0], gradients[1])


def test_under_autocast() -> None:
    """Logits arrive in bfloat16, and their gradient goes back so; the loss is float32."""
    data = batch((3, 2), 70, torch.float32)
    data.pop("logits")
    hidden = torch.randn(5, 16, requires_grad=True)
    weight = torch.randn(70, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        result = logits_policy_loss(logits, **data)
    assert logits.dtype == torch.bfloat16
    assert result.loss.dtype == torch.float32
    result.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
