"""The kernels' tests once for each instruction set that this processor has, as if it were an older one:
``python tests/helpers/instruction_sets.py [pytest options]``, the second part of continuous integration.

Four libraries choose code by the processor, each told otherwise by a variable of its own: oneDNN and MKL (torch's matrix
products), torch's own loops, and the native library. A level sets all four to what a processor of that age has, so that
each of their levels is tried wherever the tests run, AMX where it is there.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "BALCAPRL_SIMD")
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})


class Level(NamedTuple):
    """What a processor of one age has."""

    name: str
    flags: frozenset[str]
    """What /proc/cpuinfo lists where it is there, beside what the level's forerunners have."""
    values: tuple[str, str, str, str]
    """Of ``VARIABLES``."""

    @property
    def environment(self) -> dict[str, str]:
        return dict(zip(VARIABLES, self.values, strict=True))


LEVELS = (
    Level("sse4", frozenset({"sse4_1", "sse4_2"}), ("SSE41", "SSE4_2", "default", "plain")),
    Level("avx", frozenset({"avx"}), ("AVX", "AVX", "default", "plain")),
    Level("avx2", frozenset({"avx2", "fma"}), ("AVX2", "AVX2", "avx2", "avx2")),
    Level("avx2_vnni", frozenset({"avx2", "fma", "avx_vnni"}), ("AVX2_VNNI", "AVX2_E1", "avx2", "avx2")),
    Level("avx512", _AVX512, ("AVX512_CORE", "AVX512", "avx512", "avx512")),
    Level("avx512_vnni", _AVX512 | {"avx512_vnni"}, ("AVX512_CORE_VNNI", "AVX512_E1", "avx512", "avx512")),
    Level("avx512_bf16", _AVX512 | {"avx512_bf16"}, ("AVX512_CORE_BF16", "AVX512_E2", "avx512", "avx512")),
    Level("avx512_fp16", _AVX512 | {"avx512_fp16"}, ("AVX512_CORE_FP16", "AVX512_E3", "avx512", "avx512")),
    Level("amx", frozenset({"amx_tile", "amx_int8", "amx_bf16"}), ("AVX512_CORE_AMX", "AVX512_E4", "avx512", "avx512")),
    Level("amx_fp16", frozenset({"amx_fp16"}), ("AVX512_CORE_AMX_FP16", "AVX512_E5", "avx512", "avx512")),
)

NO_PRODUCTS = ("test_build.py", "test_compiled.py", "test_cuda.py", "test_sanitized.py")
"""Tests of ``tests/kernels`` that choose their processor themselves."""


def cpuinfo(path: Path = Path("/proc/cpuinfo")) -> Mapping[str, str]:
    """The first processor's entries; empty where there is no such file."""
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def levels_of(flags: str) -> list[Level]:
    """The levels of a processor with these flags, the oldest first."""
    return [level for level in LEVELS if level.flags <= set(flags.split())]


def description() -> str:
    """This processor, its levels, and what the four libraries were told, in a line for the log."""
    info = cpuinfo()
    told = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    levels = " ".join(level.name for level in levels_of(info.get("flags", ""))) or "none that is known"
    return f"{info.get('model name', platform.processor() or platform.machine())}; levels: {levels}; " + (
        "told: " + " ".join(told) if told else "told nothing"
    )


def main(options: list[str]) -> int:
    """The exit status: 0 if all levels pass."""
    levels = levels_of(cpuinfo().get("flags", ""))
    if not levels:
        print(
            f"{platform.machine()} has none of the levels {', '.join(level.name for level in LEVELS)}: nothing to try"
        )
        return 0
    failed = []
    for level in levels:
        told = " ".join(f"{name}={value}" for name, value in level.environment.items())
        print(f"--- as {level.name}: {told}", flush=True)
        ignored = [f"--ignore=tests/kernels/{name}" for name in NO_PRODUCTS]
        command = [sys.executable, "-m", "pytest", "tests/kernels", *ignored, *options]
        # torch.compile's cache does not tell levels apart: what it compiled for one writes past the ends on another.
        with tempfile.TemporaryDirectory(prefix="torchinductor_") as cache:
            environment = {**os.environ, **level.environment, "TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if done.returncode:
            failed.append(level.name)
    print(f"failed as {', '.join(failed)}" if failed else f"passed as {', '.join(level.name for level in levels)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
