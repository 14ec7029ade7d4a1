"""The library's softmax epilogues: exp and conversions at every instruction set, compaction, strides, threads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from balcaprl.kernels.support import native
from balcaprl.kernels.support.native_softmax import (
    DTYPES,
    SoftmaxRows,
    Tokens,
    gathered_gradient,
    marked_columns,
    write_gradient,
    write_stats,
)


def tokens_of(logits: Tensor, scale: float, seed: int = 0) -> Tokens:
    """Random targets and gradients for rows of logits, with their statistics written."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = logits.shape[0]
    targets = torch.randint(0, logits.shape[1], (num_tokens,), generator=generator)
    rows = SoftmaxRows.empty(num_tokens)
    write_stats(logits, targets, scale, rows, None)
    gradient = torch.randn(num_tokens, generator=generator)
    return Tokens(torch.empty(num_tokens, 0), targets, rows, gradient)


def exact_gradient(logits: Tensor, tokens: Tokens, scale: float) -> Tensor:
    softmax = (logits.double() * scale).softmax(dim=-1)
    one_hot = torch.nn.functional.one_hot(tokens.targets, logits.shape[1])
    return tokens.grad_logprobs.double()[:, None] * scale * (one_hot - softmax)


def native_exp(x: Tensor) -> Tensor:
    """The library's exp: the gradient of a row whose maximum is 0 and whose sum is 1."""
    logits = x.clone()[None]
    # No row has its target here: the columns are said to begin behind it.
    tokens = Tokens(
        torch.empty(1, 0), torch.tensor([0]), SoftmaxRows(*torch.tensor([[0.0], [1.0], [0.0]])), -torch.ones(1)
    )
    write_gradient(logits, 1, torch.tensor([0]), tokens, 1.0)
    return logits[0]


def test_exp_is_within_two_units_in_the_last_place(level: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-104, 88.7, 200_001), torch.randn(50_001, generator=generator), torch.zeros(1)])
    exact = x.double().exp()
    spacing = torch.finfo(torch.float32).eps * 2.0 ** exact.log2().floor().clamp(min=-126)
    units = (native_exp(x).double() - exact).abs() / spacing
    assert units.max() <= 2.0
    assert native_exp(torch.zeros(3)).tolist() == [1.0] * 3


def test_exp_of_what_is_not_finite(level: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 89.0, -120.0, 1e30, -1e30])
    assert str(native_exp(x).tolist()) == str([math.inf, 0.0, math.nan, math.inf, 0.0, math.inf, 0.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_those_of_torch(level: str, dtype: torch.dtype) -> None:
    """All 65536 bit patterns in: the maximum of a row of one. Products out, through the target's column."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = SoftmaxRows.empty(2**16)
    write_stats(values[:, None], torch.zeros(2**16, dtype=torch.int64), 1.0, rows, None)
    finite = values.isfinite()
    assert torch.equal(rows.max[finite], values[finite].float())
    assert not rows.logprobs[~finite].isfinite().any()
    # exp(logit) * coefficient, stored: roundings of many magnitudes, subnormal and too large ones too.
    coefficients = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.linspace(-30, 20, 4096)
    out = torch.zeros(4096, 1, dtype=dtype)
    ones = SoftmaxRows(torch.zeros(4096), torch.ones(4096), torch.zeros(4096))
    tokens = Tokens(torch.empty(4096, 0), torch.zeros(4096, dtype=torch.int64), ones, -coefficients)
    write_gradient(out, 1, torch.arange(4096), tokens, 1.0)
    assert torch.equal(out[:, 0], coefficients.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 7, 16, 31, 64, 65, 1000, 1023, 1025, 5003])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_statistics_and_gradient(level: str, dtype: torch.dtype, vocabulary: int, scale: float) -> None:
    logits = (4.0 * torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(vocabulary))).to(dtype)
    log_softmax = (logits.double() * scale).log_softmax(dim=-1)
    tokens = tokens_of(logits, scale)
    entropy = torch.empty(9)
    write_stats(logits, tokens.targets, scale, tokens.rows, entropy)
    expected = log_softmax.gather(1, tokens.targets[:, None])[:, 0]
    torch.testing.assert_close(tokens.rows.logprobs.double(), expected, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(log_softmax.exp() * log_softmax).sum(-1), rtol=1e-6, atol=2e-6)
    gradient = exact_gradient(logits, tokens, scale)
    write_gradient(logits, 0, torch.arange(9), tokens, scale)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), gradient, rtol=max(eps, 2e-6), atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("active", [[0], [8], [1, 2, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_rows_and_columns_that_are_left_out(level: str, dtype: torch.dtype, active: list[int]) -> None:
    rows = torch.tensor(active)
    logits = (4.0 * torch.randn(9, 2100, generator=torch.Generator().manual_seed(1))).to(dtype)
    tokens = tokens_of(logits, 1.3)
    softmax = (logits.double() * 1.3).softmax(dim=-1)
    columns = marked_columns(logits, rows, tokens, 1.3, 0.01)
    wanted = (softmax[rows] >= 0.01).any(dim=0)
    wanted[tokens.targets[rows]] = True
    assert torch.equal(columns, wanted.nonzero()[:, 0])
    gathered = gathered_gradient(logits, rows, columns, tokens, 1.3)
    write_gradient(logits, 0, rows, tokens, 1.3)
    assert torch.equal(gathered, logits[: rows.shape[0], columns])


def test_part_of_the_vocabulary_and_strides(level: str) -> None:
    whole = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    tokens = tokens_of(whole, 1.0)
    part = whole[:, 20:47].clone()
    strided = torch.full((5, 100), math.nan)
    strided[:, 3:67] = whole
    view = strided[:, 3:67]
    expected = whole.clone()
    write_gradient(expected, 0, torch.arange(5), tokens, 1.0)
    write_gradient(part, 20, torch.arange(5), tokens, 1.0)
    write_gradient(view, 0, torch.arange(5), tokens, 1.0)
    torch.testing.assert_close(part, expected[:, 20:47], rtol=0.0, atol=0.0)
    assert torch.equal(view, expected)
    assert strided[:, :3].isnan().all()
    assert strided[:, 67:].isnan().all()


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^31 + 8 values apart; memory is only touched, and so only taken, where the rows are."""
    vocabulary, stride = 300, 2**31 + 8
    storage = torch.empty(stride + vocabulary, dtype=torch.bfloat16)
    far = storage.as_strided((2, vocabulary), (stride, 1))
    far.copy_(torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(3)))
    near = far.clone(memory_format=torch.contiguous_format)
    tokens, expected = tokens_of(far, 1.0), tokens_of(near, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tokens.rows, expected.rows, strict=True))
    write_gradient(near, 0, torch.tensor([1]), expected, 1.0)
    write_gradient(far, 0, torch.tensor([1]), tokens, 1.0)
    assert torch.equal(far[0], near[0])


def test_thread_count_does_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits = torch.randn(100, 5000, generator=torch.Generator().manual_seed(4))
            tokens = tokens_of(logits, 1.0)
            columns = marked_columns(logits, torch.arange(0, 100, 3), tokens, 1.0, 1e-3)
            gathered = gathered_gradient(logits, torch.arange(0, 100, 3), columns, tokens, 1.0)
            write_gradient(logits, 0, torch.arange(0, 100, 3), tokens, 1.0)
            results.append((*tokens.rows, columns, gathered, logits[:34]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_targets_out_of_range_are_refused() -> None:
    for target in (-1, 4, 1 << 60):
        with pytest.raises(ValueError, match=r"^targets: "):
            write_stats(torch.zeros(1, 4), torch.tensor([target]), 1.0, SoftmaxRows.empty(1), None)


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^level: "):
        native.set_simd_level("avx1024")
