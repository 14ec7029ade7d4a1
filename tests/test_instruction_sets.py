"""Which levels a processor has, and that each is tried by itself, whatever became of the others."""

from __future__ import annotations

import os
import subprocess
from types import SimpleNamespace

import instruction_sets
import pytest

AVX2 = "sse4_1 sse4_2 avx avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", []),
        ("fpu sse4_1", []),
        (AVX2, ["sse4", "avx", "avx2"]),
        (AVX512, ["sse4", "avx", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]),
        (f"{AVX512} avx_vnni avx512_fp16 amx_tile amx_int8 amx_bf16", None),
    ],
)
def test_levels_of_a_processor(flags: str, names: list[str] | None) -> None:
    found = [level.name for level in instruction_sets.levels_of(flags)]
    assert found == (names if names is not None else [level.name for level in instruction_sets.LEVELS[:-1]])


def test_the_levels_of_this_processor_are_told() -> None:
    flags = instruction_sets.cpuinfo().get("flags", "")
    assert all(level.name in instruction_sets.description() for level in instruction_sets.levels_of(flags))


def test_every_level_runs_in_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ran: list[dict[str, str]] = []

    def run(command: list[str], env: dict[str, str], **_) -> SimpleNamespace:
        assert os.path.isdir(env["TORCHINDUCTOR_CACHE_DIR"])
        ran.append(env)
        return SimpleNamespace(returncode=int(env["BALCAPRL_SIMD"] == "avx2"))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(instruction_sets, "cpuinfo", lambda: {"flags": AVX512})
    assert instruction_sets.main(["-x"]) == 1
    assert [env["ONEDNN_MAX_CPU_ISA"] for env in ran] == [
        level.environment["ONEDNN_MAX_CPU_ISA"] for level in instruction_sets.levels_of(AVX512)
    ]
    assert len({env["TORCHINDUCTOR_CACHE_DIR"] for env in ran}) == len(ran)
    assert not any(os.path.exists(env["TORCHINDUCTOR_CACHE_DIR"]) for env in ran)
    assert capsys.readouterr().out.endswith("failed as avx2\n")


def test_nothing_to_try_is_told(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(instruction_sets, "cpuinfo", dict)
    assert instruction_sets.main([]) == 0
    assert "nothing to try" in capsys.readouterr().out
