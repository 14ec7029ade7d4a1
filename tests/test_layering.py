"""The rules on who may import what, read from the sources: imports in functions count, those for type checkers do not.

``FLOORS`` lists the rooms from the ground up; the other rules say who may import which library.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE, KERNELS = ROOT / "engine", ROOT / "kernels" / "ops"

KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", *sys.stdlib_module_names}
LIGHT_MAY_IMPORT = {"pydantic", *sys.stdlib_module_names}
HEAVY = {"torch", "transformers", "vllm", "triton", "numpy", "PIL", "datasets", "torchvision", "tokenizers", "jinja2"}
FLOORS = (
    ("kernels.support",),
    ("kernels.adamw", "kernels.advantages", "kernels.layers", "kernels.loss", "kernels.shared_prefix"),
    ("kernels.head",),
    ("kernels.block",),
    ("kernels",),
    ("types", "extras", "logtext", "torchvision_compat"),
    ("assets",),
    ("config",),
    ("files",),
    ("data", "policy"),
    ("reporting",),
    ("rewards", "rollout"),
    ("checkpoints", "demo"),
    ("evaluation",),
    ("training",),
    ("cli",),
    ("__main__",),
)
"""The rooms of the house, from the ground up. A room imports from the floors below it; rooms of one floor do not import each
other. The package itself, ``balcaprl``, holds its version, and everyone may import that."""
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
    assert {"json", "wandb", "balcaprl.kernels", "balcaprl.kernels.native", "httpx"} <= names
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


def room(name: str) -> str | None:
    """The entry of ``FLOORS`` that a module belongs to; None for the package itself and what is not ours."""
    rooms = [r for floor in FLOORS for r in floor if within(name, f"balcaprl.{r}")]
    return max(rooms, key=len, default=None)


FLOOR_OF = {r: number for number, floor in enumerate(FLOORS) for r in floor}


def arrows_up(found: list[Import]) -> list[Import]:
    """Imports from the own floor's other rooms, or from a floor above."""
    wrong = []
    for i in found:
        source, target = room(i.importer), room(i.imported)
        if source and target and source != target and FLOOR_OF[target] >= FLOOR_OF[source]:
            wrong.append(i)
    return wrong


def circles(found: list[Import], modules: set[str]) -> list[tuple[str, ...]]:
    """Sets of modules that import each other, directly or through others; imports in functions count."""
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for i in found:
        if i.importer in modules and i.imported in modules and i.importer != i.imported:
            edges[i.importer].add(i.imported)
    while True:  # take away what imports nothing that is left, until only circles and what leads to them remain
        ends = {name for name, targets in edges.items() if not targets & edges.keys()}
        if not ends:
            break
        edges = {name: targets for name, targets in edges.items() if name not in ends}
    reached = {name: reachable(name, edges) for name in edges}
    return sorted({tuple(sorted(n for n in reached[name] if name in reached[n])) for name in edges} - {()})


def reachable(name: str, edges: dict[str, set[str]]) -> set[str]:
    """What a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for target in edges[waiting.pop()] & edges.keys() - found:
            found.add(target)
            waiting.append(target)
    return found


MODULES = {module_name(path) for path in python_files()}


def test_every_module_has_a_room() -> None:
    homeless = {name for name in MODULES if name != "balcaprl" and room(name) is None}
    assert not homeless, f"FLOORS does not list {sorted(homeless)}"


def test_imports_run_down_the_floors() -> None:
    wrong = arrows_up(ALL_IMPORTS)
    assert not wrong, complaints(wrong, "a room imports from the floors below it only")


def test_no_modules_import_each_other() -> None:
    assert circles(ALL_IMPORTS, MODULES) == []


def test_an_arrow_up_and_a_circle_would_be_noticed() -> None:
    up = Import("balcaprl.policy.head", "balcaprl.training.trainer", "here:1")
    across = Import("balcaprl.rewards.scoring", "balcaprl.rollout.hf", "here:2")
    down = Import("balcaprl.training.trainer", "balcaprl.policy.head", "here:3")
    assert arrows_up([up, across, down]) == [up, across]
    a, b, c, d = "balcaprl.data.stream", "balcaprl.data.split", "balcaprl.data.digest", "balcaprl.data.datasets"
    ring = [Import(d, a, ""), Import(a, b, ""), Import(b, c, ""), Import(c, a, "")]
    assert circles(ring, {a, b, c, d}) == [tuple(sorted((a, b, c)))]
    assert circles(ring[:3], {a, b, c, d}) == []


LIGHT = [ENGINE / "types.py", *(p for p in sorted((ENGINE / "config").glob("*.py")) if p.name != "recipe.py")]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.name)
def test_config_and_types_import_nothing_heavy(path: Path) -> None:
    wrong = [
        i
        for i in imports_of(path)
        if i.imported.split(".")[0] not in LIGHT_MAY_IMPORT
        and not any(within(i.imported, m) for m in ("balcaprl.config", "balcaprl.types"))
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
