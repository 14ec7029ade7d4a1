"""Tensors that share a copy; on a GPU ``test_cuda.py`` has it."""

from __future__ import annotations

import torch

from balcaprl.kernels.support.upload import _joined, upload


def test_elsewhere_than_on_a_gpu_nothing_is_copied() -> None:
    tensors = [torch.arange(3), torch.ones(2, 2)]
    assert all(a is b for a, b in zip(upload(tensors, "cpu"), tensors, strict=True))


def test_joined_tensors_begin_at_multiples_of_16_bytes() -> None:
    for dtype in (torch.int32, torch.int64, torch.bfloat16, torch.uint8):
        tensors = [torch.arange(n).to(dtype) for n in (1, 5, 0, 33)] + [torch.arange(12).view(3, 4).T.to(dtype)]
        joined, offsets = _joined(tensors, pin_memory=False)
        assert all(offset * joined.element_size() % 16 == 0 for offset in offsets)
        for offset, tensor in zip(offsets, tensors, strict=True):
            part = joined[offset : offset + tensor.numel()].view(tensor.shape)
            assert part.is_contiguous()
            assert torch.equal(part, tensor)
