"""linear_policy_loss: the plain formulation, its gradients and what they leave out, autograd, bad input, registration."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tile_sizes import overridden
from torch import Tensor

from balcaprl.kernels import linear_logprobs, linear_policy_loss, policy_loss
from balcaprl.kernels.head import native as native_head
from balcaprl.kernels.head import native_weight_sum
from balcaprl.kernels.head.linear_policy_loss import linear_policy_loss_reference
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's own float32 product errs up to three times more on two threads at some shapes: no fault of the op's."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


MODULE = sys.modules["balcaprl.kernels.head.linear_policy_loss"]
IMPLS = ("reference", "native")
FULL = {"clip_low": 0.2, "clip_high": 0.28, "sampling_ratio_cap": 1.5, "kl_coef": 0.1, "temperature": 0.8}
Problem = dict[str, Any]


def offsets(num_tokens: int, num_rollouts: int, generator: torch.Generator) -> Tensor:
    """Random cuts, so that completions may be empty."""
    cuts = torch.randint(0, num_tokens + 1, (num_rollouts - 1,), generator=generator).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([num_tokens])]).int()


def problem(
    num_tokens: int,
    hidden_size: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
    peak: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Inputs whose ratios lie well away from the bounds of the clip, on both sides of them: rounding flips no token.

    ``peak`` pushes the target's logit up.
    """
    generator = torch.Generator().manual_seed(1000 * num_tokens + 10 * vocabulary + hidden_size + 1_000_000 * seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = (normal(vocabulary, hidden_size) / math.sqrt(hidden_size)).to(dtype)
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    hidden = (normal(num_tokens, hidden_size) + peak * weight[targets].double()).to(dtype)
    exact = linear_logprobs(hidden.double(), weight.double(), targets, temperature=temperature).logprobs
    steps = torch.tensor([-0.6, 0.0, 0.0, 0.6], dtype=torch.float64)
    old = exact - steps[torch.randint(0, 4, (num_tokens,), generator=generator)]
    num_rollouts = max(1, min(7, num_tokens // 2))
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": targets,
        "old_logprobs": old.float(),
        "advantages": normal(num_rollouts).float(),
        "cu_seqlens": offsets(num_tokens, num_rollouts, generator),
        "sampling_logprobs": (old + 0.1 * normal(num_tokens)).float(),
        "reference_logprobs": (exact + 0.3 * normal(num_tokens)).float(),
        "temperature": temperature,
    }


def cast(data: Problem, dtype: torch.dtype) -> Problem:
    """The same numbers, with hidden and weight as new leaves."""
    leaves = {k: data[k].detach().to(dtype).clone().requires_grad_() for k in ("hidden", "weight")}
    return {**data, **leaves}


def loss_and_gradients(function: Any, data: Problem, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = function(**{**data, **options}).loss
    return loss.detach(), *torch.autograd.grad(loss, (data["hidden"], data["weight"]))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and columns at a time, so that small problems take every path of the chunked code."""
    monkeypatch.setattr(native_head, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(native_head, "FILTER_BLOCK", 3)
    monkeypatch.setattr(sys.modules["balcaprl.kernels.head.linear_logprobs"], "FILTER_BLOCK", 3)
    monkeypatch.setattr(native_head, "_GATHERED_BYTES", 4096)
    monkeypatch.setattr(native_weight_sum, "_TILE_BYTES", 4096)
    monkeypatch.setattr(native_weight_sum, "_POOL_BYTES", 2048)


# What it is.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "constant"])
def test_is_linear_logprobs_and_policy_loss(impl: str, reduction: str) -> None:
    data = problem(23, 6, 37, dtype=torch.float32, temperature=0.8)
    options = {**FULL, "reduction": reduction}
    result = linear_policy_loss(**{**data, **options}, impl=impl)
    options.pop("temperature")
    logprobs = linear_logprobs(data["hidden"], data["weight"], data["targets"], temperature=0.8).logprobs
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "targets", "temperature")}
    expected = policy_loss(logprobs, **rest, **options)
    torch.testing.assert_close(tuple(result), tuple(expected))
    leaves = (data["hidden"], data["weight"])
    actual = torch.autograd.grad(result.loss, leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.loss, leaves))


def test_one_token_by_hand() -> None:
    """Logits (0, log 3): the target has probability 3/4. On-policy, A = 2: loss -2, d loss / d logprob = -2."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    arguments = (torch.tensor([1]), None, torch.tensor([2.0]), torch.tensor([0, 1]).int())
    result = linear_policy_loss(hidden, weight, *arguments)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-2.0)
    assert weight.grad is not None
    assert hidden.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[0.5], [-0.5]]))  # -2 * ([v = y] - p_v)
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.5 * math.log(3.0)]]))


def test_gradcheck() -> None:
    data = problem(7, 4, 9)
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight")}
    options = {k: v for k, v in FULL.items() if k != "temperature"}
    for function in (linear_policy_loss, linear_policy_loss_reference):
        leaves = (data["hidden"], data["weight"])
        torch.autograd.gradcheck(lambda h, w, f=function: f(h, w, **rest, **options).loss, leaves)


# How exact it is.

SHAPES = [(t, d, v) for t in (1, 2, 7, 33, 130) for d, v in ((2, 3), (3, 17), (8, 31), (16, 64), (24, 129), (40, 1001))]
SHAPES += [(3, 5, 4097), (257, 9, 65), (300, 33, 515), (64, 64, 1), (19, 2, 2048), (513, 7, 33), (640, 12, 100)]
SHAPES += [(1, 1, 1), (65, 31, 63), (129, 4, 1025)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_as_accurate_as_the_reference_in_the_working_dtype(
    impl: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    check_accuracy(shape, dtype, impl)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 3, 9), (12, 8, 65), (29, 40, 131)])
@pytest.mark.parametrize("filter_eps", [None, 1e-9])
def test_many_chunks_are_as_accurate(dtype: torch.dtype, shape: tuple[int, int, int], filter_eps: float | None) -> None:
    """In half precision also the second pass over tiles of the vocabulary."""
    check_accuracy(shape, dtype, "native", filter_eps=filter_eps)


@pytest.mark.parametrize("shape", [(8, 8, 9), (12, 40, 65), (29, 30, 131), (33, 64, 1000)])
@pytest.mark.parametrize("zeros", [False, True])
def test_two_halves_of_the_vocabulary_are_as_accurate(
    shape: tuple[int, int, int], zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the logits that fit: taken at once, and equal to chunk by chunk within rounding, the backward alone as well."""
    num_tokens, _, vocabulary = shape
    monkeypatch.setattr(native_head, "_LOGITS_BYTES", 4 * num_tokens * (vocabulary - vocabulary // 2))
    monkeypatch.setattr(native_head, "FILTER_BLOCK", 3)
    options = {**FULL, "kl_coef": 0.0} if zeros else FULL
    calls = []
    by_halves = native_head.gradients_by_halves
    monkeypatch.setattr(native_head, "gradients_by_halves", lambda *given: calls.append(0) or by_halves(*given))

    def compared(seed: int) -> Iterator[Compared]:
        calls.clear()
        data = problem(*shape, dtype=torch.float32, temperature=0.8, seed=seed)
        if zeros:
            data["advantages"] = data["advantages"] * (torch.arange(len(data["advantages"])) % 2)
        actual = loss_and_gradients(linear_policy_loss, data, **options, impl="native")
        separate = separate_gradients(data, options)
        assert calls if zeros else len(calls) == 2, (
            "by halves; the backward alone has fewer tokens where some have no gradient"
        )
        exact = loss_and_gradients(linear_policy_loss_reference, cast(data, torch.float64), **options)
        working = loss_and_gradients(linear_policy_loss_reference, data, **options)
        names = ("hidden", "weight")
        for name, mine, alone, *others in zip(names, actual[1:], separate, working[1:], exact[1:], strict=True):
            yield Compared(name, mine, *others, "gradient")
            yield Compared(f"{name}, the backward alone", alone, *others, "gradient")

    assert_as_accurate_over(compared)


def separate_gradients(data: Problem, options: dict[str, float]) -> tuple[Tensor, ...]:
    """By ``linear_logprobs`` and ``policy_loss``: the backward alone, from what the forward kept."""
    options = {k: v for k, v in options.items() if k != "temperature"}
    names = ("hidden", "weight", "targets", "temperature")
    logprobs = linear_logprobs(*(data[n] for n in names[:3]), temperature=data["temperature"], impl="native").logprobs
    loss = policy_loss(logprobs, **{k: v for k, v in data.items() if k not in names}, **options).loss
    return torch.autograd.grad(loss, (data["hidden"], data["weight"]))


def check_accuracy(
    shape: tuple[int, int, int], dtype: torch.dtype, impl: str, *, num_problems: int = 4, **options: Any
) -> None:
    """Holds losses and gradients of several problems to the rule of ``testing``."""

    def compared(seed: int) -> Iterator[Compared]:
        data = problem(*shape, dtype=dtype, temperature=0.8, seed=seed)
        exact = loss_and_gradients(linear_policy_loss_reference, cast(data, torch.float64), **FULL)
        working = loss_and_gradients(linear_policy_loss_reference, cast(data, dtype), **FULL)
        actual = loss_and_gradients(linear_policy_loss, cast(data, dtype), **FULL, **options, impl=impl)
        assert actual[1].dtype == actual[2].dtype == dtype
        loss, *gradients = zip(actual, working, exact, strict=True)
        # A sum of terms of both signs and a size of about 2: their rounding counts, not that of what is left.
        yield Compared("loss", *loss, "forward", scale=2.0)
        for name, values in zip(("hidden", "weight"), gradients, strict=True):
            yield Compared(name, *values, "gradient")

    assert_as_accurate_over(compared, num_problems=num_problems)


def test_logits_of_large_magnitude() -> None:
    """A confident policy: exp without the maximum taken away would overflow."""

    def compared(seed: int) -> Iterator[Compared]:
        data = problem(20, 8, 50, dtype=torch.float32, seed=seed)
        data["hidden"] = (data["hidden"].detach() * 300).requires_grad_()
        data["old_logprobs"] = None
        exact = loss_and_gradients(linear_policy_loss_reference, cast(data, torch.float64))
        working = loss_and_gradients(linear_policy_loss_reference, data)
        actual = loss_and_gradients(linear_policy_loss, data)
        for name, *values in zip(("loss", "hidden", "weight"), actual, working, exact, strict=True):
            yield Compared(name, *values, "gradient")

    assert_as_accurate_over(compared)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_gives_the_same_bits(impl: str) -> None:
    data = problem(150, 16, 300, dtype=torch.float32)
    first, second = (loss_and_gradients(linear_policy_loss, data, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filter_eps", [None, 1e-2])
def test_poisoned_memory_does_not_show(impl: str, filter_eps: float | None) -> None:
    """In torch's deterministic mode every tensor that is not written holds NaN."""
    data = problem(150, 16, 300, dtype=torch.float32)
    data["advantages"][::2] = 0.0
    expected = loss_and_gradients(linear_policy_loss, data, impl=impl, filter_eps=filter_eps)
    torch.use_deterministic_algorithms(True)
    try:
        actual = loss_and_gradients(linear_policy_loss, data, impl=impl, filter_eps=filter_eps)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


# What it leaves out.


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_without_gradient_are_left_out_exactly(impl: str) -> None:
    data = problem(150, 16, 300, dtype=torch.float32)
    data["advantages"][::2] = 0.0
    per_token = data["advantages"].repeat_interleave(data["cu_seqlens"].diff().long())
    expected = loss_and_gradients(linear_policy_loss_reference, data)
    actual = loss_and_gradients(linear_policy_loss, data, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(actual[1][per_token == 0], torch.zeros_like(actual[1][per_token == 0]))
    assert actual[1].abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_at_all(impl: str) -> None:
    data = problem(40, 8, 30, dtype=torch.float32)
    data["advantages"].zero_()
    _, grad_hidden, grad_weight = loss_and_gradients(linear_policy_loss, data, impl=impl)
    assert not grad_hidden.any()
    assert not grad_weight.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filter_eps", [1e-6, 1e-3, 0.3, 1.0])
def test_the_filter_is_that_of_the_reference(impl: str, filter_eps: float) -> None:
    data = problem(300, 16, 700, dtype=torch.float32, peak=9.0)
    data["old_logprobs"] = None  # all tokens have a gradient: the blocks see the same
    expected = loss_and_gradients(linear_policy_loss_reference, data, filter_eps=filter_eps)
    actual = loss_and_gradients(linear_policy_loss, data, filter_eps=filter_eps, impl=impl)
    # Rounding may move a column over the threshold.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 + 0.1 * filter_eps * (filter_eps < 0.1))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filter_with_many_blocks(dtype: torch.dtype) -> None:
    """Columns wait in the pool in half precision; the peak makes them few."""
    data = problem(40, 16, 700, dtype=dtype, peak=12.0)
    data["old_logprobs"] = None
    exact = loss_and_gradients(linear_policy_loss_reference, cast(data, torch.float64), filter_eps=0.01)
    working = loss_and_gradients(linear_policy_loss_reference, data, filter_eps=0.01)
    actual = loss_and_gradients(linear_policy_loss, data, filter_eps=0.01, impl="native")
    for name, *values in zip(("loss", "hidden", "weight"), actual, working, exact, strict=True):
        scale = float(values[2].abs().max())
        error = float((values[0].double() - values[2]).abs().max())
        # Rounding may move a column over the threshold: the two may differ by what the filter is allowed to drop.
        assert error <= 3 * float((values[1].double() - values[2]).abs().max()) + 0.02 * scale, name


@pytest.mark.parametrize("impl", IMPLS)
def test_filter_drops_only_what_it_may(impl: str) -> None:
    """With D = T and orthonormal hidden states the weight's gradient shows each d z: hidden @ grad_weight.T = dz."""
    num_tokens, vocabulary, eps = 4, 400, 2e-2
    data = problem(num_tokens, num_tokens, vocabulary, dtype=torch.float32)
    orthonormal = torch.linalg.qr(torch.randn(num_tokens, num_tokens))[0]
    data = {**data, "hidden": orthonormal.requires_grad_(), "old_logprobs": None}
    softmax = (4.0 * orthonormal @ data["weight"].T).softmax(dim=-1).detach()
    options = {"temperature": 0.25, "impl": impl}
    full = orthonormal @ loss_and_gradients(linear_policy_loss, data, **options)[2].T
    kept = orthonormal @ loss_and_gradients(linear_policy_loss, data, **options, filter_eps=eps)[2].T
    dropped = (full - kept).abs() > 1e-6
    assert dropped.any(), "the filter has nothing to drop here"
    assert softmax[dropped].max() < eps
    assert not dropped[torch.arange(num_tokens), data["targets"]].any()


def test_filter_of_a_peaked_distribution_changes_little() -> None:
    data = problem(256, 64, 3000, dtype=torch.float32, peak=12.0)
    exact = loss_and_gradients(linear_policy_loss, data)
    filtered = loss_and_gradients(linear_policy_loss, data, filter_eps=2.0**-12)
    assert torch.equal(exact[0], filtered[0])
    half = loss_and_gradients(linear_policy_loss, cast(data, torch.bfloat16))
    for name, *values in zip(("hidden", "weight"), exact[1:], filtered[1:], half[1:], strict=True):
        reference, actual, low = (v.float() for v in values)
        assert (actual - reference).norm() < (low - reference).norm(), name


# Autograd.


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_gradients_that_are_asked_for(impl: str) -> None:
    data = problem(20, 6, 37, dtype=torch.float32)
    _, grad_hidden, grad_weight = loss_and_gradients(linear_policy_loss, data, impl=impl)
    for name, expected in (("hidden", grad_hidden), ("weight", grad_weight)):
        other = "weight" if name == "hidden" else "hidden"
        loss = linear_policy_loss(**{**data, other: data[other].detach()}, impl=impl).loss
        torch.testing.assert_close(torch.autograd.grad(loss, data[name])[0], expected)
    detached = {k: data[k].detach() for k in ("hidden", "weight")}
    assert not linear_policy_loss(**{**data, **detached}, impl=impl).loss.requires_grad
    with torch.no_grad():
        assert not linear_policy_loss(**data, impl=impl).loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_and_scaled(impl: str) -> None:
    data = problem(20, 6, 37, dtype=torch.float32)
    leaves = (data["hidden"], data["weight"])
    expected = torch.stack([g.norm() for g in loss_and_gradients(linear_policy_loss, data, impl=impl)[1:]])
    loss = linear_policy_loss(**data, impl=impl).loss
    for times in (1, 2):
        loss.backward(retain_graph=True)
        norms = torch.stack([x.grad.norm() for x in leaves if x.grad is not None])
        torch.testing.assert_close(norms, times * expected)
    (3.0 * loss).backward()
    norms = torch.stack([x.grad.norm() for x in leaves if x.grad is not None])
    torch.testing.assert_close(norms, 5.0 * expected)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_gradients_become_grad_without_a_copy(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    saved: list[int] = []
    original = MODULE._scaled

    def watched(gradient: Tensor, grad_loss: Tensor, impl: str) -> Tensor:
        saved.append(gradient.data_ptr())
        return original(gradient, grad_loss, impl)

    monkeypatch.setattr(MODULE, "_scaled", watched)
    data = problem(20, 6, 37, dtype=torch.float32)
    (factor * linear_policy_loss(**data).loss).backward()
    assert [data[k].grad.data_ptr() for k in ("hidden", "weight")] == saved


def test_accumulates_over_micro_batches() -> None:
    data = problem(40, 8, 30, dtype=torch.float32)
    data["cu_seqlens"] = torch.tensor([0, 11, 25, 40]).int()
    data["advantages"] = torch.tensor([1.0, -0.5, 2.0])
    whole = loss_and_gradients(linear_policy_loss, data, normalizer=40.0)
    leaves = cast(data, torch.float32)
    for j in range(3):
        begin, end = data["cu_seqlens"][j : j + 2].tolist()
        names = ("targets", "old_logprobs", "sampling_logprobs", "reference_logprobs")
        part = {name: data[name][begin:end] for name in names}
        part |= {"advantages": data["advantages"][j : j + 1], "cu_seqlens": torch.tensor([0, end - begin]).int()}
        part |= {"hidden": leaves["hidden"][begin:end], "weight": leaves["weight"], "temperature": 1.0}
        linear_policy_loss(**part, normalizer=40.0).loss.backward()
    torch.testing.assert_close((leaves["hidden"].grad, leaves["weight"].grad), whole[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_hidden_and_weight(impl: str) -> None:
    data = problem(20, 6, 37, dtype=torch.float32)
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight")}
    low = [data[k].detach().bfloat16().requires_grad_() for k in ("hidden", "weight")]
    expected = linear_policy_loss(*low, **rest, impl=impl).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_policy_loss(**data, impl=impl).loss
        gradients = torch.autograd.grad(actual, (data["hidden"], data["weight"]))
    assert torch.equal(actual, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, low), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, wanted.float())


# Shapes and layouts.


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl: str) -> None:
    data = problem(4, 3, 5, dtype=torch.float32)
    none = {k: data[k][:0] for k in ("targets", "old_logprobs", "sampling_logprobs", "reference_logprobs")}
    hidden = data["hidden"].detach()[:0].requires_grad_()
    arguments = {**data, **none, "hidden": hidden, "cu_seqlens": torch.zeros(3).int()}
    result = linear_policy_loss(**arguments, impl=impl)
    result.loss.backward()
    assert result.loss.item() == result.ratio_mean.item() == 0.0
    assert hidden.grad is not None
    assert not data["weight"].grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_overlapping_tensors(impl: str) -> None:
    data = problem(24, 6, 37, dtype=torch.float32)
    expected = loss_and_gradients(linear_policy_loss, data, impl=impl)
    strided = {
        "hidden": data["hidden"].detach().T.contiguous().T.requires_grad_(),
        "weight": torch.cat([data["weight"].detach()] * 2, dim=1)[:, :6].requires_grad_(),
        "targets": data["targets"].repeat_interleave(2)[::2],
        "old_logprobs": data["old_logprobs"].repeat_interleave(2)[::2],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    torch.testing.assert_close(loss_and_gradients(linear_policy_loss, {**data, **strided}, impl=impl), expected)
    same = {"hidden": data["hidden"].detach()[:1].expand(24, 6), "targets": data["targets"][:1].expand(24)}
    plain = {k: v.contiguous() for k, v in same.items()}
    results = [linear_policy_loss(**{**data, **x}, impl=impl).loss for x in (same, plain)]
    torch.testing.assert_close(*results)


# Triton, under its interpreter: slow, so small.


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 and chunks of few tokens, so that small problems take several, and several slices of the vocabulary."""
    triton_head = importlib.import_module("balcaprl.kernels.head.triton")
    chunks = importlib.import_module("balcaprl.kernels.head.triton_chunks")
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 6000)
    monkeypatch.setattr(chunks, "_TILE_TOKENS", 4)
    monkeypatch.setattr(triton_head, "_SLICE_BYTES", 4000)
    monkeypatch.setattr(triton_head, "_WANTED_PROGRAMS", 6)
    tiles = {
        "stats": (16, 16, 16),
        "grad_logits": (16, 32, 16),
        "grad_hidden": (16, 16, 16),
        "grad_weight": (16, 16, 16),
    }
    with contextlib.ExitStack() as stack:
        for name, (tokens, columns, dims) in tiles.items():
            blocks = {"BLOCK_T": tokens, "BLOCK_V": columns, "BLOCK_D": dims}
            stack.enter_context(overridden(f"_head_{name}_kernel", **blocks))
        yield


@pytest.fixture(params=["in chunks", "recomputed"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a chunk kept, or computed again as if there were too many chunks."""
    if request.param == "recomputed":
        chunks = importlib.import_module("balcaprl.kernels.head.triton_chunks")
        monkeypatch.setattr(chunks, "_MAX_CHUNKS", 0)


TRITON_SHAPES = [(t, d, v) for t in (1, 5, 17, 40) for d, v in ((3, 4), (5, 17), (16, 31), (20, 64), (33, 75))]
TRITON_SHAPES += [(t, d, v) for t in (2, 16, 31, 33) for d, v in ((1, 2), (7, 33), (15, 49), (17, 16), (34, 63))]
TRITON_SHAPES += [(1, 1, 1), (64, 2, 5), (3, 65, 129)]


def test_size_of_chunks() -> None:
    size = importlib.import_module("balcaprl.kernels.head.triton_chunks").chunk_size
    assert size(100, 32_064, 2) == 128
    assert size(8192, 152_064, 2) == 1024, "equal, of whole tiles, within a GiB"
    assert size(8193, 152_064, 2) == 1152
    assert size(65_536, 152_064, 2) is None, "rounded too often"
    assert size(3, 1 << 30, 4) == 1


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", TRITON_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_triton_is_as_accurate_as_the_reference(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    # Few tokens have few roundings, and the reference is exact by luck: several problems are taken together.
    check_accuracy(shape, dtype, "triton", num_problems=4 if shape[0] * shape[1] < 1000 else 1)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles", "both_ways")
def test_triton_leaves_out_tokens_without_gradient() -> None:
    data = problem(50, 16, 40, dtype=torch.float32)
    data["advantages"][::2] = 0.0
    per_token = data["advantages"].repeat_interleave(data["cu_seqlens"].diff().long())
    expected = loss_and_gradients(linear_policy_loss_reference, data)
    actual = loss_and_gradients(linear_policy_loss, data, impl="triton")
    again = loss_and_gradients(linear_policy_loss, data, impl="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    assert not actual[1][per_token == 0].any()
    data["advantages"].zero_()
    assert not any(x.any() for x in loss_and_gradients(linear_policy_loss, data, impl="triton"))


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles")
def test_triton_filter_skips_tiles() -> None:
    """Tokens of one half of the vocabulary, whose softmax gives the other half next to nothing."""
    data = problem(40, 16, 96, dtype=torch.float32)
    weight, half = data["weight"].detach(), torch.arange(96) < 48
    hidden = data["hidden"].detach()
    hidden[:, 0], weight[:, 0] = 6.0, torch.where(half, 1.0, -1.0)
    data |= {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "old_logprobs": None}
    data["targets"] = data["targets"] % 48
    full = loss_and_gradients(linear_policy_loss, data, impl="triton")
    kept = loss_and_gradients(linear_policy_loss, data, impl="triton", filter_eps=1e-3)
    assert torch.equal(full[0], kept[0])
    assert not kept[2][64:].any(), "tiles of 32 columns from 64 on hold nothing"
    assert full[2][64:].any()
    torch.testing.assert_close(kept[1:], full[1:], rtol=0.0, atol=1e-3 * 2.0)
    torch.testing.assert_close(kept[2][:32], full[2][:32])


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles", "both_ways")
@pytest.mark.parametrize("filter_eps", [None, 1e-9])
def test_triton_poisoned_memory_scaling_and_strides(filter_eps: float | None) -> None:
    data = problem(24, 6, 37, dtype=torch.float32)
    expected = loss_and_gradients(linear_policy_loss_reference, data)
    strided = {
        "hidden": data["hidden"].detach().T.contiguous().T.requires_grad_(),
        "weight": torch.cat([data["weight"].detach()] * 2, dim=1)[:, :6].requires_grad_(),
        "targets": data["targets"].repeat_interleave(2)[::2],
    }
    torch.use_deterministic_algorithms(True)
    try:
        loss = linear_policy_loss(**{**data, **strided}, impl="triton", filter_eps=filter_eps).loss
    finally:
        torch.use_deterministic_algorithms(False)
    for _ in range(2):
        gradients = torch.autograd.grad(3.0 * loss, (strided["hidden"], strided["weight"]), retain_graph=True)
        torch.testing.assert_close(gradients, tuple(3.0 * g for g in expected[1:]))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("targets", {"targets": torch.tensor([0, 1, 2, 5])}),
        ("targets", {"targets": torch.tensor([0, -1, 2, 3])}),
        ("targets", {"targets": torch.tensor([0, 1 << 40, 2, 3])}),
        ("hidden or weight", {"hidden": torch.full((4, 3), math.nan)}),
        ("hidden or weight", {"weight": torch.full((5, 3), math.inf)}),
        ("impl", {"hidden": torch.randn(4, 3).double(), "weight": torch.randn(5, 3).double()}),
    ],
)
@pytest.mark.usefixtures("small_tiles", "both_ways")
def test_triton_bad_argument_is_named(argument: str, changes: Problem) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        linear_policy_loss(**{**problem(4, 3, 5, dtype=torch.float32), "impl": "triton", **changes})


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, -4.0, 0.0, math.nan])
def test_triton_scales_a_gradient_as_a_number_does(dtype: torch.dtype, factor: float) -> None:
    """A factor that only the GPU knows must not be rounded to the gradient's dtype."""
    triton_head = importlib.import_module("balcaprl.kernels.head.triton")
    values = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.float().mul(torch.tensor(factor)).to(dtype)
    with overridden("_head_scale_kernel", BLOCK=16):
        actual = triton_head.scale_(values, torch.tensor(factor))
    assert actual is values
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles")
def test_triton_takes_all_tokens_without_waiting_for_their_number() -> None:
    """As on a GPU on-policy, where the number of tokens with a gradient is not waited for."""
    chunks = importlib.import_module("balcaprl.kernels.head.triton_chunks")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 7, generator=generator) for n in (17, 33))
    head = chunks.Head(hidden, weight, torch.randint(0, 33, (17,), generator=generator), 1.0)
    upstream = torch.randn(17, generator=generator)
    upstream[::3] = 0.0
    results = [
        chunks.logprobs_and_gradients(head, lambda _, a, b: upstream[a:b], (True, True), 4, listed=listed)[1]
        for listed in (True, False)
    ]
    for some, every in zip(*results, strict=True):
        torch.testing.assert_close(some, every)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles")
def test_triton_no_tokens() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    rollouts = (torch.zeros(2), torch.zeros(3).int())
    result = linear_policy_loss(torch.zeros(0, 3), weight, none, None, *rollouts, impl="triton")
    result.loss.backward()
    assert weight.grad is not None
    assert not weight.grad.any()


# Bad input.

GOOD = problem(4, 3, 5, dtype=torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("hidden", {"hidden": torch.randn(1, 4, 3)}),
        ("hidden", {"hidden": torch.ones(4, 3, dtype=torch.int64)}),
        ("weight", {"weight": torch.randn(5, 4)}),
        ("weight", {"weight": torch.randn(5, 3, dtype=torch.float64)}),
        ("weight", {"weight": torch.empty(5, 3, device="meta")}),
        ("targets", {"targets": GOOD["targets"][:3]}),
        ("targets", {"targets": GOOD["targets"].int()}),
        ("targets", {"targets": torch.tensor([0, 1, 2, 5])}),
        ("targets", {"targets": torch.tensor([0, -1, 2, 3])}),
        ("targets", {"targets": torch.tensor([0, 1 << 40, 2, 3])}),
        ("old_logprobs", {"old_logprobs": torch.zeros(3)}),
        ("old_logprobs", {"old_logprobs": torch.full((4,), math.nan)}),
        ("advantages", {"advantages": torch.zeros(2, 1)}),
        ("advantages", {"advantages": torch.tensor([1.0, math.inf])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4])}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 4]).int()}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, -1, 4]).int()}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 3]).int()}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 2**31 - 1]).int()}),
        ("temperature", {"temperature": 0.0}),
        ("filter_eps", {"filter_eps": 0.0}),
        ("filter_eps", {"filter_eps": 1.5}),
        ("filter_eps", {"filter_eps": math.nan}),
        ("clip_low", {"clip_low": -0.1}),
        ("kl_coef", {"kl_coef": -1.0}),
        ("reduction", {"reduction": "sum"}),
        ("normalizer", {"normalizer": 0.0}),
        ("impl", {"impl": "cuda"}),
        ("hidden or weight", {"hidden": torch.full((4, 3), math.nan)}),
        ("hidden or weight", {"weight": torch.full((5, 3), math.inf)}),
        ("hidden or weight", {"hidden": torch.full((4, 3), 1e30), "weight": torch.full((5, 3), 1e30)}),
    ],
)
def test_bad_argument_is_named(impl: str, argument: str, changes: Problem) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        linear_policy_loss(**{**GOOD, "impl": impl, **changes})


def test_native_has_no_float64() -> None:
    with pytest.raises(ValueError, match=r"^impl: 'native' has no float64"):
        linear_policy_loss(**cast(GOOD, torch.float64), impl="native")


# Registration.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filter_eps", [None, 0.05])
def test_opcheck(impl: str, filter_eps: float | None) -> None:
    data = problem(9, 4, 11, dtype=torch.float32)
    loss_arguments = (0.2, 0.2, None, None, data["reference_logprobs"], 0.1, "token-mean", None)
    arguments = (
        *(data[name] for name in ("hidden", "weight", "targets", "old_logprobs", "advantages", "cu_seqlens")),
        *loss_arguments,
        0.9,
        filter_eps,
        True,
        True,
        impl,
    )
    torch.library.opcheck(torch.ops.balcaprl.linear_policy_loss.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_fullgraph_compile(impl: str) -> None:
    def step(hidden: Tensor, weight: Tensor, rest: Problem) -> Tensor:
        return linear_policy_loss(hidden * 2.0, weight, **rest, impl=impl).loss * 2.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for num_tokens in (4, 9, 13):
        data = problem(num_tokens, 4, 9, dtype=torch.float32)
        leaves = (data.pop("hidden"), data.pop("weight"))
        expected = torch.autograd.grad(step(*leaves, data), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, data), leaves), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logprobs_out_holds_the_log_probabilities_of_the_forward(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(33, 16, generator=generator).to(dtype)
    targets = torch.randint(0, 33, (7,), generator=generator)
    rollouts = (torch.tensor([1.0, -1.0]), torch.tensor([0, 3, 7], dtype=torch.int32))
    out = torch.full((7,), torch.nan)
    linear_policy_loss(hidden, weight, targets, None, *rollouts, temperature=0.7, logprobs_out=out).loss.backward()
    expected = linear_logprobs(hidden, weight, targets, temperature=0.7).logprobs
    torch.testing.assert_close(out, expected.detach().float())
    assert not out.requires_grad
    with pytest.raises(ValueError, match="logprobs_out: expected shape"):
        linear_policy_loss(hidden, weight, targets, None, *rollouts, logprobs_out=out[:3])
