"""linear_logprobs: against log_softmax of whole logits, gradients, chunks and memory, bad input, registration."""

from __future__ import annotations

import contextlib
import importlib
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from tile_sizes import overridden
from torch import Tensor

from balcaprl.kernels import LogProbs, linear_logprobs
from balcaprl.kernels.head.linear_logprobs import chunk_ranges, linear_logprobs_reference
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's own float32 product errs up to three times more on two threads at some shapes: no fault of the op's."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def problem(
    num_tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + vocabulary + 100_000 * seed)
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
    monkeypatch.setattr(sys.modules["balcaprl.kernels.head.linear_logprobs"], "_MAX_CHUNK_TOKENS", 3)


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


SHAPES = [(t, d, v) for t in (1, 3, 33, 130) for d, v in ((2, 3), (5, 17), (8, 64), (16, 301), (24, 1000), (31, 129))]
SHAPES += [(2, 9, 4097), (257, 3, 65), (513, 12, 33), (600, 7, 515), (7, 64, 1), (1, 1, 1), (19, 40, 2049), (64, 2, 31)]
SHAPES += [
    (130, 33, 1025),
    (300, 65, 100),
    (9, 128, 77),
    (5, 3, 10_007),
    (128, 16, 16),
    (129, 15, 15),
    (256, 1, 50),
    (11, 11, 11),
]
INTERPRETED = [(t, d, v) for t in (1, 5, 17, 40) for d, v in ((2, 3), (5, 17), (16, 31), (20, 64), (33, 75))]
INTERPRETED += [(t, d, v) for t in (2, 16, 31, 33) for d, v in ((1, 2), (7, 33), (15, 49), (17, 16), (34, 63))]
INTERPRETED += [(1, 1, 1), (64, 2, 5), (3, 65, 129)]


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_as_accurate_as_the_whole_logits_in_the_working_dtype(
    impl: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    check_accuracy(impl, dtype, shape)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", INTERPRETED, ids=lambda s: "x".join(map(str, s)))
def test_triton_is_as_accurate(
    dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_head = importlib.import_module("balcaprl.kernels.head.triton")
    monkeypatch.setattr(triton_head, "_SLICE_BYTES", 4000)
    monkeypatch.setattr(triton_head, "_WANTED_PROGRAMS", 6)
    with contextlib.ExitStack() as stack:
        for name in ("stats", "grad_logits", "grad_hidden", "grad_weight"):
            tiles = {"BLOCK_T": 16, "BLOCK_V": 16, "BLOCK_D": 16}
            stack.enter_context(overridden(f"_head_{name}_kernel", **tiles))
        check_accuracy("triton", dtype, shape, num_problems=4 if shape[0] < 10 or shape[1] == 1 else 1)


def check_accuracy(impl: str, dtype: torch.dtype, shape: tuple[int, int, int], num_problems: int = 4) -> None:
    """Values and gradients of several problems; some tokens have no gradient."""

    def compared(seed: int) -> Iterator[Compared]:
        hidden, weight, targets = problem(*shape, dtype, seed)
        upstream = torch.linspace(-1, 2, shape[0], dtype=torch.float64).clamp(min=0.0) + 0.5 * (shape[0] == 1)
        sides = []
        functions = (lambda *a: linear_logprobs(*a, impl=impl), whole_logits, whole_logits)
        for function, precision in zip(functions, (dtype, dtype, torch.float64), strict=True):
            leaves = [x.detach().to(precision).requires_grad_() for x in (hidden, weight)]
            result = function(*leaves, targets)
            gradients = torch.autograd.grad((result.logprobs * upstream.to(result.logprobs)).sum(), leaves)
            assert gradients[0].dtype == gradients[1].dtype == precision
            sides.append((*(x.detach() for x in result), *gradients))
        for index, (name, *values) in enumerate(zip((*LogProbs._fields, "hidden", "weight"), *sides, strict=True)):
            yield Compared(name, *values, "forward" if index < 2 else "gradient")

    assert_as_accurate_over(compared, num_problems=num_problems)


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
sys.modules["balcaprl.kernels.head.linear_logprobs"]._MAX_CHUNK_LOGITS = 1 << 20
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
