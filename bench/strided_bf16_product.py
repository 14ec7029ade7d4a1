"""Does torch's bfloat16 product on this CPU read beside its first operand? ``python bench/strided_bf16_product.py``

Needs torch alone: it is the report to torch and oneDNN. Seen with torch 2.13.0 (CPU build) on an Intel Xeon with AMX; not with
``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16``, not in float16 or float32, and not for columns that are multiples of 32. A matrix
of ones is written into the first columns of a wider one that is NaN, as unwritten memory may be; every sum should be the
number of columns. ``balcaprl.kernels.products`` keeps the project's own products out of this.

Exit status: 1 if a product of a strided operand is not what that of a contiguous one is, else 0.
"""

from __future__ import annotations

import torch

ROWS, OUTPUTS, WIDER = 33, 64, 7
COLUMNS = (7, 8, 15, 16, 31, 32, 33, 34, 48, 49, 63, 64, 79, 80, 96, 97, 129, 1001, 1002)


def verdict(first: torch.Tensor) -> str:
    """What becomes of the product of a matrix of ones with another."""
    product = torch.mm(first, torch.ones(first.shape[1], OUTPUTS, dtype=first.dtype)).float()
    if not product.isfinite().all():
        return f"{int((~product.isfinite()).sum())} not finite"
    wrong = (product - first.shape[1]).abs().max() > 0.01 * first.shape[1]
    return "wrong" if wrong else "right"


def main() -> int:
    """Prints a line for each dtype and number of columns that is not right, and a summary."""
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
