"""Launch tables of the Triton kernels, and the records that describe the kernels to the compile suite.

This module does not import triton, so that ``balcaprl.kernels`` can be imported without triton. It has three parts:

- ``TABLES``: tile sizes, warps and pipeline stages of each kernel, per architecture and storage width. ``launch`` looks
  them up; a launcher writes ``kernel[grid](..., **launch("_logits_stats_kernel", x.device, x.dtype).kwargs())``.
- ``KernelSpec``: one compiled variant of a kernel, with the requirements on its machine code. A module that has kernels
  lists their specs in ``KERNEL_SPECS``; ``bench/compile_report.py`` and ``tests/kernels/test_compiled.py`` read them.
- ``check_triton``: checks whether Triton kernels can run on a device at all.

Rows are keyed by (compute capability x 10, bytes per element). ``table_architecture`` maps a device to one of
``ARCHITECTURES``, and the row with the highest capability up to that architecture applies. sm_86, sm_89 and sm_120 have
99 KiB of shared memory per block and no wgmma or tcgen05 instructions, so they take the rows of sm_80, and the compile
suite limits those rows to 99 KiB.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

ARCHITECTURES = (80, 90, 100)
"""Architectures that have launch tables and that the compile suite compiles for: A100, H100, B200."""

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Triton's names for the storage dtypes that the kernels accept."""
_NAMES = {**TRITON_TYPES, torch.float64: "fp64"}


@dataclass(frozen=True)
class Launch:
    """One row of a launch table: how a kernel is compiled and launched."""

    blocks: Mapping[str, int]
    """Tile sizes, keyed by the name of the kernel's constexpr."""
    num_warps: int
    num_stages: int = 1

    def kwargs(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch. ``enable_fp_fusion`` (fused multiply-add) is set explicitly because Triton 3.9
        warns that its default (on) will change."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**self.blocks, **options}


Table = Mapping[tuple[int, int], Launch]


def _streaming(half: Launch, single: Launch) -> Table:
    """Rows of a memory-bound kernel: the same on every architecture.

    Such a kernel only needs enough bytes in flight and enough blocks, whatever the architecture.
    """
    return {(80, 2): half, (80, 4): single}


def _products(half: Launch, half_90: Launch, half_100: Launch, single: Launch) -> Table:
    """Rows of a matrix product: half precision by architecture, and one float32 row, which uses no tensor core."""
    return {(80, 2): half, (90, 2): half_90, (100, 2): half_100, (80, 4): single}


def _tile(tokens: int, columns: int, dims: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_T": tokens, "BLOCK_V": columns, "BLOCK_D": dims}, warps, stages)


TABLES: dict[str, Table] = {
    "_adamw_squares_kernel": _streaming(Launch({"BLOCK": 2048}, 8), Launch({"BLOCK": 2048}, 8)),
    "_adamw_norms_kernel": {(80, 8): Launch({"BLOCK_C": 2048}, 8)},
    "_adamw_direction_kernel": _streaming(Launch({"BLOCK": 1024}, 4), Launch({"BLOCK": 1024}, 4)),
    # Four elements per thread: with eight, a thread takes so many registers that too few loads are in flight.
    "_adamw_apply_kernel": _streaming(Launch({"BLOCK": 512}, 4), Launch({"BLOCK": 512}, 4)),
    # With BLOCK_VALUES of 1024 the gdpo variant, which has the batch step, spills registers on sm_90 and sm_100.
    "_grouped_advantages_kernel": {
        (80, 4): Launch({"BLOCK_VALUES": 512}, 8),
        (80, 8): Launch({"BLOCK_VALUES": 512}, 8),
    },
    "_token_batch_kernel": {(80, 4): Launch({"BLOCK_T": 1024}, 8)},
    "_token_loss_kernel": {(80, 4): Launch({"BLOCK_T": 1024}, 8)},
    "_token_sums_kernel": {(80, 8): Launch({"BLOCK_P": 128}, 4)},
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
    "_head_scale_kernel": _streaming(Launch({"BLOCK": 4096}, 8), Launch({"BLOCK": 2048}, 8)),
    "_logits_stats_kernel": _streaming(Launch({"BLOCK_V": 2048}, 2), Launch({"BLOCK_V": 2048}, 4)),
    "_logits_gradient_kernel": _streaming(Launch({"BLOCK_V": 2048}, 4), Launch({"BLOCK_V": 1024}, 4)),
    "_join_heads_kernel": _streaming(Launch({"BLOCK_T": 16}, 4), Launch({"BLOCK_T": 16}, 4)),
    # Rows of up to 8192 columns stay in registers, so the backward, which holds four of them, takes more warps.
    "_rms_norm_kernel": _streaming(Launch({"BLOCK_VALUES": 2048}, 4), Launch({"BLOCK_VALUES": 2048}, 4)),
    "_rms_norm_backward_kernel": _streaming(Launch({"BLOCK_VALUES": 2048}, 8), Launch({"BLOCK_VALUES": 2048}, 8)),
    "_rotate_kernel": _streaming(Launch({"BLOCK_VALUES": 1024}, 4), Launch({"BLOCK_VALUES": 1024}, 4)),
    "_silu_mul_kernel": _streaming(Launch({"BLOCK_VALUES": 1024}, 4), Launch({"BLOCK_VALUES": 1024}, 4)),
    "_silu_mul_backward_kernel": _streaming(Launch({"BLOCK_VALUES": 1024}, 4), Launch({"BLOCK_VALUES": 1024}, 4)),
    # The rows of sm_90 are the fastest that do not spill (bench/tune.py on an H200). The other rows have the largest
    # tiles that keep a head dimension of 128 in registers.
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
"""Launch table of each kernel, by kernel name; a table's rows are keyed by (architecture, bytes per element)."""


def launch(kernel: str, device: torch.device | int, dtype: torch.dtype) -> Launch:
    """Looks up the row of the launch table that applies to a kernel.

    Args:
        kernel: name of the kernel's function, such as ``_logits_stats_kernel``.
        device: device that the kernel runs on, or one of ``ARCHITECTURES``. A CPU (the interpreter) takes the rows of
            sm_80.
        dtype: storage dtype of the kernel's tensors; only its width selects the row.

    Raises:
        ValueError: the table has no row for this kernel, architecture and width.
    """
    arch = device if isinstance(device, int) else table_architecture(device)
    table = TABLES.get(kernel, {})
    fits = [key for key in table if key[0] <= arch and key[1] == dtype.itemsize]
    if not fits:
        raise ValueError(f"kernel: no launch table row for {kernel} on sm_{arch} with {dtype}")
    return table[max(fits)]


def table_architecture(device: torch.device) -> int:
    """The one of ``ARCHITECTURES`` whose rows apply to a device."""
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
    """Whether triton is installed; looks for the package without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on CPU tensors. Triton reads TRITON_INTERPRET when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True", "on")


def check_triton(device: torch.device) -> None:
    """Checks that ``impl="triton"`` can run on ``device``.

    Raises:
        ValueError: it cannot run; the message says why and what to do.
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
    """Context in which ``device`` is the current CUDA device, on which Triton launches kernels; no effect on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Description of a kernel for the compile suite.


@dataclass(frozen=True)
class Work:
    """The work of one launch at a real shape, counted by hand."""

    shape: str
    """The sizes of that shape, such as ``T=8192 V=151936``."""
    floor_bytes: int
    """Bytes that any implementation of this step must move: every input read once and every output written once."""
    moved_bytes: int
    """Bytes that this kernel requests from global memory, including repeated reads, which a cache may serve."""
    operations: int
    """Number of floating-point operations; a fused multiply-add counts as two."""
    unit: Literal["tensor", "fp32", "fp64"] = "fp32"
    """Hardware that executes the operations: half-precision tensor cores, or ordinary float32 or float64 lanes."""


@dataclass(frozen=True)
class KernelSpec:
    """One variant of a kernel: what ``triton.compile`` needs, and the requirements on the machine code."""

    kernel: Callable[..., object]
    """The ``triton.jit`` function."""
    dtype: torch.dtype
    """Storage dtype of the variant; it is part of the variant's name and selects the launch table's row."""
    arguments: Mapping[str, str]
    """Triton type of every argument that is not a constexpr, such as ``*bf16``, ``i64``, ``fp32``."""
    constexprs: Mapping[str, object]
    """The constexprs that do not come from the launch table; arguments passed as None belong here."""
    work: Callable[[Launch], Work]
    """Function from a row of the launch table to the work of one launch at a real shape."""
    variant: str = ""
    """Name that distinguishes variants of the same kernel and dtype."""
    divisible: frozenset[str] = field(default_factory=frozenset)
    """Names of the integer arguments that are multiples of 16 at real shapes; pointers always are, because torch aligns
    what it allocates. Triton specialises a launch on this property, and can only then prove that wide accesses are
    aligned. An argument that changes from batch to batch and affects no alignment belongs in the kernel's
    ``do_not_specialize``; otherwise a training step would now and then wait seconds for a compilation."""
    wide_load: bool = True
    """Whether the kernel must load at least 128 bits at once from global memory, or use the tensor memory accelerator
    for loads."""
    wide_store: bool = False
    """Whether the kernel must store at least 128 bits at once to global memory, or use the tensor memory accelerator
    for stores."""
    tensor_core: bool = False
    """Whether the kernel must use the architecture's tensor-core instruction."""

    @property
    def name(self) -> str:
        """Kernel, dtype and variant joined by hyphens, as tables and tests show it."""
        kernel: str = self.kernel.__name__
        return "-".join(part for part in (kernel, _NAMES[self.dtype], self.variant) if part)

    def launch(self, arch: int) -> Launch:
        """The row of the launch table for one of ``ARCHITECTURES``."""
        return launch(self.kernel.__name__, arch, self.dtype)


_PACKAGE = __package__.rpartition(".")[0]


def registered_kernels() -> list[KernelSpec]:
    """Collects the ``KERNEL_SPECS`` of all modules of this package, in the order of the modules' names; imports triton.

    Raises:
        ValueError: two variants have the same name.
    """
    specs: list[KernelSpec] = []
    ops = Path(__file__).parents[1]
    for path in sorted(ops.glob("*/*.py")):
        module = ".".join([_PACKAGE, *path.relative_to(ops).with_suffix("").parts])
        specs += getattr(importlib.import_module(module), "KERNEL_SPECS", ())
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"KERNEL_SPECS: {name} is listed {names.count(name)} times; tell them apart by variant")
    return specs
