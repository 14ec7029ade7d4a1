"""The flash-attn path of shared_prefix_attention, through stand-ins in plain PyTorch.

No GPU was there to run flash-attn itself. The stand-ins have the argument lists of FlashAttention 2 (2.7 to 2.8), 3 and
4 (their repository of August 2026) and its semantics of variable lengths: sequences by cumulated lengths, a causal mask
aligned to the last key, a backward that computes from the ``out`` and ``lse`` that it is given, results that are not
written (NaN) where a sequence has keys and no query or the reverse.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from balcaprl.kernels import SharedPrefixLayout, shared_prefix_attention
from balcaprl.kernels.shared_prefix import flash as shared_prefix_flash
from balcaprl.kernels.shared_prefix.attention import resolve_impl
from balcaprl.kernels.shared_prefix.reference import shared_prefix_attention_reference
from balcaprl.kernels.support import launch
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

# (prompt lengths, completion lengths of each group, query heads, key heads, head size)
CASES = [
    ([5], [[3, 4]], 2, 2, 16),
    ([5], [[0, 3, 0, 4]], 4, 1, 8),
    ([7], [[]], 2, 1, 64),
    ([9, 2], [[0, 0], []], 2, 2, 80),
    ([30, 3, 40], [[7, 20], [0], [5, 9, 6]], 3, 1, 96),
    ([2, 2, 2], [[1], [2, 2], [1, 1, 1]], 6, 2, 128),
    ([6, 8, 1], [[], [3, 2], [4]], 4, 2, 24),
]


# Semantics of the stand-ins.


def sequences_of(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.shape == cu_k.shape
    assert int(cu_q.diff().max()) == max_q
    assert int(cu_k.diff().max()) == max_k
    for index in range(len(cu_q) - 1):
        yield slice(int(cu_q[index]), int(cu_q[index + 1])), slice(int(cu_k[index]), int(cu_k[index + 1]))


def scores_of(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """(H, Q, K) in float64."""
    q, k = q.double().transpose(0, 1), k.double().transpose(0, 1)
    scores = q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(1, 2) * scale
    if causal:
        rows, columns = scores.shape[1:]
        scores.masked_fill_(torch.ones(rows, columns).tril(columns - rows) == 0, -torch.inf)
    return scores


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal) -> tuple[Tensor, Tensor]:
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.float64)
    for rows, keys in sequences_of(cu_q, cu_k, max_q, max_k):
        if rows.stop == rows.start or keys.stop == keys.start:
            continue
        scores = scores_of(q[rows], k[keys], scale, causal)
        values = v[keys].double().transpose(0, 1).repeat_interleave(q.shape[1] // v.shape[1], 0)
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))


def varlen_backward(g, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, scale, causal) -> None:
    assert lse.is_contiguous()
    for x in (dq, dk, dv):
        assert x.is_contiguous()
        x.fill_(torch.nan)
    repeats = q.shape[1] // k.shape[1]
    for rows, keys in sequences_of(cu_q, cu_k, max_q, max_k):
        if rows.stop == rows.start or keys.stop == keys.start:
            continue
        weights = (scores_of(q[rows], k[keys], scale, causal) - lse[:, rows, None].double()).exp()
        grad, queries, o = (x[rows].double().transpose(0, 1) for x in (g, q, out))
        ks, vs = (x[keys].double().transpose(0, 1).repeat_interleave(repeats, 0) for x in (k, v))
        grad_scores = weights * (grad @ vs.transpose(1, 2) - (grad * o).sum(-1, keepdim=True)) * scale
        parts = (grad_scores @ ks, grad_scores.transpose(1, 2) @ queries, weights.transpose(1, 2) @ grad)
        for x, part, where in zip((dq, dk, dv), parts, (rows, keys, keys), strict=True):
            x[where] = part.unflatten(0, (x.shape[1], -1)).sum(1).transpose(0, 1).to(x.dtype)


# The argument lists of the three versions.


def version_2() -> types.SimpleNamespace:
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = varlen_forward(q, k, v, *lengths, softmax_scale, causal)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        assert deterministic is True
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *lengths, softmax_scale, causal)
        return torch.empty(0)

    return types.SimpleNamespace(**locals())


def version_3() -> types.SimpleNamespace:
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = varlen_forward(q, k, v, *lengths, softmax_scale, causal)
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert deterministic is True
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *lengths, softmax_scale, is_causal)
        return torch.empty(0)

    return types.SimpleNamespace(**locals())


def version_4() -> types.SimpleNamespace:
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert return_lse is True
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *varlen_forward(q, k, v, *lengths, softmax_scale, causal), None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert deterministic is True
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        varlen_backward(dout, q, k, v, out, lse, *gradients, *lengths, softmax_scale, causal)
        return gradients

    return types.SimpleNamespace(**locals())


STAND_INS = {2: version_2, 3: version_3, 4: version_4}


@pytest.fixture(params=STAND_INS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The path runs on CPU tensors of any dtype through one version's stand-in."""
    adapted = shared_prefix_flash._ADAPTERS[request.param](STAND_INS[request.param]())
    monkeypatch.setattr(shared_prefix_flash, "_library_for", lambda _: adapted)
    return request.param


def make_inputs(case: tuple, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor, SharedPrefixLayout]:
    prompts, completions, num_heads, num_kv_heads, head_dim = case
    layout = SharedPrefixLayout.from_lengths(prompts, completions)
    generator = torch.Generator().manual_seed(layout.num_tokens + 10_000 * seed)
    shapes = [(layout.num_tokens, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    values = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in values[:3]], values[3], layout


def run(function, inputs: list[Tensor], grad_out: Tensor, layout: SharedPrefixLayout, **options) -> list[Tensor]:
    out = function(*inputs, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_specification_in_double_precision(case: tuple) -> None:
    """The joining and the shares of the backward are exact, not approximations."""
    exact = run(shared_prefix_attention_reference, *make_inputs(case, torch.float64))
    actual = run(shared_prefix_attention, *make_inputs(case, torch.float64), impl="flash")
    for name, a, e in zip(("out", "query", "key", "value"), actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_the_specification(case: tuple, dtype: torch.dtype) -> None:
    def compared(seed: int) -> Iterator[Compared]:
        exact = run(shared_prefix_attention_reference, *make_inputs(case, torch.float64, seed))
        working = run(shared_prefix_attention_reference, *make_inputs(case, dtype, seed))
        actual = run(shared_prefix_attention, *make_inputs(case, dtype, seed), impl="flash")
        assert all(a.dtype == dtype for a in actual)
        yield Compared("out", actual[0], working[0], exact[0])
        gradients = (torch.cat([g.flatten() for g in each[1:]]) for each in (actual, working, exact))
        yield Compared("gradients", *gradients, "gradient")

    assert_as_accurate_over(compared, num_problems=2)


@pytest.mark.usefixtures("library")
def test_strides_and_scale() -> None:
    inputs, grad_out, layout = make_inputs(CASES[4], torch.float64)
    expected = run(shared_prefix_attention_reference, inputs, grad_out, layout, scale=0.3)
    columns_apart = [x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for x in inputs]
    actual = run(
        shared_prefix_attention, columns_apart, grad_out[:, :1].expand_as(grad_out), layout, scale=0.3, impl="flash"
    )
    expected_grad = run(
        shared_prefix_attention_reference, inputs, grad_out[:, :1].expand_as(grad_out), layout, scale=0.3
    )
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    for a, e in zip(actual[1:], expected_grad[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("library")
def test_opcheck_and_full_graph_compilation() -> None:
    inputs, grad_out, layout = make_inputs(CASES[4], torch.float32)
    torch.library.opcheck(torch.ops.balcaprl.shared_prefix_attention.default, (*inputs, layout.tensors(), 0.3, "flash"))

    def attention(query: Tensor, key: Tensor, value: Tensor, each: SharedPrefixLayout) -> Tensor:
        return shared_prefix_attention(query, key, value, each, impl="flash")

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = run(attention, inputs, grad_out, layout)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, inputs, grad_out, layout), eager, strict=True))


# Which version is taken, and what is refused.


@pytest.mark.parametrize(
    ("major", "versions", "taken"),
    [(8, (2, 3, 4), 2), (9, (2, 3, 4), 3), (9, (2, 4), 4), (9, (2,), 2), (10, (2, 3, 4), 4), (12, (2,), 2)],
)
def test_the_best_installed_version_is_taken(
    major: int, versions: tuple[int, ...], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, name in shared_prefix_flash.MODULES.items():
        # None in sys.modules: the import fails as for a package that is not there.
        monkeypatch.setitem(sys.modules, name, STAND_INS[version]() if version in versions else None)
    adapters = {version: lambda module, version=version: version for version in STAND_INS}
    monkeypatch.setattr(shared_prefix_flash, "_ADAPTERS", adapters)
    shared_prefix_flash.installed.cache_clear()
    try:
        assert shared_prefix_flash.installed(major) == taken
    finally:
        shared_prefix_flash.installed.cache_clear()


def test_missing_and_old_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shared_prefix_flash.MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=r"^impl: 'flash' needs FlashAttention; for sm_9x none of flash_attn_interface"
    ):
        shared_prefix_flash.installed(9)

    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal):
        raise AssertionError("not called")

    with pytest.raises(ValueError, match=r"^impl: 'flash' needs flash-attn 2\.7 or later"):
        shared_prefix_flash._version_2(types.SimpleNamespace(_flash_attn_varlen_forward=old))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 2, 8), torch.bfloat16, "impl: 'flash' runs on CUDA tensors, query is on cpu"),
        ((4, 2, 8), torch.float32, "impl: 'flash' runs on CUDA tensors"),
    ],
)
def test_tensors_that_it_does_not_take(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    x = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(x, x, x, SharedPrefixLayout.from_lengths([2], [[1, 1]]), impl="flash")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 2, 8), torch.float32, "impl: 'flash' has bfloat16 and float16, not torch.float32"),
        ((4, 2, 12), torch.float16, "query: impl 'flash' has head sizes that are multiples of 8 up to 256, not 12"),
        ((4, 2, 264), torch.float16, "query: impl 'flash' has head sizes"),
    ],
)
def test_tensors_on_a_gpu_that_it_does_not_take(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    on_gpu = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), dtype=dtype, shape=shape)
    with pytest.raises(ValueError, match=message):
        shared_prefix_flash._library_for(on_gpu)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "has_triton", "has_flash", "expected"),
    [
        (128, torch.bfloat16, True, True, "triton"),
        (128, torch.float32, True, False, "triton"),
        (256, torch.bfloat16, True, True, "flash"),
        (128, torch.bfloat16, False, True, "flash"),
        (256, torch.bfloat16, True, False, "reference"),
        (128, torch.float32, False, True, "reference"),
        (128, torch.float64, True, True, "reference"),
    ],
)
def test_what_auto_takes_on_a_gpu(
    head_dim: int,
    dtype: torch.dtype,
    has_triton: bool,
    has_flash: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def installed(major: int) -> object:
        if not has_flash:
            raise ValueError("impl: none is installed")
        return object()

    monkeypatch.setattr(launch, "has_triton", lambda: has_triton)
    monkeypatch.setattr(shared_prefix_flash, "installed", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    on_gpu = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), dtype=dtype, shape=(4, 2, head_dim))
    assert resolve_impl("auto", on_gpu) == expected  # type: ignore[arg-type]
