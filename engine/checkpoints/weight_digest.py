"""Digests that tell whether two models have the same weights, without reading all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from balcaprl.policy.policy import Policy

BASE = "base"
"""Kind of digest that covers the model beneath an adapter."""
START = "start"
"""Kind of digest that covers all weights."""
_SAMPLES = 1024
"""Number of elements of each tensor that go into a digest."""
_ADAPTER_PARTS = re.compile(r"\.lora_\w+\.|\.modules_to_save\.")
_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")


def digest_of(policy: Policy, kind: str) -> str:
    """Digest that tells two sets of weights apart.

    The kind ``base`` is of the model beneath an adapter, the kind ``start`` of all weights. The digest covers names,
    shapes and ``_SAMPLES`` evenly spaced elements of each tensor. That suffices, because two fine-tunes of one model
    differ nearly everywhere.
    """
    if kind == START:
        return _digest(policy.model.named_parameters())
    return _digest_of_base(policy.stock_model, None)


def is_of_base(model: nn.Module, digest: str) -> bool:
    """Whether ``digest``, of kind ``base``, is the digest of the stock model, as it is or rounded to 16 bits.

    The model may carry an adapter.
    """
    return any(_digest_of_base(model, dtype) == digest for dtype in (None, torch.bfloat16, torch.float16))


def _digest_of_base(model: nn.Module, dtype: torch.dtype | None) -> str:
    # What is trained with an adapter, such as biases or the rows of some tokens, is no part of the base, whatever its
    # name.
    named = [(n, p) for n, p in model.named_parameters() if not p.requires_grad and not _ADAPTER_PARTS.search(n)]
    return _digest(((_WRAPPERS.sub("", name), parameter) for name, parameter in named), dtype)


def _digest(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the tensors as they are, or as they would be in ``dtype``."""
    digest = hashlib.sha256()
    pieces = []
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().flatten()
        places = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLES, flat.numel()), dtype=torch.float64)
        pieces.append(flat[places.long().to(flat.device)].to(dtype or flat.dtype).float())
    if pieces:
        digest.update(torch.cat([piece.to(pieces[0].device) for piece in pieces]).cpu().numpy().tobytes())
    return digest.hexdigest()
