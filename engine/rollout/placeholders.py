"""What samplers need for preprocessed images: the placeholders' places in the prompt, and the images' cache keys."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def image_spans(prompt_ids: Tensor, image_token_id: int) -> list[tuple[int, int]]:
    """Return (start, length) for every run of image placeholders in a prompt (P,)."""
    is_image = torch.cat([torch.zeros(1, dtype=torch.int), (prompt_ids.cpu() == image_token_id).int()])
    steps = torch.diff(is_image, append=torch.zeros(1, dtype=torch.int))
    starts, ends = (steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def collapsed(prompt_ids: Tensor, image_token_id: int) -> list[int]:
    """Return a prompt's ids (P,) with one placeholder per image, for samplers that expand placeholders themselves."""
    inner = {p for start, length in image_spans(prompt_ids, image_token_id) for p in range(start + 1, start + length)}
    return [token for place, token in enumerate(prompt_ids.tolist()) if place not in inner]


def inputs_hash(image_inputs: dict[str, Tensor]) -> str:
    """Hash the tensors with their names, shapes and data types, so that equal images share cached features."""
    digest = hashlib.sha256()
    for name in sorted(image_inputs):
        tensor = image_inputs[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
