"""On a GPU, with tensors there and the launch tables as they are: against the float64 reference, and what a trainer relies on.

Edge cases are the interpreter's; ``conftest.py`` runs those tests on a GPU too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from balcaprl.kernels import (
    SharedPrefixLayout,
    adamw_update,
    grouped_advantages,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    shared_prefix_attention,
)
from balcaprl.kernels.adamw.records import AdamWSettings, AdamWTensors
from balcaprl.kernels.shared_prefix.reference import shared_prefix_attention_reference
from balcaprl.kernels.support import deferred
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over
from balcaprl.kernels.support.upload import upload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64, 100), (300, 256, 5000), (513, 896, 32_768), (130, 100, 1031)]


def ragged(num_tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Per-token inputs beside the log-probabilities of 8 completions; every fourth has advantage 0."""
    cuts = torch.randint(0, num_tokens + 1, (7,), generator=generator).sort().values
    advantages = torch.randn(8, generator=generator)
    advantages[::4] = 0.0
    return {
        "advantages": advantages,
        "cu_seqlens": torch.cat([torch.tensor([0]), cuts, torch.tensor([num_tokens])]).int(),
    }


def head(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the head's ops on the CPU; ratios lie away from the clip's bounds, on both sides."""
    num_tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(num_tokens + 10_000 * seed)
    weight = (torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)).to(dtype)
    hidden = torch.randn(num_tokens, width, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    logprobs = linear_logprobs(hidden.double(), weight.double(), targets, impl="reference").logprobs
    steps = torch.tensor([-0.6, 0.0, 0.6])[torch.randint(0, 3, (num_tokens,), generator=generator)]
    made = {"hidden": hidden, "weight": weight, "targets": targets, "old_logprobs": (logprobs + steps).float()}
    return {**made, **ragged(num_tokens, generator)}


def on_gpu(made: dict[str, Tensor], leaves: tuple[str, ...], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same on the GPU; leaves in ``dtype`` and with a gradient."""
    moved = {name: value.cuda() for name, value in made.items()}
    for name in leaves:
        moved[name] = moved[name].to(dtype or moved[name].dtype).requires_grad_()
    return moved


def outputs(
    function: Callable[..., Any], made: dict[str, Tensor], leaves: tuple[str, ...], **options: Any
) -> list[Tensor]:
    """Loss, then gradients."""
    loss = function(**made, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, [made[name] for name in leaves])]


def check(function: Callable[..., Any], make: Callable[[int], dict[str, Tensor]], leaves: tuple[str, ...]) -> None:
    """``auto`` against the reference in float64 and in the working dtype; and the same bits again. ``make`` takes a seed."""

    def compared(seed: int) -> Iterator[Compared]:
        made = make(seed)
        first, second = (outputs(function, on_gpu(made, leaves), leaves) for _ in range(2))
        working = outputs(function, on_gpu(made, leaves), leaves, impl="reference")
        exact = outputs(function, on_gpu(made, leaves, torch.float64), leaves, impl="reference")
        for name, actual, plain, wanted, again in zip(("loss", *leaves), first, working, exact, second, strict=True):
            assert torch.equal(actual, again), name
            # The loss is a sum of terms of a size of about 1 and of both signs.
            kind, scale = ("forward", 1.0) if name == "loss" else ("gradient", 0.0)
            yield Compared(name, actual, plain, wanted.double(), kind, scale)

    assert_as_accurate_over(compared, num_problems=2, most=32)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_policy_loss(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(linear_policy_loss, lambda seed: head(shape, dtype, seed), ("hidden", "weight"))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_logprobs_and_entropy(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    def compared(seed: int) -> Iterator[Compared]:
        made = {k: v for k, v in head(shape, dtype, seed).items() if k in ("hidden", "weight", "targets")}
        upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(seed)).cuda()
        results = []
        for impl, wanted in (("auto", dtype), ("reference", dtype), ("reference", torch.float64)):
            moved = on_gpu(made, ("hidden", "weight"), wanted)
            logprobs, entropy = linear_logprobs(**moved, impl=impl)
            loss = (logprobs * upstream.to(logprobs)).sum()
            results.append([logprobs.detach(), entropy, *torch.autograd.grad(loss, (moved["hidden"], moved["weight"]))])
        names = ("logprobs", "entropy", "hidden", "weight")
        for index, (name, *values) in enumerate(zip(names, *results, strict=True)):
            yield Compared(name, *values, "forward" if index < 2 else "gradient")

    assert_as_accurate_over(compared, num_problems=2, most=32)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(1, 100), (300, 5000), (257, 32_064)])
def test_logits_policy_loss(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(vocabulary + 100_000 * seed)
        logits = (2.0 * torch.randn(num_tokens, vocabulary, generator=generator)).to(dtype)
        targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
        old = logits.double().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].float()
        steps = torch.tensor([-0.6, 0.0, 0.6])[torch.randint(0, 3, (num_tokens,), generator=generator)]
        return {"logits": logits, "targets": targets, "old_logprobs": old + steps, **ragged(num_tokens, generator)}

    check(logits_policy_loss, make, ("logits",))


@pytest.mark.parametrize("num_tokens", [1, 1000, 200_000])
def test_policy_loss(num_tokens: int) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(num_tokens + 1_000_000 * seed)
        logprobs = -3.0 * torch.rand(num_tokens, generator=generator)
        steps = torch.tensor([-0.6, 0.0, 0.6])[torch.randint(0, 3, (num_tokens,), generator=generator)]
        return {"logprobs": logprobs, "old_logprobs": logprobs + steps, **ragged(num_tokens, generator)}

    check(policy_loss, make, ("logprobs",))


@pytest.mark.parametrize("method", ["c-gdpo", "gdpo", "grpo"])
def test_grouped_advantages(method: str) -> None:
    rewards = torch.rand(512 * 8, 3, generator=torch.Generator().manual_seed(0))
    rewards[::7, 1], rewards[:8] = torch.nan, 0.5
    exact = grouped_advantages(rewards.double().cuda(), 8, method=method, impl="reference")
    actual = grouped_advantages(rewards.cuda(), 8, method=method)
    torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(16, 2, 128), (8, 2, 64), (4, 4, 80)])
def test_shared_prefix_attention(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    layout = SharedPrefixLayout.from_lengths([281, 70], [[64, 33, 128, 1], [100, 20]], device="cuda")
    shapes = [(layout.num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]

    def compared(seed: int) -> Iterator[Compared]:
        generator = torch.Generator().manual_seed(head_dim + 1000 * seed)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        results = []
        for function, wanted in (
            (shared_prefix_attention, dtype),
            (shared_prefix_attention_reference, dtype),
            (shared_prefix_attention_reference, torch.float64),
        ):
            *inputs, upstream = (value.to("cuda", wanted) for value in values)
            inputs = [x.requires_grad_() for x in inputs]
            out = function(*inputs, layout)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
        for index, (name, *each) in enumerate(zip(("out", "query", "key", "value"), *results, strict=True)):
            yield Compared(name, *each, "forward" if index == 0 else "gradient")

    assert_as_accurate_over(compared, num_problems=2, most=32)


def test_compiled_as_one_graph() -> None:
    made = head((300, 256, 5000), torch.bfloat16)
    leaves = ("hidden", "weight")
    compiled = torch.compile(linear_policy_loss, fullgraph=True)
    expected = outputs(linear_policy_loss, on_gpu(made, leaves), leaves)
    actual = outputs(compiled, on_gpu(made, leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_autocast_casts_the_head() -> None:
    made, leaves = head((300, 256, 5000), torch.float32), ("hidden", "weight")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, *gradients = outputs(linear_policy_loss, on_gpu(made, leaves), leaves)
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = outputs(linear_policy_loss, on_gpu(made, leaves, torch.float64), leaves, impl="reference")
    assert (gradients[1] - exact[2]).norm() < 2e-2 * exact[2].norm()


@pytest.mark.parametrize("tokens", [8192, 65_536])
def test_memory_does_not_grow_with_tokens(tokens: int) -> None:
    """Forward and backward over 152,064 entries: the logits alone would take 2.3 or 18.6 GiB in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    vocabulary = 152_064
    hidden = torch.randn(tokens, 512, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, 512, generator=generator, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cuda")
    rollouts = (torch.ones(8, device="cuda"), torch.arange(0, tokens + 1, tokens // 8, device="cuda").int())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(hidden, weight, targets, None, *rollouts).loss.backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients < 1200 << 20


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_adamw_update(dtype: torch.dtype) -> None:
    """Five steps of tensors of many chunks, aligned and not; against torch's AdamW in float64, and the same bits again."""
    settings = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    sizes = [(1,), (333, 1000), (1 << 20,), (3, 5), (), (0,), (200_001,)]
    rows = sum(math.prod(size) + 3 for size in sizes)
    results = []
    for _ in range(2):
        generator = torch.Generator("cuda").manual_seed(0)
        whole = torch.randn(rows, device="cuda", generator=generator).to(dtype)
        parameters, begin = [], 0
        for size in sizes:  # views of one tensor, as a sampler's fused weights have them
            parameters.append(whole[begin : begin + math.prod(size)].view(size))
            begin += math.prod(size) + 3
        masters = [p if dtype == torch.float32 else p.float() for p in parameters]
        moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in masters]
        exact = [m.double().requires_grad_() for m in masters]
        adamw = torch.optim.AdamW(exact, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        for step in range(5):
            gradients = [torch.randn(size, device="cuda", generator=generator).to(dtype) for size in sizes]
            made = zip(parameters, masters, gradients, moments, strict=True)
            update = adamw_update([AdamWTensors(p, m, g, *pair, step) for p, m, g, pair in made], settings)
            update.apply()
            for weight, gradient in zip(exact, gradients, strict=True):
                weight.grad = gradient.double()
            wanted = torch.nn.utils.clip_grad_norm_(exact, 1.0)
            assert update.norms.gradient == pytest.approx(float(wanted), rel=1e-5)
            adamw.step()
        for parameter, master, weight in zip(parameters, masters, exact, strict=True):
            torch.testing.assert_close(master.double(), weight.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(parameter, master.to(dtype))
        results.append(whole.clone())
    assert torch.equal(results[0], results[1])


def without_old(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    return {**on_gpu(head(shape, torch.bfloat16), ("hidden", "weight")), "old_logprobs": None}


def test_the_host_waits_for_nothing() -> None:
    made = without_old((300, 256, 5000))
    linear_policy_loss(**made).loss.backward()  # compiles
    linear_logprobs(made["hidden"], made["weight"], made["targets"])
    deferred.raise_pending()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_policy_loss(**made).loss.backward()
        linear_logprobs(made["hidden"], made["weight"], made["targets"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    deferred.raise_pending()


@pytest.mark.parametrize("bad", ["targets", "advantages", "hidden or weight", "cu_seqlens"])
def test_an_invalid_value_gives_nan_and_a_late_error(bad: str) -> None:
    made = without_old((300, 256, 5000))
    values = {"targets": 5000, "advantages": math.nan, "hidden or weight": math.inf, "cu_seqlens": -1}
    with torch.no_grad():
        made[bad.split()[0]].view(-1)[3] = values[bad]
    loss = linear_policy_loss(**made).loss
    loss.backward()
    assert loss.isnan()
    assert made["weight"].grad.isnan().any()
    with pytest.raises(ValueError, match=f"^{bad}: "):
        deferred.raise_pending()
    linear_policy_loss(**made)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=f"^{bad}: "):
        linear_policy_loss(**without_old((300, 256, 5000)))
    deferred.raise_pending()


def test_an_upload_is_not_waited_for() -> None:
    tensors = [torch.arange(5), torch.arange(3).int(), torch.randn(4, 2).T, torch.arange(6).view(2, 3), torch.zeros(0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = upload([*tensors, torch.ones(2, device="cuda")], "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, copy in zip(tensors, moved, strict=False):
        assert copy.is_cuda
        assert torch.equal(copy.cpu(), tensor)
