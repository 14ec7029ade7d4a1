"""An image's preprocessed tensors, as samplers need them: where they go in the prompt, and what names them in caches."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def image_spans(prompt_ids: Tensor, image_token_id: int) -> list[tuple[int, int]]:
    """(start, length) of every run of image placeholders in a prompt (P,)."""
    is_image = torch.cat([torch.zeros(1, dtype=torch.int), (prompt_ids.cpu() == image_token_id).int()])
    steps = torch.diff(is_image, append=torch.zeros(1, dtype=torch.int))
    starts, ends = (steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def collapsed(prompt_ids: Tensor, image_token_id: int) -> list[int]:
    """The ids of a prompt (P,) with one placeholder for each image, as samplers want it that expand it themselves."""
    inner = {p for start, length in image_spans(prompt_ids, image_token_id) for p in range(start + 1, start + length)}
    return [token for place, token in enumerate(prompt_ids.tolist()) if place not in inner]


def inputs_hash(image_inputs: dict[str, Tensor]) -> str:
    """A digest of the tensors, names, shapes and data types included: equal images share cached features."""
    digest = hashlib.sha256()
    for name in sorted(image_inputs):
        tensor = image_inputs[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
