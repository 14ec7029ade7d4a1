"""Finds where the host would wait for a GPU, on a machine without one.

All tensors are on the CPU, and some are *on the device*: those that are told, those that a factory is asked to put on a
device by name, and whatever is computed from either. An operation on one of them waits if its result, or the result's
size, has to be known to the host: a number read, a mask turned into indices. So does an ordinary copy to the device. An
operation that mixes a tensor of the host with others would fail on a GPU; an index that is on the host is uploaded.
"""

from __future__ import annotations

import collections
import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from balcaprl.kernels.support import deferred, launch

READS = {
    *(
        "_local_scalar_dense",
        "item",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "bincount",
    ),
    *("unique_consecutive", "nonzero_numpy", "argwhere"),
}
"""Operations of which the host reads a value or needs a size."""
METHODS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}
"""Methods that read without an operation where the tensor is on the CPU."""
FACTORIES = {torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.linspace, torch.rand, torch.randn}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


UPLOADERS = ("policy.packing", "policy.layers.attention", "policy.layers.tower_indices", "training.update")
"""The modules that upload without a wait."""
RESOLVERS = ("kernels.head.linear_policy_loss", "kernels.head.linear_logprobs", "kernels.shared_prefix.attention")
"""The modules that choose an implementation."""


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> DeviceWatch:
    """From here on everything takes the path of a GPU: Triton's launches do nothing, and no check is read."""
    watch = DeviceWatch()
    for name in UPLOADERS:
        monkeypatch.setattr(importlib.import_module(f"balcaprl.{name}"), "upload", watch.upload)
    for name in RESOLVERS:
        monkeypatch.setattr(importlib.import_module(f"balcaprl.{name}"), "resolve_impl", lambda *_: "triton")
    monkeypatch.setattr(launch, "check_triton", lambda _: None)
    monkeypatch.setattr(importlib.import_module("triton.runtime.jit").JITFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(deferred, "check", lambda flag, _: watch.checked.append(watch.has(flag)))
    return watch


class DeviceWatch:
    """Counts waits while it is active; ``waits`` maps (what, place in the code) to how often."""

    def __init__(self) -> None:
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.checked: list[bool] = []
        """For each check of values, whether its flag is on the device."""
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used again

    def put(self, *values: Any) -> None:
        """Say that all tensors within some values are on the device."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def put_policy(self, policy: Any, *batches: Any) -> None:
        """Say that a policy is on the device, and what of packed batches is not made for the host."""
        self.put(list(policy.model.parameters()), list(policy.model.buffers()))
        for layout in (batch.prefix_layout for batch in batches if batch.prefix_layout is not None):
            fields = layout._asdict() if hasattr(layout, "_asdict") else vars(layout)
            self.put([value for name, value in fields.items() if not name.startswith("host")])

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage()._cdata in self._storages

    def upload(self, tensors: Sequence[Tensor], device: Any) -> list[Tensor]:
        """Stands for ``kernels.support.upload.upload`` to a GPU."""
        copies = [tensor if self.has(tensor) else tensor.clone() for tensor in tensors]
        self.put(copies)
        return copies

    def count(self, what: str) -> None:
        """Count a wait at the place that is now running."""
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            inside = {"torch", "helpers"} & set(path.parts[-3:]) or "/torch/" in frame.filename
            if not inside:
                self.waits[what, f"{'/'.join(path.parts[-2:])} {frame.name}"] += 1
                return

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count within the context."""
        with _Functions(self), _Operations(self):
            yield


class _Functions(TorchFunctionMode):
    """Sees what Python calls."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METHODS and self.watch.has(args[0]):
            self.watch.count(METHODS[func])
        named = kwargs.get("device") is not None
        if func is Tensor.backward:  # the mode is off in here, and the backward is to be looked into
            with self:
                return torch.autograd.backward(args)
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and named:
            self.watch.count("upload of a list")
            self.watch.put(result)
        elif func in FACTORIES and named:
            self.watch.put(result)
        elif func is Tensor.to and (named or any(isinstance(a, (str, torch.device)) for a in args[1:])):
            if not self.watch.has(args[0]):
                self.watch.count("upload")
            result = result.clone() if result is args[0] and not self.watch.has(result) else result
            self.watch.put(result)
        return result


class _Operations(TorchDispatchMode):
    """Sees what torch runs, in the backward too."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there = [self.watch.has(tensor) for tensor in tensors]
        name = func._schema.name.split("::")[-1]
        ours = OPDEFS.get(func._schema.name)
        if any(there) and ours is None:
            self._examine(name, tensors, there, kwargs)
        if ours is None:
            result = func(*args, **kwargs)
        else:  # both modes are off in here, and our own operations are to be looked into
            with _Functions(self.watch), self:
                result = ours._init_fn(*args, **kwargs)
        if any(there):
            self.watch.put(result)
        return result

    def _examine(self, name: str, tensors: list[Tensor], there: list[bool], kwargs: dict[str, Any]) -> None:
        if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.watch.count(name)
        elif name in INDEXED and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:]):
            self.watch.count(f"{name} by a mask")
        elif not all(known or tensor.dim() == 0 for known, tensor in zip(there, tensors, strict=True)):
            self.watch.count(f"{name} of a tensor on the host")
