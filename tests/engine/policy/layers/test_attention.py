"""The towers' attention in one call for all segments of a length, against one call for each, as transformers' own code does."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from balcaprl.policy.layers.attention import (
    IMAGE_SEGMENTS,
    _segments_of,
    calling_once_for_segments,
    enable_checkpointing,
    image_segments_forward,
)

LENGTHS = {
    "one": [12],
    "equal": [4, 4, 4],
    "windows of an image whose edges do not fill them": [16, 16, 8, 16, 16, 8, 4, 4, 2],
    "empty ones": [0, 5, 0, 5, 3, 0],
}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_one_call_for_each_segment(lengths: list[int]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 3, sum(lengths), 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out, weights = image_segments_forward(nn.Identity(), *inputs, None, cu_seq_lens_q=offsets(lengths), scaling=0.3)
    segments = [x.split(lengths, dim=2) for x in inputs]
    parts = [F.scaled_dot_product_attention(*each, scale=0.3) for each in zip(*segments, strict=True)]
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    actual = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs, upstream))


def test_segments_are_read_once_and_equal_ones_are_not_gathered() -> None:
    equal = offsets([4, 4, 4])
    assert _segments_of(equal) == ([(4, slice(0, 12))], None)
    assert _segments_of(equal) is _segments_of(equal)
    ((first, rows), (second, row)), places = _segments_of(offsets([2, 3, 2]))
    assert places is not None
    assert places.tolist() == [0, 1, 4, 5, 6, 2, 3]
    assert (first, rows.tolist(), second, row) == (2, [0, 1, 5, 6], 3, slice(2, 5))


@pytest.mark.parametrize(("given", "within"), [("sdpa", IMAGE_SEGMENTS), ("flash_attention_2", "flash_attention_2")])
def test_only_the_plain_function_is_replaced(given: str, within: str) -> None:
    config = SimpleNamespace(_attn_implementation=given)
    with calling_once_for_segments(config):
        assert config._attn_implementation == within
    assert config._attn_implementation == given


@pytest.mark.parametrize("names", [["activation", "gradient"], ["gradient"]])
def test_checkpointing_is_enabled_by_the_newest_name_there_is(names):
    called = []
    methods = {f"{name}_checkpointing_enable": lambda _options, name=name: called.append(name) for name in names}
    enable_checkpointing(SimpleNamespace(**methods))
    assert called == names[:1]
