"""The native library builds from a checkout; a machine that cannot build it installs all the same, and says so."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from balcaprl.kernels.support import native

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.toolchain


def build(folder: Path, **environment: str) -> tuple[str, Path]:
    """Runs the build that pip runs; returns its output and where the library should be."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, folder / "balcaprl" / "kernels" / native.LIBRARY_NAME


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
def test_build_gives_a_library_that_loads_by_itself_without_warnings(tmp_path: Path) -> None:
    output, library = build(tmp_path)
    assert "warning:" not in re.sub(r"(?m)^.*setuptools.*$", "", output).lower()
    assert ctypes.CDLL(str(library)).balcaprl_abi_version() == native.ABI_VERSION


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_without_a_compiler_there_is_one_clear_warning(tmp_path: Path) -> None:
    output, library = build(tmp_path, CXX="/nonexistent/c++")
    assert output.count("WITHOUT its native CPU library") == 1
    assert "install a C++17 compiler" in output
    assert not library.exists()


def test_without_cmake_there_is_one_clear_warning(tmp_path: Path) -> None:
    output, library = build(tmp_path, PATH="/nonexistent")
    assert output.count("WITHOUT its native CPU library: cmake was not found") == 1
    assert not library.exists()


def test_python_and_header_agree_on_version_and_codes() -> None:
    header = (ROOT / "kernels" / "csrc" / "native.h").read_text(encoding="utf-8")
    version = re.search(r"kAbiVersion = (\d+);", header)
    assert version is not None
    assert int(version[1]) == native.ABI_VERSION
    codes = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper(): int(code)
        for name, code in re.findall(r"k(\w+) = (\d+),", header)
    }
    assert codes == {name: getattr(native, name) for name in codes}
    assert {"OK", "OUT_OF_MEMORY", "BAD_REWARDS"} <= set(codes)
