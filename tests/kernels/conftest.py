"""Fixtures of the kernels' tests.

``BALCAPRL_TEST_GPU=1 pytest -m interpreter tests/kernels``: the tests of the Triton kernels, compiled and run on a GPU. They
stay as they are, with tensors on the CPU. Only launches change: what a kernel is given is copied to the GPU, storage
by storage, so that strides, offsets and aliases are kept, and copied back afterwards. It is what Triton's interpreter
does for tensors on a GPU, the other way round. Launch tables are the GPU's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from balcaprl.kernels.support import launch, native


@pytest.fixture(autouse=True, scope="session")
def launches_on_gpu() -> Iterator[None]:
    """Sends every Triton launch of the session to the GPU, if that is asked for."""
    if os.environ.get("BALCAPRL_TEST_GPU") != "1":
        yield
        return
    from triton.runtime.jit import JITFunction

    device = torch.device("cuda", torch.cuda.current_device())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "check_triton", lambda _: None)
        patch.setattr(launch, "table_architecture", lambda _: launch._cuda_table_architecture(device.index))
        patch.setattr(JITFunction, "run", _run_on(device, JITFunction.run))
        yield


@pytest.fixture
def restored_level() -> Iterator[None]:
    """The test may ask for instruction sets; afterwards the one in use is that of the environment."""
    yield
    native.set_simd_level(os.environ.get(native.SIMD_VARIABLE))


@pytest.fixture(params=native.SIMD_LEVELS)
def level(request: pytest.FixtureRequest, restored_level: None) -> str:
    """Runs the test at one instruction set; those that the machine lacks are not there to be tested."""
    if native.set_simd_level(request.param) != request.param:
        pytest.skip(f"this machine has no {request.param}")
    return str(request.param)


def _run_on(device: torch.device, run: Callable[..., Any]) -> Callable[..., Any]:
    def moved_run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        copies: dict[tuple[int, int], tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_cuda:
                return value
            storage = value.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes())
            if key not in copies:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
                copies[key] = (storage, copy.copy_(storage, False))
            view = torch.empty(0, dtype=value.dtype, device=device)
            return view.set_(copies[key][1], value.storage_offset(), value.shape, value.stride())

        result = run(kernel, *map(moved, arguments), **{k: moved(v) for k, v in options.items()})
        for storage, copy in copies.values():
            storage.copy_(copy, False)
        return result

    return moved_run
