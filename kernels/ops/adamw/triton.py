"""Launches of the Triton kernels of ``adamw_update``: all but the norms kernel are launched once for each kind of
parameters (``_Kind``: same dtypes and alignment, and whether there is a master).

The kernels find the tensors through two tables on the device. A row of ``table_T8`` holds the addresses of one
parameter's tensors and its bias corrections. The addresses of gradients change from step to step, so the table is
uploaded with every update, in one copy. A row of ``chunks_C3`` describes the work of one program: index of a row of
``table_T8``, first element, number of elements. This table depends only on the sizes and is cached.

``_adamw_squares_kernel`` writes each chunk's sum of squares of the gradient, and that of the weights.
``_adamw_norms_kernel`` adds them up and finds the clip factor. ``_adamw_direction_kernel`` writes each chunk's sum of
squares of the update that follows from this factor, and the norms kernel adds those up. The host reads the norms;
``_adamw_apply_kernel`` makes the update. Sums are taken in a fixed order: each lane adds at most 65 squares in float32,
and all further sums are in float64.

This module is imported only where ``impl="triton"`` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from balcaprl.kernels.adamw.records import (
    AdamWNorms,
    AdamWSettings,
    AdamWTensors,
    AdamWUpdate,
    bias_corrections,
)
from balcaprl.kernels.adamw.triton_kernels import (
    COLUMNS,
    FIRST,
    _adamw_apply_kernel,
    _adamw_direction_kernel,
    _adamw_norms_kernel,
    _adamw_squares_kernel,
)
from balcaprl.kernels.support.launch import KernelSpec, Launch, Work, launch, on_device

_CHUNK = 1 << 16
"""Largest number of elements for one program; a multiple of 16, so that chunks of aligned tensors are aligned."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Kind(NamedTuple):
    """What a launch is compiled for; parameters that agree in all of it share the launch."""

    parameter: torch.dtype
    gradient: torch.dtype
    has_master: bool
    aligned: bool
    """Whether all addresses are multiples of 16 bytes, so that accesses can be wide."""


class _Part(NamedTuple):
    """The parameters of one kind, as the kernels take them."""

    kind: _Kind
    table_T8: Tensor
    """int64 on the device; a view of this kind's rows in the table of all kinds."""
    corrections_T8: Tensor
    """The same memory as float64."""
    chunks_C3: Tensor
    """int64 on the device."""
    begin: int
    """Number of chunks of the kinds before this one: the index of this kind's first chunk among all chunks."""


def adamw_update(tensors: Sequence[AdamWTensors], settings: AdamWSettings) -> AdamWUpdate:
    """The same as ``balcaprl.kernels.adamw.adamw.adamw_update``; does not check arguments."""
    given = [_dense(each) for each in tensors if each.master.numel()]
    if not given:
        return AdamWUpdate(AdamWNorms(0.0, 0.0, 0.0), lambda: None)
    device = given[0].master.device
    parts = _parts(given, settings, device)
    num_chunks = sum(len(part.chunks_C3) for part in parts)
    sums_2C = torch.empty(2, num_chunks, dtype=torch.float64, device=device)
    norms_4 = torch.empty(4, dtype=torch.float64, device=device)
    add_up = functools.partial(
        _adamw_norms_kernel[(1,)],
        sums_2C,
        norms_4,
        num_chunks,
        float(settings.max_grad_norm),
        **launch("_adamw_norms_kernel", device, torch.float64).kwargs(),
    )
    with on_device(device):
        for kind, table_T8, _, chunks_C3, begin in parts:
            row = launch("_adamw_squares_kernel", device, kind.parameter)
            _adamw_squares_kernel[(len(chunks_C3),)](
                table_T8, chunks_C3, sums_2C, begin, num_chunks, _TYPES[kind.gradient], kind.aligned, **row.kwargs()
            )
        add_up(DIRECTION=False)
        for kind, table_T8, corrections_T8, chunks_C3, begin in parts:
            row = launch("_adamw_direction_kernel", device, kind.parameter)
            _adamw_direction_kernel[(len(chunks_C3),)](
                table_T8,
                corrections_T8,
                chunks_C3,
                norms_4,
                sums_2C,
                begin,
                _TYPES[kind.gradient],
                kind.aligned,
                settings.beta1,
                settings.beta2,
                settings.eps,
                **row.kwargs(),
            )
        add_up(DIRECTION=True)
    gradient, weights, direction, _ = norms_4.tolist()  # the only wait
    update = settings.lr * (direction + settings.weight_decay * weights)
    # ``given`` keeps copies of strided gradients alive until the update is made.
    return AdamWUpdate(
        AdamWNorms(gradient, update, weights), functools.partial(_apply, given, parts, norms_4, settings)
    )


def _apply(given: list[AdamWTensors], parts: list[_Part], norms_4: Tensor, settings: AdamWSettings) -> None:
    """Makes the update that has been measured."""
    device = norms_4.device
    with on_device(device):
        for kind, table_T8, corrections_T8, chunks_C3, _ in parts:
            row = launch("_adamw_apply_kernel", device, kind.parameter)
            _adamw_apply_kernel[(len(chunks_C3),)](
                table_T8,
                corrections_T8,
                chunks_C3,
                norms_4,
                float(settings.lr),
                float(1 - settings.lr * settings.weight_decay),
                _TYPES[kind.parameter],
                _TYPES[kind.gradient],
                kind.has_master,
                kind.aligned,
                settings.beta1,
                settings.beta2,
                settings.eps,
                **row.kwargs(),
            )
    # Autograd does not see what the kernels write. With a new version number, a graph that has saved the old weights
    # raises an error instead of using the new ones.
    changed = [each for each in given if each.gradient is not None]
    torch.autograd.graph.increment_version([t for each in changed for t in (each.parameter, each.master)])


def _dense(each: AdamWTensors) -> AdamWTensors:
    """Returns the same tensors, but with a contiguous gradient."""
    if each.gradient is None or each.gradient.is_contiguous():
        return each
    return each._replace(gradient=each.gradient.contiguous())


def _parts(given: list[AdamWTensors], settings: AdamWSettings, device: torch.device) -> list[_Part]:
    """Sorts the parameters by kind and uploads their table, in one copy that the host does not wait for."""
    kinds: dict[_Kind, list[tuple[AdamWTensors, list[int]]]] = {}
    for each in given:
        tensors = (each.gradient, each.parameter, each.master, each.exp_avg, each.exp_avg_sq)
        # For a parameter without a gradient the kernels read only its master.
        read = [t is not None and (each.gradient is not None or t is each.master) for t in tensors]
        addresses = [t.data_ptr() if t is not None and is_read else 0 for t, is_read in zip(tensors, read, strict=True)]
        gradient = each.parameter if each.gradient is None else each.gradient
        has_master = each.parameter is not each.master
        kind = _Kind(each.parameter.dtype, gradient.dtype, has_master, not any(a % 16 for a in addresses))
        kinds.setdefault(kind, []).append((each, addresses))
    members = [member for group in kinds.values() for member in group]
    table_T8 = torch.empty(len(members), COLUMNS.value, dtype=torch.int64, pin_memory=device.type == "cuda")
    table_T8[:, : FIRST.value] = torch.tensor([addresses for _, addresses in members], dtype=torch.int64)
    corrections = torch.tensor([(*bias_corrections(t.step, settings), 0.0) for t, _ in members], dtype=torch.float64)
    table_T8.view(torch.float64)[:, FIRST.value :] = corrections
    table_T8 = table_T8.to(device, non_blocking=True)
    parts, row, begin = [], 0, 0
    for kind, group in kinds.items():
        chunks_C3 = _chunks(tuple(each.master.numel() for each, _ in group), _CHUNK, device)
        rows_T8 = table_T8[row : row + len(group)]
        parts.append(_Part(kind, rows_T8, rows_T8.view(torch.float64), chunks_C3, begin))
        row, begin = row + len(group), begin + len(chunks_C3)
    return parts


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """(C, 3) int64 on the device: index of a tensor, first element, number of elements; no tensor is empty."""
    rows = [
        (number, start, min(chunk, size - start))
        for number, size in enumerate(sizes)
        for start in range(0, size, chunk)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(device)


# The compile suite's shape: one tensor of 2^27 elements, about as large as a language model's embedding.
_ELEMENTS = 1 << 27
_SCALARS = {"BETA1": 0.9, "BETA2": 0.99, "EPS": 1e-8}


def _specs(dtype: torch.dtype, *, aligned: bool = True) -> list[KernelSpec]:
    """The specifications of the three kernels that read parameters, for parameters and gradients of one dtype."""
    half = dtype != torch.float32
    gradient_bytes = dtype.itemsize
    # Bytes read and written per element.
    traffic = {
        _adamw_squares_kernel: gradient_bytes + 4,
        _adamw_direction_kernel: gradient_bytes + 8,
        _adamw_apply_kernel: gradient_bytes + 12 + 12 + 2 * half,
    }
    operations = {_adamw_squares_kernel: 4, _adamw_direction_kernel: 40, _adamw_apply_kernel: 44}
    arguments = {
        "table_T8": "*i64",
        "corrections_T8": "*fp64",
        "chunks_C3": "*i64",
        "norms_4": "*fp64",
        "sums_2C": "*fp64",
        "begin": "i32",
        "num_chunks": "i32",
        "lr": "fp32",
        "decay": "fp32",
    }
    constexprs = {
        "PARAMETER": _TYPES[dtype],
        "GRADIENT": _TYPES[dtype],
        "HAS_MASTER": half,
        "ALIGNED": aligned,
        **_SCALARS,
    }

    def spec(kernel) -> KernelSpec:
        def work(_: Launch) -> Work:
            moved = traffic[kernel] * _ELEMENTS + 24 * _ELEMENTS // _CHUNK
            return Work(f"elements={_ELEMENTS}", moved, moved, operations[kernel] * _ELEMENTS)

        return KernelSpec(
            kernel=kernel,
            dtype=dtype,
            arguments={name: kind for name, kind in arguments.items() if name in kernel.arg_names},
            constexprs={name: value for name, value in constexprs.items() if name in kernel.arg_names},
            work=work,
            variant="" if aligned else "unaligned",
            wide_load=aligned,
            wide_store=aligned and kernel is _adamw_apply_kernel,
        )

    return [spec(kernel) for kernel in traffic]


def _norms_spec(*, direction: bool) -> KernelSpec:
    chunks = 3_750_000_000 // _CHUNK

    def work(_: Launch) -> Work:
        moved = 8 * chunks * (1 if direction else 2)
        return Work(f"C={chunks}", moved, moved, moved // 8, "fp64")

    return KernelSpec(
        kernel=_adamw_norms_kernel,
        dtype=torch.float64,
        arguments={"sums_2C": "*fp64", "norms_4": "*fp64", "num_chunks": "i32", "max_grad_norm": "fp32"},
        constexprs={"DIRECTION": direction},
        work=work,
        variant="direction" if direction else "gradient",
        wide_load=False,  # one program; the number of chunks, any integer, masks its loads
    )


KERNEL_SPECS = [
    *_specs(torch.float32),
    *_specs(torch.bfloat16),
    *_specs(torch.float16),
    *_specs(torch.bfloat16, aligned=False),
    _norms_spec(direction=False),
    _norms_spec(direction=True),
]
