"""Finds where an engine in this process keeps each trainer parameter, and brings new values there.

The engine's model names, fuses, pads and splits tensors in its own way (q/k/v in one matrix, gate and up in another,
extra rows in the vocabulary). This module keeps no table of names. Instead, the engine loads the policy's tensors once
through its own ``load_weights``, and ``CopyRecorder`` observes every copy that the engine makes. The source and the
target of a copy tell exactly which part of which parameter lies where. The resulting ``WeightPlan`` is then compared
with the parameters value by value.

The plan decides which of these strategies are possible, cheapest first:

- ``shared``: each trainer parameter becomes a view of the engine's tensor. An optimiser step in place is the sync;
  nothing is copied, and memory holds one copy of the weights;
- ``inplace``: both sides keep their own weights, and a sync is one batched copy into the engine's views
  (``torch._foreach_copy_``);
- ``reload``: the engine loads all tensors again; this also works if the engine keeps repacked copies of the weights.

This module does not import an engine: it sees the engine's model as a plain ``torch.nn.Module``.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_SAMPLES_PER_TENSOR = 64
"""Largest number of elements that a sync compares in each part of a parameter."""


UNUSED = "not part of the engine's model"
"""Reason for parameters that the engine never reads while loading; they do not affect what it computes."""


class StaleWeightsError(RuntimeError):
    """The engine does not serve the weights that it was given, so its samples are not the policy's."""


@dataclass(frozen=True)
class Part:
    """A part of a trainer parameter, and the engine's view that holds this part."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Offset of the part from the parameter's first element, in elements."""
    target: Tensor
    """The engine's view of the part, with the same shape."""

    def source(self, parameter: Tensor) -> Tensor:
        """Return this part of ``parameter`` as a view."""
        return parameter.detach().as_strided(self.shape, self.stride, parameter.storage_offset() + self.offset)

    @property
    def numel(self) -> int:
        """Number of elements in the part."""
        return math.prod(self.shape)


class CopyRecorder(TorchDispatchMode):
    """Records every ``copy_`` that reads one of some parameters while an engine loads them.

    Args:
        parameters: trainer parameters by name, each of them once. They may share storage, but must not overlap.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.parts: dict[str, list[Part]] = {name: [] for name in parameters}
        self.transformed: set[str] = set()
        """Names of parameters that an operation other than a plain copy (to a tensor of the same shape) has read."""
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        for name, parameter in parameters.items():
            start = int(parameter.storage_offset())
            span = (start, start + _extent(parameter), name)
            self._spans.setdefault(storage_id(parameter), []).append(span)
        for spans in self._spans.values():
            spans.sort()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._note_copy(args[0], args[1])
        else:
            results = [storage_id(each) for each in tree_iter(result) if isinstance(each, Tensor)]
            for source in tree_iter(args):
                if isinstance(source, Tensor) and storage_id(source) not in results:  # not just a view
                    self._note_use(source)
        return result

    def _note_copy(self, target: Tensor, source: Tensor) -> None:
        owner = self._owner(source)
        if owner is None:
            return
        name, start = owner
        if target.shape != source.shape:  # broadcast
            self.transformed.add(name)
            return
        part = Part(tuple(source.shape), source.stride(), int(source.storage_offset()) - start, target.detach())
        self.parts[name].append(part)

    def _note_use(self, source: Tensor) -> None:
        owner = self._owner(source)
        if owner is not None:
            self.transformed.add(owner[0])

    def _owner(self, source: Tensor) -> tuple[str, int] | None:
        """Return the name and the storage offset, in elements, of the parameter that a tensor is a view of."""
        if not source.numel() or source.device.type == "meta":
            return None
        spans = self._spans.get(storage_id(source))
        if spans is None:
            return None
        index = bisect.bisect_right(spans, source.storage_offset(), key=lambda span: span[0]) - 1
        start, end, name = spans[index]
        return (name, start) if index >= 0 and source.storage_offset() + _extent(source) <= end else None


@dataclass
class WeightPlan:
    """The places where the engine keeps the trainer's parameters."""

    parameters: dict[str, nn.Parameter]
    """The trainer's parameters by name, with tied ones only once."""
    parts: dict[str, list[Part]]
    """The parts of each parameter and their places; only for parameters that the engine holds in full."""
    unserved: dict[str, str]
    """Parameters for which the engine has no tensor that can be written, by name, with the reason."""
    slots: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    """Module, attribute and address of every engine tensor that holds a part."""

    @property
    def num_tensors(self) -> int:
        """Number of parameters that the engine serves."""
        return len(self.parts)

    @property
    def num_bytes(self) -> int:
        """Size of the parameters that the engine serves, in bytes, in the trainer's data type."""
        return sum(p.numel() * p.element_size() for p in (self.parameters[name] for name in self.parts))

    def alias(self, name: str) -> Tensor | None:
        """Return the whole parameter as one view of the engine's tensor; None if there is no such view."""
        return _alias_of(self.parameters[name], self.parts[name])

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the targets and sources of a full copy; all of them are views."""
        targets, sources = [], []
        for name, parts in self.parts.items():
            for part in parts:
                targets.append(part.target)
                sources.append(part.source(self.parameters[name]))
        return targets, sources

    def check_storage(self) -> None:
        """Check that the engine still computes with every engine tensor of the plan.

        Raises:
            StaleWeightsError: the engine replaced a tensor; the message names the first one.
        """
        for module, attribute, address in self.slots:
            tensor = module._parameters.get(attribute)
            if tensor is None or tensor.data_ptr() != address:
                raise StaleWeightsError(
                    f"the engine replaced {type(module).__name__}.{attribute} after the weights were mapped: what is "
                    "written there is not what it samples from. Set rollout.sync to reload"
                )

    def check_values(self) -> None:
        """Check that every element of the engine's views equals the parameter's value.

        Raises:
            StaleWeightsError: a value differs; the message names the first parameter that differs.
        """
        for name, parts in self.parts.items():
            for part in parts:
                expected = part.source(self.parameters[name])
                if not torch.equal(part.target, expected.to(part.target.device, part.target.dtype)):
                    raise StaleWeightsError(f"the engine holds other values than the policy for {name}")

    def check_samples(self, seed: int) -> None:
        """Compare up to ``_SAMPLES_PER_TENSOR`` evenly spaced elements of each part; ``seed`` chooses the first one.

        Raises:
            StaleWeightsError: a value differs; the message names the first parameter that differs.
        """
        draw = random.Random(seed).random()
        pairs = [
            (name, _sampled(part.target, draw), _sampled(part.source(self.parameters[name]), draw))
            for name, parts in self.parts.items()
            for part in parts
        ]
        if not pairs or _same(*(torch.cat(_at_home(each)) for each in list(zip(*pairs, strict=True))[1:])):
            return
        wrong = [name for name, found, expected in pairs if not _same(found, expected)]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise StaleWeightsError(f"the engine still holds old values for {wrong[0]}{more}: the sync did not reach it")


def make_plan(parameters: dict[str, nn.Parameter], recorder: CopyRecorder, model: nn.Module) -> WeightPlan:
    """Make the plan from an observed load, once the engine's model is ready to run.

    Args:
        parameters: the trainer's parameters by name, with tied ones only once, as given to the recorder.
        recorder: the recorder that observed the load.
        model: the engine's model, after any processing of its weights that follows loading.
    """
    owners: dict[int, list[tuple[nn.Module, str, int]]] = {}
    for module in model.modules():
        for attribute, tensor in module._parameters.items():
            if tensor is not None and tensor.numel():
                owners.setdefault(storage_id(tensor), []).append((module, attribute, tensor.data_ptr()))
    parts: dict[str, list[Part]] = {}
    unserved: dict[str, str] = {}
    slots: dict[tuple[int, str], tuple[nn.Module, str, int]] = {}
    for name, parameter in parameters.items():
        found = recorder.parts[name]
        if name in recorder.transformed:
            unserved[name] = "transformed as the engine loads it"
        elif not found:
            unserved[name] = UNUSED
        elif sum(part.numel for part in found) < parameter.numel():
            unserved[name] = "loaded in part"
        elif any(storage_id(part.target) not in owners for part in found):
            unserved[name] = "repacked after loading"
        else:
            parts[name] = found
            for part in found:
                for slot in owners[storage_id(part.target)]:
                    slots[(id(slot[0]), slot[1])] = slot
    return WeightPlan(parameters, parts, unserved, list(slots.values()))


def storage_id(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's storage address, and its offset in that storage in elements."""
    return storage_id(tensor), int(tensor.storage_offset())


class SyncStrategy(Protocol):
    """A way of bringing new parameter values to the engine."""

    name: str

    def push(self, policy_version: int) -> tuple[int, int]:
        """Bring the engine to the trainer's present values, and check the result; returns (tensors, bytes copied)."""
        ...

    def detach(self, *, copy: bool) -> None:
        """Let the trainer's parameters outlive the engine; needs ``copy`` if the engine's memory will be unmapped."""
        ...


class SharedWeights:
    """Strategy ``shared``: the trainer's parameters are views of the engine's tensors, so both change together."""

    name = "shared"

    def __init__(self, plan: WeightPlan) -> None:
        """Move every parameter of the plan into the engine's memory; the parameter's old memory is freed."""
        self._plan = plan
        aliases = {name: plan.alias(name) for name in plan.parts}
        lacking = [name for name, alias in aliases.items() if alias is None]
        if lacking:
            raise ValueError(f"plan: {lacking[0]} has no view in the engine; use the strategy inplace")
        self._addresses = {}
        for name, alias in aliases.items():
            if alias is not None:
                plan.parameters[name].data = alias
                self._addresses[name] = alias.data_ptr()

    def push(self, policy_version: int) -> tuple[int, int]:
        """Check that both sides still use the same memory; nothing is copied. See ``SyncStrategy``."""
        parameters = self._plan.parameters
        for name, address in self._addresses.items():
            if parameters[name].data_ptr() != address:
                raise StaleWeightsError(
                    f"{name} no longer lies in the engine's memory: something gave the parameter new storage (.data = ..., "
                    ".to(...)). Change weights in place only, or set rollout.sync to inplace"
                )
        self._plan.check_storage()
        return len(self._addresses), 0

    def detach(self, *, copy: bool) -> None:
        """Give the parameters their own memory if ``copy`` asks for it. See ``SyncStrategy``."""
        if copy:
            for name in self._addresses:
                self._plan.parameters[name].data = self._plan.parameters[name].detach().clone()


class InplaceCopy:
    """Strategy ``inplace``: engine and trainer hold weights of their own; one batched copy updates the engine's."""

    name = "inplace"

    def __init__(self, plan: WeightPlan) -> None:
        self._plan = plan

    def push(self, policy_version: int) -> tuple[int, int]:
        """Copy all parameters into the engine, and compare samples of them. See ``SyncStrategy``."""
        targets, sources = self._plan.copies()
        copy_all(targets, sources)
        self._plan.check_storage()
        self._plan.check_samples(policy_version)
        return self._plan.num_tensors, sum(target.numel() * target.element_size() for target in targets)

    def detach(self, *, copy: bool) -> None:
        """Do nothing: the trainer's parameters never left their own memory. See ``SyncStrategy``."""


class Reload:
    """Strategy ``reload``: the engine loads every tensor again, with any repacking."""

    name = "reload"

    def __init__(self, reload: Callable[[], tuple[int, int]]) -> None:
        """Use the function ``reload``, which reloads the weights and returns (tensors, bytes)."""
        self._reload = reload

    def push(self, policy_version: int) -> tuple[int, int]:
        """Reload the weights. See ``SyncStrategy``.

        The engine's values cannot be read back, so the sampler verifies them by a probe instead.
        """
        return self._reload()

    def detach(self, *, copy: bool) -> None:
        """Do nothing: the trainer's parameters never left their own memory. See ``SyncStrategy``."""


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy all sources to their targets in one batched operation, which also converts data types and devices."""
    torch._foreach_copy_(list(targets), list(sources))


def why_not_shared(plan: WeightPlan) -> str | None:
    """Return the first reason why a plan does not allow ``shared``; None if it does."""
    reason = why_not_inplace(plan)
    if reason:
        return reason
    for name, parts in plan.parts.items():
        parameter, target = plan.parameters[name], parts[0].target
        if target.dtype != parameter.dtype:
            return f"the engine keeps {name} as {target.dtype}, the trainer as {parameter.dtype}"
        if target.device != parameter.device:
            return f"the engine keeps {name} on {target.device}, the trainer on {parameter.device}"
        if plan.alias(name) is None:
            return f"the engine keeps {name} in several places"
    seen: dict[tuple[int, int], str] = {}
    for name in plan.parts:
        alias = plan.alias(name)
        if alias is not None and seen.setdefault(_place(alias), name) != name:
            return f"the engine keeps {name} where it keeps {seen[_place(alias)]}"
    return None


def why_not_inplace(plan: WeightPlan) -> str | None:
    """Return the first reason why a plan does not allow copies into the engine's tensors; None if it does."""
    for name, reason in plan.unserved.items():
        if reason != UNUSED:
            return f"{name} is {reason}"
    return None


def _alias_of(parameter: Tensor, parts: Sequence[Part]) -> Tensor | None:
    """Return the parts' targets as one view in the parameter's shape; None if they are laid out differently from it."""
    first = parts[0]
    if sum(part.numel for part in parts) != parameter.numel() or first.target.dtype != parameter.dtype:
        return None
    start = first.target.storage_offset() - first.offset
    for part in parts:
        same_layout = all(
            a == b for a, b, size in zip(part.target.stride(), part.stride, part.shape, strict=True) if size > 1
        )
        same_place = part.target.storage_offset() - part.offset == start
        if not (same_layout and same_place and storage_id(part.target) == storage_id(first.target)):
            return None
    return first.target.as_strided(parameter.shape, parameter.stride(), start)


def _extent(tensor: Tensor) -> int:
    """Count the elements of memory from a tensor's first to its last element, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _sampled(tensor: Tensor, draw: float) -> Tensor:
    """Return N <= ``_SAMPLES_PER_TENSOR`` elements (N,) of a tensor; they are a view if the tensor is contiguous."""
    count = min(_SAMPLES_PER_TENSOR, tensor.numel())
    step = tensor.numel() // count
    start = int(draw * (tensor.numel() - (count - 1) * step))
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (step,), tensor.storage_offset() + start)
    return tensor.reshape(-1)[start : start + (count - 1) * step + 1 : step]


def _at_home(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Move all tensors to the device and data type of the first."""
    return [tensor.to(tensors[0].device, tensors[0].dtype) for tensor in tensors]


def _same(found: Tensor, expected: Tensor) -> bool:
    expected = expected.to(found.device, found.dtype)
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())
