"""What the divergence is measured from: the policy as training found it, whoever made it.

A whole policy keeps a frozen copy of its trained weights, which take their places while the reference is asked: frozen parts,
an image tower say, are not held twice. A policy that trains an adapter which adds nothing yet is its own reference without
it. A checkpoint keeps a digest of what the reference is, so that a resumed run measures from the same one, or not at all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from balcaprl.policy import PackedBatch, Policy
from balcaprl.rollout.adapters import adapted_modules, delta_of

_SAMPLES = 1024
"""Elements of each tensor that a digest looks at."""
_ADAPTER_PARTS = re.compile(r"\.lora_\w+\.|\.modules_to_save\.")
_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")


class Reference(Protocol):
    """The frozen policy that the divergence is measured from."""

    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """As ``Policy.logprobs``."""
        ...


class WithoutAdapter:
    """The ``Reference`` of a policy that trains adapters alone: itself without them."""

    kind = "base"

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """See ``Reference``."""
        with self._policy.adapter_disabled():
            return self._policy.logprobs(packed, temperature, exclude_padding=exclude_padding)


class StartingWeights:
    """The ``Reference`` of any policy: itself with the trained weights that another one, or it itself, has now.

    Args:
        policy: what is trained.
        start: a policy alike that holds the reference's weights; not kept.

    Raises:
        ValueError: the two are not alike.
    """

    kind = "start"

    def __init__(self, policy: Policy, start: Policy) -> None:
        self._policy = policy
        values = dict(start.model.named_parameters())
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in policy.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in values or values[name].shape != parameter.shape:
                raise ValueError(f"the reference is of another model than the policy: {name} is not alike in both")
            self._pairs.append((parameter, values[name].detach().to(parameter, copy=True)))

    @property
    def lm_head_weight(self) -> Tensor:
        """The head (V, D) that it measures with: of the start, where the head is trained."""
        head = self._policy.lm_head_weight
        return next((value for parameter, value in self._pairs if parameter is head), head)

    @torch.no_grad()
    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """See ``Reference``."""
        with self._in_place():
            return self._policy.logprobs(packed, temperature, exclude_padding=exclude_padding)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The policy with the reference's weights; its own come back as the very tensors that they were."""
        own = [parameter.data for parameter, _ in self._pairs]
        try:
            for parameter, value in self._pairs:
                parameter.data = value
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, own, strict=True):
                parameter.data = data


def adapter_adds_nothing(policy: Policy) -> bool:
    """Whether the policy trains an adapter that does not change its model yet."""
    if not hasattr(policy.model, "disable_adapter"):
        return False
    deltas = (delta_of(module) for _, module in adapted_modules(policy.model))
    return all(delta is None or not delta.any() for delta in deltas)


def digest_of(policy: Policy, kind: str) -> str:
    """Tells two sets of weights apart: of the model beneath an adapter for ``base``, of all for ``start``.

    Names, shapes and ``_SAMPLES`` elements of each tensor, evenly spaced: two fine-tunes of one model differ nearly everywhere.
    """
    if kind == StartingWeights.kind:
        return _digest(policy.model.named_parameters())
    return _digest_of_base(policy.stock_model, None)


def is_of_base(model: nn.Module, digest: str) -> bool:
    """Whether ``digest``, of kind ``base``, is of the stock model, which may be adapted, as it is or rounded to 16 bits."""
    return any(_digest_of_base(model, dtype) == digest for dtype in (None, torch.bfloat16, torch.float16))


def _digest_of_base(model: nn.Module, dtype: torch.dtype | None) -> str:
    # What is trained with an adapter, its biases and tokens' rows say, is no part of the base, whatever its name.
    named = [(n, p) for n, p in model.named_parameters() if not p.requires_grad and not _ADAPTER_PARTS.search(n)]
    return _digest(((_WRAPPERS.sub("", name), parameter) for name, parameter in named), dtype)


def _digest(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """Of the tensors as they are, or as they would be in ``dtype``."""
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
