"""Looks at the first operand of every 16-bit matrix product on the CPU, on any processor: what could a product read beside it?

Some processors' products do read beside a strided operand (``balcaprl.kernels.support.products``), most do not, and a test that
only looks at results would say nothing there. Use it with memory that is poisoned before it is written: ``poisoned``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from balcaprl.kernels.support.products import BLOCK_COLUMNS, has_no_gaps

_MATRICES = {"mm": (0,), "bmm": (0,), "addmm": (1,), "baddbmm": (1,), "addbmm": (1,), "mv": (0,), "addmv": (1,)}
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": (0,),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (0, 1),
}
FIRST_OPERANDS = {**_MATRICES, **_ATTENTION}
"""Operator -> which arguments are first operands of its products."""


class ProductWatch(TorchDispatchMode):
    """Within, notes the products whose first operand lies beside what must not be read.

    Args:
        beyond: also what lies behind the last row counts where it is outside of the operand's memory.
    """

    def __init__(self, *, beyond: bool = True) -> None:
        super().__init__()
        self.beyond = beyond
        self.seen: list[str] = []
        """A line for each product of 16-bit numbers."""
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "balcaprl":  # look into our own operators
            with self, torch.no_grad():
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        with self:  # matmul and the like, which within our operators come whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        for index in FIRST_OPERANDS.get(name, ()):
            self._look(name, args[index])
        return func(*args, **kwargs)

    def _look(self, name: str, operand: Tensor) -> None:
        if operand.element_size() != 2 or operand.device.type != "cpu" or not operand.numel() or operand.dim() < 2:
            return
        line = f"{name} of {tuple(operand.shape)} with strides {operand.stride()}"
        self.seen.append(line)
        fault = what_is_beside(operand, beyond=self.beyond)
        if fault:
            self.faults.append(f"{line}: {fault}")


def what_is_beside(operand: Tensor, *, beyond: bool = True) -> str:
    """What is wrong with what a product may read beside an operand (..., M, K); empty if nothing is.

    Rows that lie one after the other, or are whole blocks, are read as they are. Of others the rest of the last block
    counts: it must be memory of the operand's own, and finite.
    """
    if operand.stride(-1) != 1 and operand.stride(-2) == 1:
        operand = operand.mT
    columns = operand.shape[-1]
    if operand.stride(-1) != 1 and columns > 1:
        return "its rows are not contiguous"
    if has_no_gaps(operand) or columns % BLOCK_COLUMNS == 0:
        return ""
    starts = torch.tensor([operand.storage_offset()])
    for size, stride in zip(operand.shape[:-1], operand.stride()[:-1], strict=True):
        starts = (starts[:, None] + torch.arange(size) * stride).flatten()
    read = (starts[:, None] + torch.arange(columns, columns + -columns % BLOCK_COLUMNS)).flatten()
    storage = operand.untyped_storage()
    count = storage.nbytes() // operand.element_size()
    if beyond and int(read.max()) >= count:
        return "its last row ends with its memory, and the rows are strided"
    everything = torch.empty(0, dtype=operand.dtype).set_(storage, 0, (count,), (1,))
    return "" if everything[read[read < count]].isfinite().all() else "the gaps are not finite"


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, memory that torch hands out holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
