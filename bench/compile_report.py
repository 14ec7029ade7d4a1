"""Compiles every registered Triton kernel for A100, H100 and B200, without a GPU, and reads its machine code.

python bench/compile_report.py                            # compile all, write kernels/compile_report.json and .md
python bench/compile_report.py --check                    # compile all, compare with the committed table
python bench/compile_report.py --kernel logits --arch 90  # compile kernels named *logits*, print, write nothing
python bench/compile_report.py --kernel logits --update   # compile kernels named *logits*, replace only their rows
python bench/compile_report.py --kernel logits --arch 90 --sass build/sass    # also write their disassembly

The exit status is 1 if a kernel violates a requirement, or with --check if the committed table differs. Each kernel is
compiled by ``triton.compile`` with its launch table and the specialisation of a real launch (aligned pointers, sizes
that are multiples of 16). Registers and stack are read with the ``cuobjdump`` of the triton wheel, instructions with
its ``nvdisasm``. Do not run this script under TRITON_INTERPRET, because a process can either interpret or compile.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

# Set before triton is imported, because Triton 3.9 warns that the default will change. Launches also request fusion
# explicitly.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from balcaprl.kernels.support.launch import ARCHITECTURES, KernelSpec, Work, registered_kernels

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "kernels" / "compile_report.json"
TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC[A-Z]*MMA"}
"""Regular expression of each architecture's tensor-core mnemonic for half precision in the disassembly."""
TENSOR_MEMORY_BITS = 1024
"""Width in bits that a bulk copy of the tensor memory accelerator counts as."""
REGISTER_MARGIN = 16
SHARED_MARGIN = 4096
"""Registers per thread (REGISTER_MARGIN) and bytes of shared memory (SHARED_MARGIN) by which a newly compiled kernel
may differ from the committed table, because compiler versions differ in them. Other compared fields must be equal."""


@dataclass(frozen=True)
class Multiprocessor:
    """Limits per streaming multiprocessor, from "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++
    Programming Guide."""

    shared_per_block: int
    shared_total: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


MULTIPROCESSORS = {
    # sm_80 offers 163 KiB to a block, but its launch table rows also serve sm_86, sm_89 and sm_120, which offer 99 KiB.
    80: Multiprocessor(shared_per_block=99 << 10, shared_total=164 << 10),
    90: Multiprocessor(shared_per_block=227 << 10, shared_total=228 << 10),
    100: Multiprocessor(shared_per_block=227 << 10, shared_total=228 << 10),
}


@dataclass(frozen=True)
class Ceiling:
    """Published peaks of one GPU: memory bytes per second, and dense operations per second at boost clock."""

    gpu: str
    bytes_per_second: float
    tensor: float
    fp32: float
    fp64: float
    source: str


CEILINGS = {
    80: Ceiling("A100", 2.039e12, 312e12, 19.5e12, 9.7e12, "NVIDIA A100 80GB SXM data sheet"),
    90: Ceiling(
        "H100", 3.35e12, 989.4e12, 66.9e12, 33.5e12, "NVIDIA H100 SXM5 data sheet, half of the figures with sparsity"
    ),
    100: Ceiling(
        "B200", 8.0e12, 2250e12, 80e12, 40e12, "NVIDIA Blackwell architecture brief, HGX B200 at 1000 W, dense"
    ),
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel variant compiles to on one architecture."""

    kernel: str
    arch: int
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    registers: int
    """Registers per thread."""
    stack_bytes: int
    spills: int
    """Number of instructions that load from or store to local memory."""
    shared_bytes: int
    """Bytes of shared memory per block."""
    blocks_per_sm: int
    """Upper bound on resident blocks per streaming multiprocessor, from registers, shared memory and warps."""
    occupancy: float
    """Upper bound on resident warps, divided by the most that the streaming multiprocessor holds."""
    load_bits: int
    """Bits of the widest load from global memory; 0 if there is none."""
    store_bits: int
    tensor_core: str
    """The tensor-core instruction in the machine code, or ''."""
    shape: str
    floor_bytes: int
    moved_bytes: int
    operations: int
    predicted_us: tuple[float, float]
    """Microseconds predicted from the ceilings: if caches serve every repeated read, and if they serve none."""


def compile_kernel(spec: KernelSpec, arch: int, sass_folder: Path | None = None) -> Compiled:
    """Compiles one variant and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    launch = spec.launch(arch)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    built = triton.compile(_source(spec, arch), target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, sass = _disassemble(built.asm["cubin"])
    if sass_folder is not None:
        sass_folder.mkdir(parents=True, exist_ok=True)
        (sass_folder / f"{spec.name}-sm_{arch}.sass").write_text(sass, encoding="utf-8")
    warps = int(built.metadata.num_warps)
    blocks_per_sm = resident_blocks(arch, registers, built.metadata.shared, warps)
    work = spec.work(launch)
    return Compiled(
        kernel=spec.name,
        arch=arch,
        blocks=dict(launch.blocks),
        num_warps=warps,
        num_stages=launch.num_stages,
        registers=registers,
        stack_bytes=stack,
        spills=count_spills(sass),
        shared_bytes=int(built.metadata.shared),
        blocks_per_sm=blocks_per_sm,
        occupancy=blocks_per_sm * warps / MULTIPROCESSORS[arch].warps,
        load_bits=widest_access(sass, store=False),
        store_bits=widest_access(sass, store=True),
        tensor_core=find_tensor_core(sass),
        shape=work.shape,
        floor_bytes=work.floor_bytes,
        moved_bytes=work.moved_bytes,
        operations=work.operations,
        predicted_us=predict_us(work, arch),
    )


@functools.cache
def _specs() -> dict[str, KernelSpec]:
    return {spec.name: spec for spec in registered_kernels()}


def _compile_named(case: tuple[str, int], sass_folder: Path | None) -> Compiled:
    """Runs ``compile_kernel`` in a worker process. It takes the kernel's name, because a spec cannot be pickled."""
    return compile_kernel(_specs()[case[0]], case[1], sass_folder)


def compile_all(cases: Sequence[tuple[str, int]], jobs: int, sass_folder: Path | None = None) -> Iterator[Compiled]:
    """Compiles (name, architecture) pairs in ``jobs`` processes; yields results in the order of ``cases``."""
    compile_one = functools.partial(_compile_named, sass_folder=sass_folder)
    if jobs == 1 or len(cases) == 1:
        yield from map(compile_one, cases)
        return
    with ProcessPoolExecutor(min(jobs, len(cases)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_one, cases)


def _source(spec: KernelSpec, arch: int):
    """The kernel's source with the argument types and the specialisation of a real launch."""
    from triton.compiler import ASTSource

    constexprs = {**spec.constexprs, **spec.launch(arch).blocks}
    names: list[str] = spec.kernel.arg_names  # type: ignore[attr-defined]
    unknown = set(names) ^ {*constexprs, *spec.arguments}
    if unknown:
        raise ValueError(f"{spec.name}: its arguments and its registration differ in {sorted(unknown)}")
    signature = {name: spec.arguments.get(name, "constexpr") for name in names}
    aligned = {n for n, kind in signature.items() if kind.startswith("*")} | spec.divisible
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers per thread, stack bytes per thread, and the disassembly."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump shows no resource usage:\n{usage}")
    return int(found[1]), int(found[2]), sass


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def count_spills(sass: str) -> int:
    """Number of instructions that access local memory, which these kernels use only for spills."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def widest_access(sass: str, *, store: bool) -> int:
    """Bits of the widest global load or store. Asynchronous copies to shared memory count as loads."""
    if re.search(r"\bUTMASTG\b" if store else r"\bUTMALDG\b", sass):
        return TENSOR_MEMORY_BITS
    # A generic LD or ST names no address space. In these kernels it always accesses global memory.
    mnemonics = re.findall(r"\b(?:STG|ST)\.E[\w.]*" if store else r"\b(?:LDG|LDGSTS|LD)\.E[\w.]*", sass)
    return max((_bits(mnemonic.split(".")) for mnemonic in mnemonics), default=0)


def _bits(suffixes: list[str]) -> int:
    for bits in (256, 128, 64):
        if str(bits) in suffixes:
            return bits
    if {"U16", "S16"} & set(suffixes):
        return 16
    return 8 if {"U8", "S8"} & set(suffixes) else 32


def find_tensor_core(sass: str) -> str:
    """The tensor-core instruction of the newest generation that the disassembly contains, or ''."""
    for arch in sorted(TENSOR_CORE, reverse=True):
        found = re.search(rf"\b{TENSOR_CORE[arch]}[\w.]*", sass)
        if found:
            return found[0]
    return ""


def resident_blocks(arch: int, registers: int, shared: int, warps: int) -> int:
    """Number of blocks that fit one streaming multiprocessor.

    A warp gets registers in units of 256. The system reserves 1 KiB of shared memory per block besides the block's own.
    """
    limit = MULTIPROCESSORS[arch]
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = limit.registers // max(warp_registers, 1) // warps
    by_shared = limit.shared_total // (shared + 1024)
    return min(by_registers, by_shared, limit.warps // warps, limit.blocks)


def predict_us(work: Work, arch: int) -> tuple[float, float]:
    """Microseconds by the roofline model, for the fewest and the most bytes moved.

    Each is the larger of bytes over bandwidth and operations over throughput.
    """
    ceiling = CEILINGS[arch]
    seconds = work.operations / getattr(ceiling, work.unit)
    low, high = sorted((work.floor_bytes, work.moved_bytes))
    return tuple(round(1e6 * max(seconds, b / ceiling.bytes_per_second), 2) for b in (low, high))  # type: ignore[return-value]


def violations(row: Compiled, spec: KernelSpec) -> list[str]:
    """The requirements that the machine code does not meet, as sentences; empty if it meets all."""
    found = []
    if row.spills or row.stack_bytes:
        found.append(f"spills: {row.spills} instructions on {row.stack_bytes} bytes of stack")
    if row.shared_bytes > MULTIPROCESSORS[row.arch].shared_per_block:
        limit = MULTIPROCESSORS[row.arch].shared_per_block
        found.append(f"shared memory: {row.shared_bytes} bytes exceed the {limit} of a block")
    if row.blocks_per_sm < 1:
        found.append("no block fits a multiprocessor")
    if spec.wide_load and row.load_bits < 128:
        found.append(f"widest global load is {row.load_bits} bits")
    if spec.wide_store and row.store_bits < 128:
        found.append(f"widest global store is {row.store_bits} bits")
    if spec.tensor_core and not re.match(TENSOR_CORE[row.arch], row.tensor_core):
        found.append(f"tensor-core instruction is {row.tensor_core or 'missing'}, expected {TENSOR_CORE[row.arch]}")
    return found


def differences(row: Compiled, committed: Compiled) -> list[str]:
    """The fields in which a newly compiled row differs from the committed one by more than the margins."""
    margins = {"registers": REGISTER_MARGIN, "shared_bytes": SHARED_MARGIN}
    # The first two follow from registers and shared memory; ``violations`` checks the tensor-core instruction.
    derived = {"blocks_per_sm", "occupancy", "tensor_core"}
    found = []
    new, old = asdict(row), asdict(committed)
    for name in new.keys() - derived:
        if name in margins:
            same = abs(new[name] - old[name]) <= margins[name]
        else:
            same = new[name] == old[name]
        if not same:
            found.append(f"{name}: committed {old[name]}, now {new[name]}")
    return sorted(found)


def read_report(path: Path = REPORT) -> list[Compiled]:
    """The rows of a report."""
    rows = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return [Compiled(**{**row, "predicted_us": tuple(row["predicted_us"])}) for row in rows]


def write_report(rows: list[Compiled], path: Path, compiler: str) -> None:
    """Writes the JSON, one row per line, and the Markdown tables beside it."""
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"compiler": {json.dumps(compiler)}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    path.with_suffix(".md").write_text(render(rows, compiler), encoding="utf-8")


def compiler_version() -> str:
    """The versions of Triton and of the assemblers that it calls."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    versions = sorted({get_ptxas(arch).version for arch in ARCHITECTURES})
    return f"triton {triton.__version__}, ptxas {' and '.join(versions)}"


HEADER = """# What the Triton kernels compile to

Written by `python bench/compile_report.py` ({compiler}); `tests/kernels/test_compiled.py` compiles every kernel anew and
holds it to this table. No GPU was there: registers, spills, shared memory and instructions are read from the machine code, the
times are **predictions**: the larger of bytes over memory bandwidth and operations over peak throughput, first as if caches
served every repeated read, then as if they served none. No kernel reaches them; nothing here was measured.

| architecture | GPU | bytes/s | half-precision tensor operations/s | float32 operations/s | float64 operations/s | source |
|---|---|---|---|---|---|---|
{ceilings}

`occupancy` is the bound from registers, shared memory and warps. `load` and `store` are the widest global accesses in bits.
"""


def render(rows: list[Compiled], compiler: str) -> str:
    """The report as Markdown."""
    lines = []
    for arch, c in CEILINGS.items():
        peaks = " | ".join(f"{peak / 1e12:g}e12" for peak in (c.bytes_per_second, c.tensor, c.fp32, c.fp64))
        lines.append(f"| sm_{arch} | {c.gpu} | {peaks} | {c.source} |")
    ceilings = "\n".join(lines)
    text = HEADER.format(compiler=compiler, ceilings=ceilings)
    for kernel in dict.fromkeys(row.kernel for row in rows):
        text += "\n" + _render_kernel([row for row in rows if row.kernel == kernel])
    return text


def _render_kernel(rows: list[Compiled]) -> str:
    first = rows[0]
    more = first.moved_bytes / max(first.floor_bytes, 1)
    lines = [
        f"## `{first.kernel}`",
        "",
        f"At {first.shape}: {first.floor_bytes / 1e6:.4g} MB at least, {more:.3g}x that asked for on sm_{first.arch}; "
        f"{first.operations / 1e9:.4g} GFLOP.",
        "",
        "| arch | tiles | warps x stages | registers | spills | shared KiB | occupancy | load | store | tensor core | "
        "predicted us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tiles = " ".join(f"{name}={size}" for name, size in row.blocks.items())
        times = " to ".join(dict.fromkeys(f"{t:.4g}" for t in row.predicted_us))
        lines.append(
            f"| sm_{row.arch} | {tiles} | {row.num_warps} x {row.num_stages} | {row.registers} | {row.spills} | "
            f"{row.shared_bytes / 1024:.4g} | {row.occupancy:.0%} | {row.load_bits} | {row.store_bits} | "
            f"{row.tensor_core or '-'} | {times} |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this; prints, writes nothing")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="only this one; prints, writes nothing")
    parser.add_argument("--check", action="store_true", help="compare with the committed report instead of writing it")
    parser.add_argument("--update", action="store_true", help="with --kernel: write these into the report")
    parser.add_argument("--output", type=Path, default=REPORT, help="JSON to write; the tables go beside it")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--sass", type=Path, help="folder for the disassembly")
    return parser.parse_args()


def main() -> int:
    """Compiles what the command line asks for; returns 1 if a kernel violates a requirement or the table is stale."""
    arguments = _arguments()
    specs = _specs()
    architectures = [arguments.arch] if arguments.arch else ARCHITECTURES
    cases = [(name, arch) for name in specs if arguments.kernel in name for arch in architectures]
    partial = bool(arguments.kernel or arguments.arch)
    committed = {(row.kernel, row.arch): row for row in read_report()} if arguments.check else {}
    rows, failed = [], False
    for row in compile_all(cases, arguments.jobs, arguments.sass):
        rows.append(row)
        complaints = violations(row, specs[row.kernel])
        if arguments.check:
            old = committed.pop((row.kernel, row.arch), None)
            complaints += ["not in the committed report"] if old is None else differences(row, old)
        failed |= bool(complaints)
        for complaint in complaints:
            print(f"{row.kernel} on sm_{row.arch}: {complaint}", file=sys.stderr)
    if arguments.check and not partial:
        for kernel, arch in committed:
            print(f"{kernel} on sm_{arch}: in the committed report, but not registered", file=sys.stderr)
        failed |= bool(committed)
    if partial:
        print(render(rows, compiler_version()))
    if arguments.update:
        rows = merged(read_report(), rows)
    if not arguments.check and (arguments.update or not partial):
        write_report(rows, arguments.output, compiler_version())
    return int(failed)


def merged(old: list[Compiled], new: list[Compiled]) -> list[Compiled]:
    """The rows of both lists in the order of registration; a new row replaces the old one of the same kernel."""
    rows = {(row.kernel, row.arch): row for row in [*old, *new]}
    return [rows[name, arch] for name in _specs() for arch in ARCHITECTURES if (name, arch) in rows]


if __name__ == "__main__":
    sys.exit(main())
