"""One set of weights: where a colocated engine keeps each trainer parameter, and how it gets the new values.

The engine's model names, fuses, pads and splits tensors in its own way (q/k/v in one matrix, gate and up in another, rows
added to the vocabulary). No table of names is kept here. The engine loads the policy's tensors once through its own
``load_weights``; every copy that it makes is observed (``CopyRecorder``), and source and target of a copy say exactly which
part of which parameter lives where. The resulting ``WeightPlan`` is then compared with the parameters value by value.

From the plan follow the strategies, cheapest first:

- ``shared``: each trainer parameter becomes a view of the engine's tensor. An optimiser step in place is the sync; nothing
  is copied, and there is one copy of the weights in memory;
- ``inplace``: both keep their own weights; a sync is one batched copy into the same views (``torch._foreach_copy_``);
- ``reload``: the engine loads all tensors anew, where it keeps repacked copies that have no view.

Nothing here imports an engine: its model is a plain ``torch.nn.Module``.
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
"""Elements of each tensor that a sync compares."""


UNUSED = "not part of the engine's model"
"""Of parameters that the engine never reads as it loads: they have no say in what it computes."""


class StaleWeightsError(RuntimeError):
    """The engine does not serve the weights that it was given: what it samples is not the policy's."""


@dataclass(frozen=True)
class Part:
    """A part of a trainer parameter and the engine's view that holds it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements, from the parameter's first."""
    target: Tensor
    """The engine's view, of the same shape."""

    def source(self, parameter: Tensor) -> Tensor:
        """The same part of ``parameter``."""
        return parameter.detach().as_strided(self.shape, self.stride, parameter.storage_offset() + self.offset)

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return math.prod(self.shape)


class CopyRecorder(TorchDispatchMode):
    """Observes every ``copy_`` out of some parameters, as an engine loads them.

    Args:
        parameters: trainer parameters by name, each of them once. They may share storages, but must not overlap.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.parts: dict[str, list[Part]] = {name: [] for name in parameters}
        self.transformed: set[str] = set()
        """Parameters that something other than a plain copy has read."""
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
        """The parameter that a tensor is a view of, and where that parameter starts in its storage."""
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
    """Where the engine keeps the trainer's parameters."""

    parameters: dict[str, nn.Parameter]
    """The trainer's, by name, tied ones once."""
    parts: dict[str, list[Part]]
    """What of each parameter lives where; only parameters that the engine holds in full."""
    unserved: dict[str, str]
    """Parameters that the engine has no tensor for, or none that can be written, and why."""
    slots: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    """Module, attribute and address of every engine tensor that a part lies in."""

    @property
    def num_tensors(self) -> int:
        """Parameters that the engine serves."""
        return len(self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of these parameters, in the trainer's data type."""
        return sum(p.numel() * p.element_size() for p in (self.parameters[name] for name in self.parts))

    def alias(self, name: str) -> Tensor | None:
        """The whole parameter as one view of the engine's tensor; None where it is not so stored."""
        return _alias_of(self.parameters[name], self.parts[name])

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """Targets and sources of a full copy, views on both sides."""
        targets, sources = [], []
        for name, parts in self.parts.items():
            for part in parts:
                targets.append(part.target)
                sources.append(part.source(self.parameters[name]))
        return targets, sources

    def check_storage(self) -> None:
        """Raise unless every engine tensor of the plan is still the one that the engine computes with.

        Raises:
            StaleWeightsError: naming the first that was replaced.
        """
        for module, attribute, address in self.slots:
            tensor = module._parameters.get(attribute)
            if tensor is None or tensor.data_ptr() != address:
                raise StaleWeightsError(
                    f"the engine replaced {type(module).__name__}.{attribute} after the weights were mapped: what is "
                    "written there is not what it samples from. Set rollout.sync to reload"
                )

    def check_values(self) -> None:
        """Raise unless the engine's views hold the parameters' values, every element.

        Raises:
            StaleWeightsError: naming the first parameter that differs.
        """
        for name, parts in self.parts.items():
            for part in parts:
                expected = part.source(self.parameters[name])
                if not torch.equal(part.target, expected.to(part.target.device, part.target.dtype)):
                    raise StaleWeightsError(f"the engine holds other values than the policy for {name}")

    def check_samples(self, seed: int) -> None:
        """Compare up to ``_SAMPLES_PER_TENSOR`` evenly spaced elements of each part, from a place that ``seed`` chooses.

        Raises:
            StaleWeightsError: naming the first parameter that differs.
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
    """The plan that follows from an observed load, once the engine's model is ready to run.

    Args:
        parameters: the trainer's, by name, tied ones once; as given to the recorder.
        recorder: what it saw.
        model: the engine's model, after whatever it does to its weights past loading.
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
    """Address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def _place(tensor: Tensor) -> tuple[int, int]:
    """Its memory, and where in it the tensor starts."""
    return storage_id(tensor), int(tensor.storage_offset())


class SyncStrategy(Protocol):
    """How new values reach the engine."""

    name: str

    def push(self, policy_version: int) -> tuple[int, int]:
        """Bring the engine to the trainer's present values, and check it; (tensors, bytes copied)."""
        ...

    def detach(self, *, copy: bool) -> None:
        """Let the trainer's parameters outlive the engine; ``copy`` where its memory will be unmapped."""
        ...


class SharedWeights:
    """The trainer's parameters are views of the engine's tensors: whatever changes one changes the other."""

    name = "shared"

    def __init__(self, plan: WeightPlan) -> None:
        """Move every parameter of the plan into the engine's memory; its old memory is freed."""
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
        """See ``SyncStrategy``: only look whether both sides still use the one memory."""
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
        """See ``SyncStrategy``."""
        if copy:
            for name in self._addresses:
                self._plan.parameters[name].data = self._plan.parameters[name].detach().clone()


class InplaceCopy:
    """Engine and trainer hold weights of their own; one batched copy brings them together."""

    name = "inplace"

    def __init__(self, plan: WeightPlan) -> None:
        self._plan = plan

    def push(self, policy_version: int) -> tuple[int, int]:
        """See ``SyncStrategy``."""
        targets, sources = self._plan.copies()
        copy_all(targets, sources)
        self._plan.check_storage()
        self._plan.check_samples(policy_version)
        return self._plan.num_tensors, sum(target.numel() * target.element_size() for target in targets)

    def detach(self, *, copy: bool) -> None:
        """See ``SyncStrategy``: the trainer's parameters never left their own memory."""


class Reload:
    """The engine loads every tensor anew, and repacks what it repacks."""

    name = "reload"

    def __init__(self, reload: Callable[[], tuple[int, int]]) -> None:
        """``reload`` does it, and returns tensors and bytes."""
        self._reload = reload

    def push(self, policy_version: int) -> tuple[int, int]:
        """See ``SyncStrategy``. What arrived cannot be read back: the sampler asks the engine a question instead."""
        return self._reload()

    def detach(self, *, copy: bool) -> None:
        """See ``SyncStrategy``: the trainer's parameters never left their own memory."""


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """One batched copy, data types and devices converted on the way."""
    torch._foreach_copy_(list(targets), list(sources))


def why_not_shared(plan: WeightPlan) -> str | None:
    """The first reason why a plan does not allow ``shared``; None where it does."""
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
    """The first reason why a plan does not allow copies into the engine's tensors; None where it does."""
    for name, reason in plan.unserved.items():
        if reason != UNUSED:
            return f"{name} is {reason}"
    return None


def _alias_of(parameter: Tensor, parts: Sequence[Part]) -> Tensor | None:
    """The parts' targets as one view in the parameter's shape, if they lie as the parameter's own elements do."""
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
    """Elements from the first of a tensor to its last in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _sampled(tensor: Tensor, draw: float) -> Tensor:
    """Some elements (N,) of a tensor, N <= ``_SAMPLES_PER_TENSOR``: a view, where the tensor is contiguous."""
    count = min(_SAMPLES_PER_TENSOR, tensor.numel())
    step = tensor.numel() // count
    start = int(draw * (tensor.numel() - (count - 1) * step))
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (step,), tensor.storage_offset() + start)
    return tensor.reshape(-1)[start : start + (count - 1) * step + 1 : step]


def _at_home(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on one device and in one data type, those of the first."""
    return [tensor.to(tensors[0].device, tensors[0].dtype) for tensor in tensors]


def _same(found: Tensor, expected: Tensor) -> bool:
    expected = expected.to(found.device, found.dtype)
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())
