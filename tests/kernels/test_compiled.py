"""Every registered Triton kernel, compiled for A100, H100 and B200 with its real launch table, held to what its machine
code must show and to the committed report (``kernels/compile_report.md``). No GPU is needed."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from balcaprl.kernels.support import launch
from balcaprl.kernels.support.launch import KernelSpec, Launch, Work

# As for `python bench/compile_report.py`: bench is no part of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import compile_report
from compile_report import Compiled

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = {(row.kernel, row.arch): row for row in compile_report.read_report()}
KERNEL_FILES = sorted((ROOT / "kernels" / "ops").rglob("*.py"))

pytestmark = pytest.mark.toolchain


def work(_: Launch) -> Work:
    return Work(shape="T=1", floor_bytes=2_039_000, moved_bytes=4_078_000, operations=0)


def _kernel() -> None:
    """Stands for a kernel in tests of the rules."""


SPEC = KernelSpec(
    kernel=_kernel,
    dtype=torch.bfloat16,
    arguments={},
    constexprs={},
    work=work,
    wide_store=True,
    tensor_core=True,
)
GOOD = Compiled(
    kernel="_kernel-bf16",
    arch=90,
    blocks={},
    num_warps=8,
    num_stages=3,
    registers=128,
    stack_bytes=0,
    spills=0,
    shared_bytes=98304,
    blocks_per_sm=2,
    occupancy=0.25,
    load_bits=128,
    store_bits=128,
    tensor_core="HGMMA.64x128x16.F32.BF16",
    shape="T=1",
    floor_bytes=1,
    moved_bytes=1,
    operations=1,
    predicted_us=(1.0, 1.0),
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Compiled]:
    """All kernels, compiled now, in a process that cannot be interpreting."""
    pytest.importorskip("triton", reason="compiling Triton kernels needs triton")
    output = tmp_path_factory.mktemp("compiled") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "compile_report.py"), "--output", str(output)]
    # Its exit status says whether all holds; the tests below say what does not.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert output.is_file(), done.stderr[-4000:]
    return {(row.kernel, row.arch): row for row in compile_report.read_report(output)}


@pytest.fixture(scope="module")
def specs() -> dict[str, KernelSpec]:
    pytest.importorskip("triton", reason="compiling Triton kernels needs triton")
    return {spec.name: spec for spec in launch.registered_kernels()}


def test_every_registered_kernel_is_in_the_report(specs: dict[str, KernelSpec]) -> None:
    expected = {(name, arch) for name in specs for arch in launch.ARCHITECTURES}
    assert set(COMMITTED) == expected, "run python bench/compile_report.py"


@pytest.mark.parametrize(
    ("kernel", "arch"), COMMITTED, ids=lambda value: f"sm_{value}" if value in (80, 90, 100) else value
)
def test_machine_code(
    kernel: str, arch: int, compiled: dict[tuple[str, int], Compiled], specs: dict[str, KernelSpec]
) -> None:
    row = compiled[kernel, arch]
    assert compile_report.violations(row, specs[kernel]) == []
    assert compile_report.differences(row, COMMITTED[kernel, arch]) == [], "run python bench/compile_report.py"


def test_the_tables_show_the_committed_rows() -> None:
    text = compile_report.REPORT.with_suffix(".md").read_text(encoding="utf-8")
    compiler = text.partition("compile_report.py` (")[2].partition(");")[0]
    assert text == compile_report.render(list(COMMITTED.values()), compiler)


def test_what_is_divisible_is_specialised_on(specs: dict[str, KernelSpec]) -> None:
    """Else the report would show wider access than a launch has."""
    for name, spec in specs.items():
        plain = {p.name for p in spec.kernel.params if p.do_not_specialize}  # type: ignore[attr-defined]
        assert not plain & spec.divisible, name


def test_every_kernel_is_registered(specs: dict[str, KernelSpec]) -> None:
    defined = {
        node.name
        for path in KERNEL_FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name.endswith("_kernel")
    }
    assert {spec.kernel.__name__ for spec in specs.values()} == defined  # type: ignore[attr-defined]
    assert set(launch.TABLES) == defined


# The rules themselves: each can fail.


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"spills": 4, "stack_bytes": 16}, "spills"),
        ({"shared_bytes": 228 << 10}, "shared memory"),
        ({"blocks_per_sm": 0}, "no block"),
        ({"load_bits": 64}, "load is 64"),
        ({"store_bits": 0}, "store is 0"),
        ({"tensor_core": ""}, "missing"),
        ({"tensor_core": "HMMA.16816.F32.BF16"}, "expected HGMMA"),
    ],
)
def test_violations(changed: dict, complaint: str | None) -> None:
    found = compile_report.violations(dataclasses.replace(GOOD, **changed), SPEC)
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ({"registers": 128 + compile_report.REGISTER_MARGIN}, False),
        ({"registers": 129 + compile_report.REGISTER_MARGIN}, True),
        ({"shared_bytes": 98304 + compile_report.SHARED_MARGIN}, False),
        ({"shared_bytes": 98305 + compile_report.SHARED_MARGIN}, True),
        ({"num_warps": 4}, True),
        ({"blocks": {"BLOCK_T": 64}}, True),
        ({"load_bits": 64}, True),
        ({"moved_bytes": 2}, True),
    ],
)
def test_differences(changed: dict, stale: bool) -> None:
    assert bool(compile_report.differences(dataclasses.replace(GOOD, **changed), GOOD)) == stale


SASS = """
        /*0200*/                   LDGSTS.E.BYPASS.LTC128B.128 [R10], desc[UR4][R2.64], P0 ;
        /*0210*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R2.64] ;
        /*0220*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0230*/                   STG.E.64 desc[UR4][R2.64], R4 ;
"""


def test_reading_of_the_assembly() -> None:
    assert compile_report.widest_access(SASS, store=False) == 128
    assert compile_report.widest_access(SASS, store=True) == 64
    assert compile_report.widest_access("LDG.E.LTC128B.U16 R3", store=False) == 16
    assert compile_report.widest_access("LDG.E.ENL2.256 R3", store=False) == 256
    assert compile_report.widest_access("UTMALDG.2D [UR8]", store=False) == compile_report.TENSOR_MEMORY_BITS
    assert compile_report.widest_access("LDS.128 R3", store=False) == 0
    assert compile_report.find_tensor_core(SASS).startswith("HGMMA.64x128x16")
    assert compile_report.find_tensor_core("UTCHMMA gdesc[UR8]") == "UTCHMMA"
    assert compile_report.find_tensor_core("FFMA R1, R2, R3, R4") == ""
    assert compile_report.count_spills(SASS) == 0
    assert compile_report.count_spills("STL.64 [R1], R2 ;\n LDL R3, [R1] ;") == 2


def test_occupancy_and_prediction_by_hand() -> None:
    # 65536 registers / (128 x 32) = 16 warps = 2 blocks of 8; 228 KiB / 97 KiB = 2.
    assert compile_report.resident_blocks(90, registers=128, shared=96 << 10, warps=8) == 2
    assert compile_report.resident_blocks(90, registers=32, shared=0, warps=4) == 16
    assert compile_report.resident_blocks(80, registers=255, shared=0, warps=16) == 0
    assert compile_report.predict_us(work(GOOD), 80) == (1.0, 2.0)  # type: ignore[arg-type]
    busy = dataclasses.replace(work(GOOD), operations=312_000_000_000, unit="tensor")  # type: ignore[arg-type]
    assert compile_report.predict_us(busy, 80) == (1000.0, 1000.0)


# The launch tables.


def test_launch_takes_the_row_of_the_newest_architecture_not_above(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {(80, 2): Launch({"BLOCK": 1}, 4), (90, 2): Launch({"BLOCK": 2}, 8, 3)}
    monkeypatch.setitem(launch.TABLES, "_kernel", rows)
    assert launch.launch("_kernel", 80, torch.bfloat16).blocks == {"BLOCK": 1}
    assert launch.launch("_kernel", 100, torch.float16).blocks == {"BLOCK": 2}
    assert launch.launch("_kernel", torch.device("cpu"), torch.bfloat16).num_warps == 4
    options = launch.launch("_kernel", 90, torch.bfloat16).kwargs()
    assert options == {"BLOCK": 2, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    with pytest.raises(ValueError, match=r"^kernel: no launch table row for _kernel on sm_90 with torch.float32"):
        launch.launch("_kernel", 90, torch.float32)


def test_triton_refuses_cpu_tensors_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^impl: 'triton' runs on CPU tensors only under .* TRITON_INTERPRET=1"):
        launch.check_triton(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch.check_triton(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^impl: 'triton' runs on CUDA tensors, got tensors on meta"):
        launch.check_triton(torch.device("meta"))
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"^impl: 'triton' needs the triton package"):
        launch.check_triton(torch.device("cuda"))
