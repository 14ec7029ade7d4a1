"""The reference policy of the divergence term: the policy as training found it, whoever made it.

The reference of a fully trained policy is a frozen copy of the trained weights. The copy takes the place of the
policy's weights while the reference is evaluated, so frozen parts, such as an image tower, are not held twice. If a
policy trains an adapter that adds nothing yet, its reference is the policy without the adapter. A checkpoint keeps a
digest of the reference, so that a resumed run measures from the same reference or not at all.
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
"""Number of elements of each tensor that go into a digest."""
_ADAPTER_PARTS = re.compile(r"\.lora_\w+\.|\.modules_to_save\.")
_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")


class Reference(Protocol):
    """The frozen policy that the divergence is measured from."""

    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """Log-probabilities under the reference; arguments and result are those of ``Policy.logprobs``."""
        ...


class WithoutAdapter:
    """The ``Reference`` of a policy that trains only adapters: the policy without them."""

    kind = "base"

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """Log-probabilities of the policy with its adapters disabled."""
        with self._policy.adapter_disabled():
            return self._policy.logprobs(packed, temperature, exclude_padding=exclude_padding)


class StartingWeights:
    """The ``Reference`` of any policy: the policy with the trained weights that ``start`` has at this moment.

    Args:
        policy: the policy that is trained.
        start: a policy of the same model that holds the reference's weights; it may be ``policy`` itself. Its weights
            are copied, and ``start`` is not kept.

    Raises:
        ValueError: the two policies have different parameters.
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
        """Weight (V, D) of the reference's head: that of the start if the head is trained, otherwise the policy's."""
        head = self._policy.lm_head_weight
        return next((value for parameter, value in self._pairs if parameter is head), head)

    @torch.no_grad()
    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """Log-probabilities of the policy with the reference's weights."""
        with self._in_place():
            return self._policy.logprobs(packed, temperature, exclude_padding=exclude_padding)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Give the policy the reference's weights for a ``with`` block, then restore the very tensors it had."""
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
    """Digest that tells two sets of weights apart.

    The kind ``base`` covers the model beneath an adapter, the kind ``start`` all weights. The digest covers names,
    shapes and ``_SAMPLES`` evenly spaced elements of each tensor. That suffices, because two fine-tunes of one model
    differ nearly everywhere.
    """
    if kind == StartingWeights.kind:
        return _digest(policy.model.named_parameters())
    return _digest_of_base(policy.stock_model, None)


def is_of_base(model: nn.Module, digest: str) -> bool:
    """Whether ``digest``, of kind ``base``, is that of the stock model, as it is or rounded to 16 bits.

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
