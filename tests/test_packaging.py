"""The archives that are made for users: built as pip builds them, from the sources alone, and run where no checkout is."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from balcaprl import __version__
from balcaprl.kernels.support import native

setuptools = pytest.importorskip("setuptools", "77", reason="wheels are built by setuptools 77 or newer")

pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"engine": "balcaprl", "kernels/ops": "balcaprl/kernels"}
LIBRARY = f"balcaprl/kernels/{native.LIBRARY_NAME}"
NO_SOURCES = shutil.ignore_patterns("__pycache__", "*.so", ".*")
TOOLS = shutil.which("cmake") and shutil.which("c++")
needs_compiler = pytest.mark.skipif(not TOOLS, reason="needs cmake and a C++ compiler")
# What pip and `python -m build` call (PEP 517), the wheel from the unpacked source archive. No network.
BUILD = """
import shutil, sys, os
from setuptools import build_meta
sources, out = sys.argv[1:]
os.chdir(sources)
archive = build_meta.build_sdist(out)
shutil.unpack_archive(os.path.join(out, archive), out, filter="data")
os.chdir(os.path.join(out, archive.removesuffix(".tar.gz")))
build_meta.build_wheel(out)
"""


def run(*command: str, **options: object) -> str:
    """Its standard output; an error where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the unpacked source archive."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in ("engine", "kernels"):
        shutil.copytree(ROOT / name, sources / name, ignore=NO_SOURCES)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, sources)
    run(sys.executable, "-c", BUILD, str(sources), str(out))
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH: what installing makes of a wheel without scripts."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def source_files() -> Iterator[str]:
    """Where each file of the packages, module or data, belongs in the wheel."""
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder)
            hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
            if path.is_file() and path.suffix != ".so" and not hidden:
                yield f"{package}/{name.as_posix()}"


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names - {LIBRARY} == set(source_files())
    assert (LIBRARY in names) == bool(TOOLS)


def glibc_of(library: Path) -> tuple[int, int]:
    """The newest glibc that a library names, from its bytes: the names of symbol versions stand there as plain text."""
    return max((int(n[1]), int(n[2])) for n in re.finditer(rb"\0GLIBC_(\d+)\.(\d+)", library.read_bytes()))


@needs_compiler
@pytest.mark.skipif(not shutil.which("objdump"), reason="the tag is read by objdump")
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is of Linux")
def test_the_tag_is_the_glibc_that_the_library_needs_and_fits_this_machine(wheel: Path, installed: Path) -> None:
    _, version, _, tags = parse_wheel_filename(wheel.name)
    (tag,) = tags
    assert (str(version), tag.interpreter, tag.abi) == (__version__, "py3", "none")
    major, minor = max(glibc_of(installed / LIBRARY), (2, 17))
    assert re.fullmatch(rf"manylinux_{major}_{minor}_\w+", tag.platform)
    assert tag in set(sys_tags())


PROGRAM = '#include <{}>\nextern "C" double value(double x) {{ {} }}\n'
ASK = """
import pathlib, sys, setuptools
setuptools.setup = lambda **settings: None
sys.path.insert(0, "")
import setup
print(setup.glibc_needed(pathlib.Path(sys.argv[1])))
"""
LIBRARIES = {
    "glibc": ("cmath", "return std::fma(x, x, std::log(x));", [], True),
    "static C++": ("iostream", "std::cout << x; return x;", ["-static-libstdc++", "-static-libgcc"], True),
    "C++": ("iostream", "std::cout << x; return x;", [], False),
    "nothing": ("cmath", "return x;", ["-nostdlib"], False),
}


@needs_compiler
@pytest.mark.skipif(not shutil.which("objdump"), reason="the tag is read by objdump")
@pytest.mark.parametrize("kind", LIBRARIES)
def test_only_a_library_that_needs_glibc_alone_is_called_portable(kind: str, tmp_path: Path) -> None:
    header, body, flags, portable = LIBRARIES[kind]
    (tmp_path / "library.cpp").write_text(PROGRAM.format(header, body))
    library = tmp_path / "library.so"
    run("c++", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "library.cpp"), *flags)
    expected = glibc_of(library) if portable else None
    assert run(sys.executable, "-c", ASK, str(library), cwd=ROOT).strip() == str(expected)


SMALL = ["--steps", "1", "--data.num_eval", "1", "--rollout.sampler", "hf", "--rollout.prompts_per_step", "1",
         "--rollout.group_size", "2"]  # fmt: skip


def test_the_wheel_runs_where_no_checkout_is(installed: Path, tmp_path: Path) -> None:
    """Its recipe, demo model, start-up hook, template and library: one step of the demo, as the command line takes it."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    where = "import balcaprl.kernels.support.native as n; print(n.__file__, n.is_available())"
    told = run(sys.executable, "-c", where, cwd=tmp_path, env=environment).split()
    assert told == [str(installed / "balcaprl" / "kernels" / "support" / "native.py"), str(bool(TOOLS))]
    balcaprl = (sys.executable, "-m", "balcaprl")
    assert run(*balcaprl, "--version", cwd=tmp_path, env=environment) == f"balcaprl {__version__}\n"
    recipe = str(installed / "balcaprl" / "recipes" / "demo.yaml")
    run(*balcaprl, "train", recipe, "--output_dir", "out", *SMALL, cwd=tmp_path, env=environment)
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_what_an_index_shows(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    metadata = distribution.metadata
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    urls = [line.partition(", ") for line in metadata.get_all("Project-URL")]
    assert urls
    assert all(label and url.startswith("https://") for label, _, url in urls)
    assert {"Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3"} <= set(
        metadata.get_all("Classifier")
    )
    assert set(metadata.get_all("Provides-Extra")) == {"cpu", "gpu", "hf", "judge", "lora", "trl", "test", "dev"}
    # flash-attn imports torch as it is built: what holds it cannot be installed.
    assert "flash-attn" not in {Requirement(text).name for text in distribution.requires or []}
    assert {e.name: e.value for e in distribution.entry_points} == {"balcaprl": "balcaprl.cli.main:main"}
