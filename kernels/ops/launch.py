"""How every Triton kernel is launched: one table per kernel, and the record by which the compile suite knows a kernel.

Three things are here, and none of them imports triton, so that a machine without it imports ``balcaprl.kernels``:

- ``TABLES``: tile sizes, warps and pipeline stages of each kernel, per architecture and storage width. ``launch`` looks
  them up; a launcher writes ``kernel[grid](..., **launch("_op_fwd_kernel", x.device, x.dtype).kwargs())``.
- ``KernelSpec``: one compiled variant of a kernel with what its machine code must show. A module that has kernels lists
  them in ``KERNEL_SPECS``; ``bench/compile_report.py`` and ``tests/kernels/test_compiled.py`` find them there.
- ``check_triton``: whether a Triton kernel can run on a device at all.

Rows are keyed by (compute capability x 10, bytes per element). The row with the highest capability that does not exceed
the device's own table applies: sm_86, sm_89 and sm_120 have 99 KiB of shared memory per block and no
wgmma or tcgen05 instructions, so they take the rows of sm_80, and the suite holds those rows to 99 KiB.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

ARCHITECTURES = (80, 90, 100)
"""Those that have tables and are compiled in the suite: A100, H100, B200."""

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Triton's names of the storage dtypes that kernels take."""
_NAMES = {**TRITON_TYPES, torch.float64: "fp64"}


@dataclass(frozen=True)
class Launch:
    """One row: how a kernel is compiled and launched."""

    blocks: Mapping[str, int]
    """Tile sizes, by the name of the kernel's constexpr."""
    num_warps: int
    num_stages: int = 1

    def kwargs(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch. Contraction to fused multiply-add is asked for by name: the default of Triton
        3.9 (on) warns that it will change."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**self.blocks, **options}


Table = Mapping[tuple[int, int], Launch]


def _streaming(half: Launch, single: Launch) -> Table:
    """The same rows on every architecture: what a memory-bound kernel wants is bytes in flight, and enough blocks."""
    return {(80, 2): half, (80, 4): single}


def _products(half: Launch, half_90: Launch, half_100: Launch, single: Launch) -> Table:
    """Rows of a matrix product in half precision by architecture, and in float32, where no tensor core helps."""
    return {(80, 2): half, (90, 2): half_90, (100, 2): half_100, (80, 4): single}


def _tile(tokens: int, columns: int, dims: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_T": tokens, "BLOCK_V": columns, "BLOCK_D": dims}, warps, stages)


TABLES: dict[str, Table] = {
    # With 1024 values the batch step's variant spills on sm_90 and sm_100.
    "_grouped_advantages_kernel": {
        (80, 4): Launch({"BLOCK_VALUES": 512}, 8),
        (80, 8): Launch({"BLOCK_VALUES": 512}, 8),
    },
    "_token_batch_kernel": {(80, 4): Launch({"BLOCK_T": 1024}, 8)},
    "_token_loss_kernel": {(80, 4): Launch({"BLOCK_T": 1024}, 8)},
    "_token_sums_kernel": {(80, 8): Launch({"BLOCK_P": 128}, 4)},
    # Three stages on sm_90: with four the entropy's variant spills.
    "_head_stats_kernel": _products(
        _tile(128, 128, 64, 8, 3), _tile(256, 128, 64, 8, 4), _tile(128, 128, 64, 8, 4), _tile(64, 64, 32, 8, 2)
    ),
    "_head_grad_logits_kernel": _products(
        _tile(128, 128, 64, 8, 3), _tile(128, 256, 64, 8, 3), _tile(128, 128, 64, 8, 4), _tile(64, 64, 32, 4, 2)
    ),
    "_head_grad_hidden_kernel": _products(
        _tile(128, 64, 128, 8, 3), _tile(128, 64, 128, 8, 4), _tile(128, 64, 128, 8, 4), _tile(64, 32, 64, 4, 2)
    ),
    "_head_grad_weight_kernel": _products(
        _tile(64, 128, 128, 8, 3), _tile(64, 128, 128, 8, 4), _tile(64, 128, 128, 8, 4), _tile(32, 64, 64, 8, 2)
    ),
    "_logits_stats_kernel": _streaming(Launch({"BLOCK_V": 2048}, 2), Launch({"BLOCK_V": 2048}, 4)),
    "_logits_gradient_kernel": _streaming(Launch({"BLOCK_V": 2048}, 4), Launch({"BLOCK_V": 1024}, 4)),
    # On sm_90 the fastest that spill nothing (bench/tune.py on an H200); elsewhere the largest that keep a head of 128 in
    # registers.
    "_shared_prefix_fwd_kernel": {
        (80, 2): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
        (90, 2): Launch({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),
        (100, 2): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
        (80, 4): Launch({"BLOCK_M": 32, "BLOCK_N": 16}, 8),
    },
    "_shared_prefix_delta_kernel": _streaming(Launch({"BLOCK_T": 16}, 4), Launch({"BLOCK_T": 16}, 4)),
    "_shared_prefix_dq_kernel": {
        (80, 2): Launch({"BLOCK_M": 64, "BLOCK_N": 64}, 8, 2),
        (90, 2): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
        (100, 2): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
        (80, 4): Launch({"BLOCK_M": 16, "BLOCK_N": 32}, 8),
    },
    "_shared_prefix_dkdv_kernel": {
        (80, 2): Launch({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 2),
        (90, 2): Launch({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 2),
        (100, 2): Launch({"BLOCK_M": 64, "BLOCK_N": 128}, 8),
        (80, 4): Launch({"BLOCK_M": 16, "BLOCK_N": 16}, 8),
        (100, 4): Launch({"BLOCK_M": 16, "BLOCK_N": 32}, 8),
    },
}
"""Kernel name to its rows, keyed by (architecture, bytes per element)."""

_overrides: dict[str, dict[str, int]] = {}


def launch(kernel: str, device: torch.device | int, dtype: torch.dtype) -> Launch:
    """The row that applies.

    Args:
        kernel: its function's name, such as ``_logits_loss_fwd_kernel``.
        device: where it runs, or an architecture of ``ARCHITECTURES``. A CPU (the interpreter) takes the rows of sm_80.
        dtype: storage dtype that the rows distinguish; only its width counts.

    Raises:
        ValueError: there is no such row.
    """
    arch = device if isinstance(device, int) else table_architecture(device)
    table = TABLES.get(kernel, {})
    fits = [key for key in table if key[0] <= arch and key[1] == dtype.itemsize]
    if not fits:
        raise ValueError(f"kernel: no launch table row for {kernel} on sm_{arch} with {dtype}")
    row = table[max(fits)]
    changed = _overrides.get(kernel)
    if not changed:
        return row
    return Launch({**row.blocks, **changed}, row.num_warps, row.num_stages)


@contextlib.contextmanager
def overridden(kernel: str, **blocks: int) -> Iterator[None]:
    """For tests: other tile sizes within the context, so that small tensors take many tiles under the interpreter."""
    _overrides[kernel] = blocks
    try:
        yield
    finally:
        del _overrides[kernel]


def table_architecture(device: torch.device) -> int:
    """The architecture of ``ARCHITECTURES`` whose rows a device takes."""
    if device.type != "cuda":
        return 80
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_table_architecture(index)


@functools.cache
def _cuda_table_architecture(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return {9: 90, 10: 100}.get(major, 80)


# Whether a Triton kernel can run.


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on CPU tensors. It is decided when triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True", "on")


def check_triton(device: torch.device) -> None:
    """Checks that ``impl="triton"`` can run on ``device``.

    Raises:
        ValueError: it cannot; the message says why and what to do.
    """
    if not has_triton():
        raise ValueError("impl: 'triton' needs the triton package, which is not installed")
    if device.type == "cpu" and not interpreting():
        raise ValueError(
            "impl: 'triton' runs on CPU tensors only under Triton's interpreter: set TRITON_INTERPRET=1 before Python "
            "starts, or use 'native', 'reference' or 'auto'"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"impl: 'triton' runs on CUDA tensors, got tensors on {device}")


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current CUDA device: makes it the one that the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# What the compile suite knows of a kernel.


@dataclass(frozen=True)
class Work:
    """What one launch does at a real shape, counted by hand; sizes in bytes."""

    shape: str
    """Named sizes, such as ``T=8192 V=151936``."""
    floor_bytes: int
    """The least that any implementation of this step moves: every input read once, every output written once."""
    moved_bytes: int
    """What this kernel asks of global memory, reads that tiles repeat included (a cache may serve those)."""
    operations: int
    """Floating-point operations, a fused multiply-add counted as two."""
    unit: Literal["tensor", "fp32", "fp64"] = "fp32"
    """What executes them: tensor cores in half precision, or ordinary float32 or float64 lanes."""


@dataclass(frozen=True)
class KernelSpec:
    """One variant of a kernel, as ``triton.compile`` needs it, and what its machine code must show."""

    kernel: Callable[..., object]
    """The ``triton.jit`` function."""
    dtype: torch.dtype
    """Names the variant, and the launch table's row."""
    arguments: Mapping[str, str]
    """Triton type of every argument that is not a constexpr, such as ``*bf16``, ``i64``, ``fp32``."""
    constexprs: Mapping[str, object]
    """The constexprs that do not come from the launch table; arguments passed as None belong here."""
    work: Callable[[Launch], Work]
    """Of one launch at a real shape, given the tile sizes."""
    variant: str = ""
    """Tells variants of the same kernel and dtype apart."""
    divisible: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that are multiples of 16 at real shapes; pointers always are, as torch allocates them. Triton
    specialises a launch on that, and only then proves wide access to be aligned. What differs from one batch to the next
    and aligns nothing is ``do_not_specialize``: else a step now and then would wait seconds for a compiler."""
    wide_load: bool = True
    """It must load 128 bits at once from global memory (or more, or by the tensor memory accelerator)."""
    wide_store: bool = False
    """It must store so."""
    tensor_core: bool = False
    """It must use the architecture's tensor-core instruction."""

    @property
    def name(self) -> str:
        """Kernel, dtype and variant, as tables and tests show it."""
        kernel: str = self.kernel.__name__
        return "-".join(part for part in (kernel, _NAMES[self.dtype], self.variant) if part)

    def launch(self, arch: int) -> Launch:
        """Its row on one of ``ARCHITECTURES``."""
        return launch(self.kernel.__name__, arch, self.dtype)


def registered_kernels() -> list[KernelSpec]:
    """Every ``KERNEL_SPECS`` of the package's modules, in the order of their names. Imports triton.

    Raises:
        ValueError: two variants have the same name.
    """
    specs: list[KernelSpec] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        specs += getattr(importlib.import_module(f"{__package__}.{path.stem}"), "KERNEL_SPECS", ())
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"KERNEL_SPECS: {name} is listed {names.count(name)} times; tell them apart by variant")
    return specs
