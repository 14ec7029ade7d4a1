"""Attention of packed groups: values and gradients against the float64 specification and against plain attention."""

import random

import pytest
import torch
import torch.nn.functional as F

from balcaprl.kernels import SharedPrefixLayout, shared_prefix_attention
from balcaprl.kernels.shared_prefix.reference import shared_prefix_attention_reference
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

# (prompt lengths, completion lengths of each group, query heads, key heads, head size)
HAND_PICKED = [
    ([5], [[3, 4]], 2, 2, 16),
    ([1], [[1]], 4, 1, 8),
    ([7], [[]], 2, 1, 64),
    ([9], [[0, 0]], 2, 2, 80),
    ([281], [[64, 1, 33, 0]], 4, 2, 64),
    ([130, 3, 300], [[70, 200], [0], [5, 90, 65]], 3, 1, 96),
    ([2, 2, 2], [[1], [2, 2], [1, 1, 1]], 6, 2, 128),
    ([17, 170], [[66, 300], [1, 0, 129]], 4, 4, 32),
]


def random_case(seed):
    rng = random.Random(seed)
    num_groups, num_kv_heads = rng.randint(1, 4), rng.choice([1, 2, 3])
    prompts = [rng.choice([1, 2, 17, 40, 150]) for _ in range(num_groups)]
    completions = [[rng.choice([0, 1, 2, 9, 30, 70]) for _ in range(rng.randint(0, 4))] for _ in range(num_groups)]
    return prompts, completions, num_kv_heads * rng.choice([1, 2, 4]), num_kv_heads, rng.choice([8, 20, 64])


CASES = [*HAND_PICKED, *(random_case(seed) for seed in range(40))]


def make_inputs(case, dtype, seed=0):
    """(query, key, value), gradient of the output, layout. Values are exact in bfloat16, so that all dtypes see them."""
    prompts, completions, num_heads, num_kv_heads, head_dim = case
    layout = SharedPrefixLayout.from_lengths(prompts, completions)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.num_tokens, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    values = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in values[:3]], values[3], layout


def run(function, inputs, grad_out, layout, **options):
    out = function(*inputs, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def plain_attention(query, key, value, prompts, completions):
    """Each completion as a sequence of its own, through PyTorch's attention; the prompt's output once."""
    repeats, outs, start = query.shape[1] // key.shape[1], [], 0
    for prompt, lengths in zip(prompts, completions, strict=True):
        head = torch.arange(start, start + prompt)
        place = start + prompt
        for index, length in enumerate([0, *lengths]):
            rows = torch.cat([head, torch.arange(place, place + length)])
            q, k, v = (x[rows].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1)
            outs.append(out if index == 0 else out[prompt:])
            place += length
        start = place
    return torch.cat(outs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_specification_is_plain_attention_of_each_sequence(case):
    inputs, grad_out, layout = make_inputs(case, torch.float64)
    actual = run(shared_prefix_attention_reference, inputs, grad_out, layout)
    expected = run(lambda q, k, v, _: plain_attention(q, k, v, *case[:2]), inputs, grad_out, layout)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_implementation_is_as_accurate_as_the_specification(case, dtype, impl):
    def compared(seed):
        exact = run(shared_prefix_attention_reference, *make_inputs(case, torch.float64, seed))
        inputs, grad_out, layout = make_inputs(case, dtype, seed)
        actual = run(shared_prefix_attention, inputs, grad_out, layout, impl=impl)
        assert all(a.dtype == dtype for a in actual)
        if dtype == torch.float64:
            for a, e in zip(actual, exact, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
            return
        working = run(shared_prefix_attention_reference, inputs, grad_out, layout)
        yield Compared("out", actual[0], working[0], exact[0])
        # The three gradients at once: where one is nearly 0 by cancellation, its own rounding alone says nothing.
        gradients = (torch.cat([g.flatten() for g in each[1:]]) for each in (actual, working, exact))
        yield Compared("gradients", *gradients, "gradient")

    assert_as_accurate_over(compared, num_problems=2)


def test_gradcheck_of_the_specification_and_of_sdpa():
    inputs, _, layout = make_inputs(([3, 2], [[2, 0, 1], [2]], 4, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda *x: shared_prefix_attention_reference(*x, layout), inputs)
    assert torch.autograd.gradcheck(lambda *x: shared_prefix_attention(*x, layout, impl="sdpa"), inputs)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_scale_strides_and_repetition(impl):
    inputs, grad_out, layout = make_inputs(HAND_PICKED[5], torch.float32)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    first = run(shared_prefix_attention, inputs, grad_out, layout, impl=impl, scale=0.3)
    again = run(shared_prefix_attention, strided, grad_out, layout, impl=impl, scale=0.3)
    expected = run(shared_prefix_attention_reference, inputs, grad_out, layout, scale=0.3)
    for a, b, e in zip(first, again, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)


def test_completions_do_not_see_each_other():
    """A completion's output and its gradients are the same bits whatever stands in its neighbour."""
    inputs, _, layout = make_inputs(([6], [[3, 4]], 2, 2, 16), torch.float32)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[6:9] = 7.0
    out, other = shared_prefix_attention(*inputs, layout), shared_prefix_attention(*changed, layout)
    assert torch.equal(out[9:], other[9:])
    assert torch.equal(out[:6], other[:6])


def test_autocast_casts_as_pytorch_does():
    inputs, grad_out, layout = make_inputs(HAND_PICKED[0], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = shared_prefix_attention(inputs[0], inputs[1], inputs[2].bfloat16(), layout)
    plain = shared_prefix_attention(*(x.bfloat16() for x in inputs), layout)
    assert torch.equal(mixed, plain)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(mixed, inputs, grad_out.bfloat16()))


def test_opcheck_and_full_graph_compilation():
    inputs, grad_out, layout = make_inputs(([5, 3], [[2, 0], [4]], 4, 2, 8), torch.float32)
    torch.library.opcheck(torch.ops.balcaprl.shared_prefix_attention.default, (*inputs, layout.tensors(), 0.3, "sdpa"))
    compiled = torch.compile(lambda q, k, v, each: shared_prefix_attention(q, k, v, each), fullgraph=True)
    for a, b in zip(
        run(compiled, inputs, grad_out, layout), run(shared_prefix_attention, inputs, grad_out, layout), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_peak_memory_holds_no_score_matrix():
    """1,500 tokens, 8 heads: scores of one head alone would be 9 MB, a mask 2 MB; nothing of T x T is kept."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, list | tuple) else [result]:
                if isinstance(x, torch.Tensor):
                    self.largest = max(self.largest, x.untyped_storage().nbytes())
            return result

    inputs, grad_out, layout = make_inputs(([700, 100], [[100] * 6, [100]], 8, 2, 16), torch.float32)
    with Largest() as seen:
        run(shared_prefix_attention, inputs, grad_out, layout, impl="sdpa")
    assert seen.largest <= 3 * inputs[0].nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 2)}, "query: expected shape"),
        ({"query": torch.zeros(4, 2, 8, dtype=torch.int32)}, "query: expected dtype"),
        ({"key": torch.zeros(4, 2, 4)}, "key: expected shape"),
        ({"key": torch.zeros(4, 2, 8, dtype=torch.bfloat16)}, "key: expected dtype"),
        ({"query": torch.zeros(4, 3, 8)}, "key: 2 heads do not divide the 3"),
        ({"value": torch.zeros(4, 1, 8)}, "value: expected shape"),
        ({"layout": [4]}, "layout: expected a SharedPrefixLayout"),
        ({"layout": SharedPrefixLayout.from_lengths([5], [[]])}, "layout: it is of 5 packed tokens, query has 4"),
        ({"scale": -1.0}, "scale: expected a finite number > 0"),
        ({"softcap": 30.0}, "softcap: 30.0 is not supported"),
        ({"impl": "native"}, "impl: shared_prefix_attention has"),
        ({"impl": "triton"}, "impl: 'triton'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "query": torch.zeros(4, 2, 8),
        "key": torch.zeros(4, 2, 8),
        "value": torch.zeros(4, 2, 8),
        "layout": SharedPrefixLayout.from_lengths([2], [[1, 1]]),
    }
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "prompt_lengths: expected at least one group"),
        ([0], [[1]], "prompt_lengths: group 0 has a prompt of 0 tokens"),
        ([1, 2], [[1]], "completion_lengths: expected one list for each of 2 prompts, got 1"),
        ([1, 2], [[1], [2, -1]], "completion_lengths: group 1 has a completion of -1 tokens"),
        ([2**30], [[2**30]], "prompt_lengths: 2147483648 packed tokens exceed int32"),
    ],
)
def test_bad_layouts_are_named(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        SharedPrefixLayout.from_lengths(prompts, completions)


def test_the_layout_of_an_example():
    layout = SharedPrefixLayout.from_lengths([3, 2], [[2, 0], [4]])
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 5, 7, 11]
    assert layout.prompt_segment.tolist() == [0, 0, 0, 3, 3]
    assert layout.cu_groups.tolist() == [0, 5, 11]
    assert layout.cu_prompts.tolist() == [0, 3, 5]
    assert layout.cu_completions.tolist() == [0, 2, 6]
    assert layout.groups == [(0, 3, [2, 0]), (5, 2, [4])]
    assert (layout.num_groups, layout.num_tokens) == (2, 11)
