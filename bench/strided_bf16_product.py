"""Checks whether torch's bfloat16 product on this CPU reads outside of a strided first operand.

    python bench/strided_bf16_product.py

The script needs only torch, because it is meant as a bug report to torch and oneDNN. The fault was seen with torch
2.13.0 (CPU build) on an Intel Xeon with AMX. It was not seen with ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16``, in float16
or float32, or for numbers of columns that are multiples of 32. The script writes a matrix of ones into the first
columns of a wider matrix of NaN, which unwritten memory may also hold; every sum should be the number of columns. The
project's own products avoid the fault with ``balcaprl.kernels.support.products``.

The exit status is 1 if any product is wrong, otherwise 0.
"""

from __future__ import annotations

import torch

ROWS, OUTPUTS, WIDER = 33, 64, 7
COLUMNS = (7, 8, 15, 16, 31, 32, 33, 34, 48, 49, 63, 64, 79, 80, 96, 97, 129, 1001, 1002)


def verdict(first: torch.Tensor) -> str:
    """The verdict on the product of ``first``, a matrix of ones, with a second one: right, wrong or not finite."""
    product = torch.mm(first, torch.ones(first.shape[1], OUTPUTS, dtype=first.dtype)).float()
    if not product.isfinite().all():
        return f"{int((~product.isfinite()).sum())} not finite"
    wrong = (product - first.shape[1]).abs().max() > 0.01 * first.shape[1]
    return "wrong" if wrong else "right"


def main() -> int:
    """Prints each dtype and number of columns with a wrong product, and a summary; returns the exit status."""
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(next((line.strip() for line in torch.__config__.show().splitlines() if "MKL-DNN" in line), "no oneDNN"))
    num_faults = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in COLUMNS:
            wide = torch.full((ROWS, columns + WIDER), torch.nan, dtype=dtype)
            strided = wide[:, :columns].fill_(1.0)
            found = {"strided": verdict(strided), "contiguous": verdict(strided.contiguous())}
            if set(found.values()) != {"right"}:
                num_faults += 1
                told = ", ".join(f"{layout} {what}" for layout, what in found.items())
                print(f"{dtype}, ({ROWS}, {columns}) with a row stride of {columns + WIDER}: {told}")
    print(f"{num_faults} faults" if num_faults else "all products are right")
    return 1 if num_faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
