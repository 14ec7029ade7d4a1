"""The rules on who may import what, read from the sources: imports in functions count, those for type checkers do not.

kernels <- engine.{policy, rollout, rewards, data, evaluation, ...} <- engine.trainer <- engine.cli
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE, KERNELS = ROOT / "engine", ROOT / "kernels" / "ops"

KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", *sys.stdlib_module_names}
LIGHT_MAY_IMPORT = {"pydantic", *sys.stdlib_module_names}
HEAVY = {"torch", "transformers", "vllm", "triton", "numpy", "PIL", "datasets", "torchvision", "tokenizers", "jinja2"}
BELOW_THE_TRAINER = ("config", "types", "policy", "rollout", "rewards", "data", "evaluation")
ONE_IMPORTER = {
    "vllm": {"vllm"},
    "HTTP client": {"requests", "httpx", "aiohttp", "urllib3", "openai"},
    "the standard library's HTTP client": {"urllib.request", "http.client"},
    "W&B": {"wandb"},
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}


class Import(NamedTuple):
    importer: str
    """Dotted name of the module that imports."""
    imported: str
    """Dotted name of what it imports; for ``from a import b`` both ``a`` and ``a.b`` are listed."""
    place: str
    """File and line, for the message."""


def python_files() -> list[Path]:
    return sorted([*ENGINE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_name(path: Path) -> str:
    base, prefix = (KERNELS, "balcaprl.kernels") if path.is_relative_to(KERNELS) else (ENGINE, "balcaprl")
    parts = [prefix, *path.relative_to(base).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in {
        n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in ast.walk(node.test)
    }


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield other
                yield from running_nodes(other)
            continue
        yield child
        yield from running_nodes(child)


def imported_names(node: ast.AST, package: str) -> list[str]:
    """What one node imports, relative names resolved; ``importlib.import_module("x")`` counts."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__", "importorskip") and isinstance(node.args[0].value, str):
            name = node.args[0].value
            return [f"{package}{name}" if name.startswith(".") else name]
    return []


def imports_of(path: Path) -> list[Import]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [
        Import(name, imported, f"{place}:{getattr(node, 'lineno', 0)}")
        for node in running_nodes(ast.parse(path.read_text(encoding="utf-8")))
        for imported in imported_names(node, package)
    ]


ALL_IMPORTS = [found for path in python_files() for found in imports_of(path)]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def complaints(found: list[Import], rule: str) -> str:
    return "".join(f"\n  {i.place}: {i.importer} imports {i.imported}: {rule}" for i in found)


def test_the_walk_sees_imports_in_functions_and_not_those_for_type_checkers(tmp_path: Path) -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import vllm
else:
    import json
def f():
    import wandb
    from . import native
    importlib.import_module("httpx")
"""
    nodes = running_nodes(ast.parse(source))
    names = {name for node in nodes for name in imported_names(node, "balcaprl.kernels")}
    assert {"json", "wandb", "balcaprl.kernels", "balcaprl.kernels.support.native", "httpx"} <= names
    assert "vllm" not in names
    assert any(within(i.imported, "balcaprl.kernels") for i in ALL_IMPORTS)


def test_kernels_import_only_torch_triton_numpy_and_the_standard_library() -> None:
    wrong = [
        i
        for i in ALL_IMPORTS
        if within(i.importer, "balcaprl.kernels")
        and not within(i.imported, "balcaprl.kernels")
        and i.imported != "balcaprl"
        and i.imported.split(".")[0] not in KERNELS_MAY_IMPORT
    ]
    assert not wrong, complaints(wrong, "kernels import only torch, triton, numpy, the standard library")


@pytest.mark.parametrize("library", sorted(ONE_IMPORTER))
def test_one_importer_each(library: str) -> None:
    modules = ONE_IMPORTER[library]
    importers = [i for i in ALL_IMPORTS if any(within(i.imported, m) for m in modules)]
    assert len({i.importer for i in importers}) <= 1, complaints(importers, f"{library} has more than one importer")


def test_vllm_is_imported_by_its_sampler_only_and_not_at_import() -> None:
    wrong = [i for i in ALL_IMPORTS if within(i.imported, "vllm") and i.importer != "balcaprl.rollout.vllm.engine"]
    assert not wrong, complaints(wrong, "only engine/rollout/vllm/engine.py imports vllm")
    for path in python_files():
        top_level = ast.parse(path.read_text(encoding="utf-8")).body
        names = {name.split(".")[0] for node in top_level for name in imported_names(node, "")}
        assert "vllm" not in names, f"{path.relative_to(ROOT)}: import vllm inside the function that needs it"


def test_nothing_below_the_trainer_imports_it() -> None:
    wrong = [
        i
        for i in ALL_IMPORTS
        if any(within(i.importer, f"balcaprl.{part}") for part in BELOW_THE_TRAINER)
        and within(i.imported, "balcaprl.training.trainer")
    ]
    assert not wrong, complaints(wrong, "the trainer stands above it")


def test_nothing_imports_the_command_line() -> None:
    wrong = [
        i
        for i in ALL_IMPORTS
        if within(i.imported, "balcaprl.cli.main")
        and i.importer != "balcaprl.__main__"
        and not within(i.importer, "balcaprl.cli.main")
    ]
    assert not wrong, complaints(wrong, "the command line stands on top")


def component(name: str) -> str | None:
    """``policy`` for ``balcaprl.policy.packing``; None outside the engine's and kernels' parts."""
    parts = name.split(".")
    return parts[1] if parts[0] == "balcaprl" and len(parts) > 1 else None


def test_components_import_one_way() -> None:
    """No two components of the package import each other, directly or through others."""
    known = {component(module_name(path)) for path in python_files()} - {None}
    edges: dict[str, dict[str, str]] = {}
    for i in ALL_IMPORTS:
        source, target = component(i.importer), component(i.imported)
        if source and target and source != target and target in known:
            edges.setdefault(source, {})[target] = i.place

    def find_cycle(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        for target in edges.get(node, {}):
            cycle = find_cycle(target, [*path, node])
            if cycle:
                return cycle
        return None

    for start in sorted(edges):
        cycle = find_cycle(start, [])
        steps = [] if cycle is None else [f"{a} -> {b} ({edges[a][b]})" for a, b in pairwise(cycle)]
        assert cycle is None, "imports go round: " + ", ".join(steps)


@pytest.mark.parametrize("file", ["config.py", "config_base.py", "types.py"])
def test_config_and_types_import_nothing_heavy(file: str) -> None:
    wrong = [
        i
        for i in imports_of(ENGINE / file)
        if i.imported.split(".")[0] not in LIGHT_MAY_IMPORT
        and not any(within(i.imported, m) for m in ("balcaprl.config", "balcaprl.config.base", "balcaprl.types"))
    ]
    assert not wrong, complaints(wrong, "only pydantic and the standard library")


@pytest.mark.parametrize("module", ["balcaprl", "balcaprl.config", "balcaprl.types"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == [], f"import {module} loads {done.stdout}"


def test_nothing_unpickles() -> None:
    wrong = [i for i in ALL_IMPORTS if i.imported.split(".")[0] in UNSAFE_MODULES]
    assert not wrong, complaints(wrong, "unpickling runs foreign code")
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            loads = isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch"
            assert not loads, (
                f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: torch.load unpickles; use safetensors"
            )


@pytest.mark.parametrize("file", ["kernels/__init__.py", "tests/__init__.py", "conftest.py"])
def test_files_that_must_not_exist(file: str) -> None:
    assert not (ROOT / file).exists(), f"{file} would shadow the package named kernels, or confuse test collection"


def test_every_package_is_listed_in_setup_py() -> None:
    listed = {
        node.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("balcaprl")
    }
    packages = {module_name(path) for path in python_files() if path.name == "__init__.py"}
    assert packages <= listed, f"setup.py does not list {sorted(packages - listed)}"
