"""linear_logprobs: against log_softmax of whole logits, gradients, chunks and memory, bad input, registration."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from balcaprl.kernels import LogProbs, linear_logprobs
from balcaprl.kernels.linear_logprobs import chunk_ranges, linear_logprobs_reference
from balcaprl.kernels.testing import assert_as_accurate


def problem(
    num_tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + vocabulary)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> LogProbs:
    """The definition, with all logits at once."""
    log_softmax = ((hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature).log_softmax(
        -1
    )
    entropy = torch.distributions.Categorical(logits=log_softmax.detach()).entropy()
    return LogProbs(log_softmax.gather(1, targets[:, None])[:, 0], entropy)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens a chunk, so that small problems have several and a ragged last one."""
    monkeypatch.setattr(sys.modules["balcaprl.kernels.linear_logprobs"], "_MAX_CHUNK_TOKENS", 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("function", [linear_logprobs, linear_logprobs_reference])
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_whole_logits(function, num_tokens: int, temperature: float) -> None:
    hidden, weight, targets = problem(num_tokens, 5, 11)
    upstream = torch.linspace(-1, 2, num_tokens, dtype=torch.float64)
    expected = whole_logits(hidden, weight, targets, temperature)
    expected_gradients = torch.autograd.grad((expected.logprobs * upstream).sum(), (hidden, weight))
    actual = function(hidden, weight, targets, temperature=temperature)
    gradients = torch.autograd.grad((actual.logprobs * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(actual.logprobs, expected.logprobs)
    torch.testing.assert_close(actual.entropy, expected.entropy)
    torch.testing.assert_close(gradients, expected_gradients)
    assert not actual.entropy.requires_grad


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("function", [linear_logprobs, linear_logprobs_reference])
def test_gradcheck(function) -> None:
    hidden, weight, targets = problem(7, 4, 9)
    torch.autograd.gradcheck(lambda h, w: function(h, w, targets, temperature=0.8).logprobs, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 7), (33, 16, 301), (130, 24, 1000)])
def test_as_accurate_as_the_whole_logits_in_the_working_dtype(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    results, gradients = [], []
    for function, precision in ((linear_logprobs, dtype), (whole_logits, dtype), (whole_logits, torch.float64)):
        hidden, weight, targets = problem(*shape, dtype)
        hidden, weight = (x.detach().to(precision).requires_grad_() for x in (hidden, weight))
        results.append(function(hidden, weight, targets))
        gradients.append(torch.autograd.grad(results[-1].logprobs.sum(), (hidden, weight)))
    for name, *values in zip(LogProbs._fields, *results, strict=True):
        assert_as_accurate(*(v.detach() for v in values), name=name)
    for name, *values in zip(("hidden", "weight"), *gradients, strict=True):
        assert values[0].dtype == dtype
        assert_as_accurate(*values, kind="gradient", name=name)


def test_only_the_gradients_that_are_asked_for() -> None:
    hidden, weight, targets = problem(4, 3, 5)
    linear_logprobs(hidden, weight.detach(), targets).logprobs.sum().backward()
    assert hidden.grad is not None
    linear_logprobs(hidden.detach(), weight, targets).logprobs.sum().backward()
    assert weight.grad is not None


def test_zero_gradient_of_a_token_is_zero_for_its_hidden_state() -> None:
    hidden, weight, targets = problem(4, 3, 5)
    linear_logprobs(hidden, weight, targets).logprobs[:2].sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[2:], torch.zeros(2, 3, dtype=torch.float64))
    assert hidden.grad[:2].abs().min() > 0


def test_no_tokens() -> None:
    hidden, weight, targets = problem(0, 3, 5)
    result = linear_logprobs(hidden, weight, targets)
    assert result.logprobs.shape == result.entropy.shape == (0,)
    result.logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_confident_and_uniform_distributions() -> None:
    weight = torch.eye(4)
    hidden = torch.tensor([[200.0, 0, 0, 0], [0, 0, 0, 0]])
    result = linear_logprobs(hidden, weight, torch.tensor([1, 2]))
    torch.testing.assert_close(result.logprobs, torch.tensor([-200.0, -math.log(4)]))
    torch.testing.assert_close(result.entropy, torch.tensor([0.0, math.log(4)]))


def test_same_input_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        hidden, weight, targets = problem(40, 16, 300, torch.float32)
        logprobs = linear_logprobs(hidden, weight, targets).logprobs
        results.append((logprobs, *torch.autograd.grad(logprobs.sum(), (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chunks_cover_all_tokens_and_stay_small() -> None:
    for num_tokens, vocabulary in ((1, 2), (5000, 1000), (700, 152_064), (3, 1 << 25)):
        ranges = chunk_ranges(num_tokens, vocabulary)
        assert [t for begin, end in ranges for t in range(begin, end)] == list(range(num_tokens))
        assert all((end - begin) * vocabulary <= 1 << 24 or end - begin == 1 for begin, end in ranges)


def test_whole_logits_are_never_stored(tmp_path) -> None:
    """With chunks of 4 MiB, 256 MiB of logits must cost far less than that."""
    script = """
import resource, sys, torch
from balcaprl.kernels import linear_logprobs
sys.modules["balcaprl.kernels.linear_logprobs"]._MAX_CHUNK_LOGITS = 1 << 20
def run(num_tokens):
    hidden, weight = torch.randn(num_tokens, 8, requires_grad=True), torch.randn(32768, 8, requires_grad=True)
    targets = torch.randint(0, 32768, (num_tokens,))
    linear_logprobs(hidden, weight, targets).logprobs.sum().backward()
run(64)  # what torch itself allocates once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(2048)
grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown_kib < 64 * 1024, f"{grown_kib} KiB"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=300)


HIDDEN, WEIGHT, TARGETS = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])


@pytest.mark.parametrize(
    ("argument", "arguments", "options"),
    [
        ("hidden", (torch.randn(1, 4, 3), WEIGHT, TARGETS), {}),
        ("hidden", (torch.ones(4, 3, dtype=torch.int64), WEIGHT, TARGETS), {}),
        ("weight", (HIDDEN, torch.randn(5, 4), TARGETS), {}),
        ("weight", (HIDDEN, WEIGHT.double(), TARGETS), {}),
        ("weight", (HIDDEN, torch.empty(5, 3, device="meta"), TARGETS), {}),
        ("targets", (HIDDEN, WEIGHT, TARGETS[:3]), {}),
        ("targets", (HIDDEN, WEIGHT, TARGETS.int()), {}),
        ("targets", (HIDDEN, WEIGHT, TARGETS + 1), {}),
        ("targets", (HIDDEN, WEIGHT, TARGETS - 1), {}),
        ("temperature", (HIDDEN, WEIGHT, TARGETS), {"temperature": 0.0}),
        ("temperature", (HIDDEN, WEIGHT, TARGETS), {"temperature": math.nan}),
        ("impl", (HIDDEN, WEIGHT, TARGETS), {"impl": "cuda"}),
        ("impl", (HIDDEN.double(), WEIGHT.double(), TARGETS), {"impl": "native"}),
        ("hidden or weight", (HIDDEN * math.nan, WEIGHT, TARGETS), {}),
        ("hidden or weight", (HIDDEN, WEIGHT * math.inf, TARGETS), {}),
    ],
)
def test_bad_argument_is_named(argument: str, arguments: tuple, options: dict) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        linear_logprobs(*arguments, **options)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_opcheck(impl: str) -> None:
    hidden, weight, targets = problem(6, 4, 9, torch.float32)
    torch.library.opcheck(torch.ops.balcaprl.linear_logprobs.default, (hidden, weight, targets, 0.9, impl))
    detached = (hidden.detach(), weight.detach(), targets)
    logprobs, _, row_max, row_sum = torch.ops.balcaprl.linear_logprobs(*detached, 0.9, impl)
    arguments = (torch.randn(6), *detached, logprobs, row_max, row_sum, 0.9, None, True, True, impl)
    torch.library.opcheck(torch.ops.balcaprl.linear_logprobs_backward.default, arguments)


def test_fullgraph_compile() -> None:
    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_logprobs(hidden * 2.0, weight, targets, temperature=0.9).logprobs * 2.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for num_tokens in (4, 9, 13):
        hidden, weight, targets = problem(num_tokens, 4, 9)
        expected = torch.autograd.grad(step(hidden, weight, targets).sum(), (hidden, weight))
        actual = torch.autograd.grad(compiled(hidden, weight, targets).sum(), (hidden, weight))
        torch.testing.assert_close(actual, expected)
