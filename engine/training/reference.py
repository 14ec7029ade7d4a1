"""The reference policy of the divergence term: the policy as it was when training began.

The reference is usually a frozen copy of the trainable weights at that time. The copy takes the place of the policy's
weights while the reference is evaluated, so frozen parts, such as an image tower, are not held twice. If the policy
trains an adapter that adds nothing at the start, the reference is the policy without the adapter, and nothing is
copied. A checkpoint keeps a digest of the reference, so that a resumed run measures from the same reference or not at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from balcaprl.checkpoints.weight_digest import BASE, START, digest_of
from balcaprl.policy import PackedBatch, Policy
from balcaprl.rollout.adapters import adapted_modules, delta_of


class Reference(Protocol):
    """The frozen policy that the divergence is measured from."""

    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """Log-probabilities under the reference; arguments and result are those of ``Policy.logprobs``."""
        ...


class WithoutAdapter:
    """The ``Reference`` of a policy that trains only adapters: the policy without them."""

    kind = BASE

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, packed: PackedBatch, temperature: float = 1.0, *, exclude_padding: bool = False) -> Tensor:
        """Log-probabilities of the policy with its adapters disabled."""
        with self._policy.adapter_disabled():
            return self._policy.logprobs(packed, temperature, exclude_padding=exclude_padding)


class StartingWeights:
    """The ``Reference`` of any policy: the policy with the trained weights that ``start`` has when this is created.

    Args:
        policy: the policy that is trained.
        start: a policy of the same model that holds the reference's weights; it may be ``policy`` itself. Its weights
            are copied, and ``start`` is not kept.

    Raises:
        ValueError: the two policies have different parameters.
    """

    kind = START

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
        """Weight (V, D) of the reference's head: the starting one if the head is trained, otherwise the policy's."""
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


def make_reference(
    policy: Policy, start: Callable[[], Policy], before: dict[str, str] | None
) -> tuple[Reference, dict[str, str]]:
    """Reference of the divergence, and the kind and digest by which a checkpoint records it.

    Args:
        policy: the policy that is trained.
        start: function that returns the policy with which the run began or begins; this may be ``policy`` itself.
        before: kind and digest in the checkpoint that the run resumes from; None if there are none.
    """
    if before is not None and before.get("kind") == WithoutAdapter.kind:
        return WithoutAdapter(policy), {"kind": WithoutAdapter.kind, "digest": digest_of(policy, WithoutAdapter.kind)}
    begun = start()
    if before is None and adapter_adds_nothing(begun):
        return WithoutAdapter(policy), {"kind": WithoutAdapter.kind, "digest": digest_of(begun, WithoutAdapter.kind)}
    digest = digest_of(begun, StartingWeights.kind)
    return StartingWeights(policy, begun), {"kind": StartingWeights.kind, "digest": digest}
