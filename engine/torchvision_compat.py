"""Keeps torchvision, torchaudio and torchcodec from breaking other packages if they were built for another torch.

A wheel built for CUDA cannot load its native library beside a CPU build of torch, and neither can any other wheel
beside a torch that it was not built for. The registries' default wheels are CUDA builds. Two failures then break every
transformers vision-language class, and vLLM:

- ``import torchvision`` survives the missing library, but then registers fake kernels for two operators that nobody has
  declared, and fails with "operator torchvision::nms does not exist". It is enough to declare the two schemas and go
  on: image transforms need no native operator, and only the native operators in ``torchvision.ops`` stay unusable.
- ``import torchaudio`` and ``import torchcodec`` fail with an OSError, which transformers, datasets and vLLM do not
  catch: they are prepared only for an absent package. Both packages are marked as absent, because they cannot be used
  anyway.

Nothing is guessed from the names of files or from versions: each package is imported, and only what fails is treated.
If a schema is declared *before* a working library is loaded, the process aborts in C++. After a failed import,
loading the library is never tried again, so declaring the schemas is safe.

Subprocesses that import torchvision need the same cure before anything else runs. vLLM's plugins are loaded too late
for that, because importing vLLM is what fails. Therefore ``PYTHONPATH`` carries a start-up hook (``assets/startup``).
To start a program of your own with the hook::

    python -m balcaprl.torchvision_compat vllm.entrypoints.openai.api_server --model ...
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_HIDEABLE = ("torchaudio", "torchcodec")
_STARTUP = Path(__file__).resolve().parent / "assets" / "startup"
_ABSENT = "BALCAPRL_ABSENT_PACKAGES"
"""Environment variable that tells children of this process the folders of packages that were found broken."""
_declared: list[Any] = []
"""torch's handles of the declared schemas; torch withdraws the schemas when a handle dies."""


def ensure_importable() -> tuple[str, ...]:
    """Import the three packages, and cure those that fail, in this process and in its future children.

    Packages that are absent, healthy, being imported or already cured are left as they are. The log says what was done.
    A torchvision whose failure cannot be cured here is left alone: code that imports it gets the original error.

    Returns:
        Names of the packages that this call cured or hid in this process.
    """
    cure_on_import()
    num_declared = len(_declared)
    if "torchvision" not in sys.modules and find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            logger.debug("torchvision cannot be imported: %s", error)
    hidden = [name for name in _HIDEABLE if _hide_if_broken(name)]
    if hidden:
        logger.info("not importable beside this torch, and treated as not installed: %s", ", ".join(hidden))
    changed = (*(["torchvision"] if len(_declared) > num_declared else []), *hidden)
    if changed:
        os.environ.update(_hook_variables(os.environ))
    return changed


def cure_on_import() -> None:
    """Prepare the cure of a failing torchvision import, and mark as absent what the parent process found broken.

    Imports none of the packages; the start-up hook calls this function in every child.
    """
    if not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
    for folder in filter(None, os.environ.get(_ABSENT, "").split(os.pathsep)):
        name = Path(folder).name
        if name in _HIDEABLE and name not in sys.modules and str(_package_folder(name)) == folder:
            _mark_absent(name)


def subprocess_env(env: os._Environ[str] | dict[str, str] | None = None) -> dict[str, str]:
    """A copy of ``env`` (default: this process's) in which Python subprocesses cure themselves as they start.

    It first imports the three packages, to find out which of them are broken here.
    """
    ensure_importable()
    result = dict(os.environ if env is None else env)
    return result | _hook_variables(result)


def _hook_variables(env: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    parts = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(_STARTUP)]
    variables = {"PYTHONPATH": os.pathsep.join([str(_STARTUP), *parts])}
    absent = os.environ.get(_ABSENT)
    return variables | ({_ABSENT: absent} if absent else {})


class _TorchvisionFinder(MetaPathFinder):
    """Finds torchvision where it is, and lets ``_exec_with_cure`` handle its first failure."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        # Replace the method on this one loader object only, so that nothing changes for other users of its class.
        spec.loader.exec_module = partial(_exec_with_cure, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _exec_with_cure(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        exec_module(module)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        declared = _declare_missing_ops()
        if declared is None:
            raise
        try:
            # Modules that were imported before the failure stay imported: the native library is not tried a second
            # time.
            exec_module(module)
        except Exception:
            raise error from None
        _declared.append(declared)
        logger.info(
            "torchvision was built for another torch and its native library does not load (%s): its image transforms "
            "work, its operators do not",
            str(error).splitlines()[0],
        )


def _declare_missing_ops() -> Any:
    """Declare the missing schemas; return torch's handle of them, or None if none is missing."""
    import torch

    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + _SCHEMAS[name])
    return library


def _hide_if_broken(name: str) -> bool:
    folder = None if name in sys.modules else _package_folder(name)
    if folder is None:
        return False
    try:
        importlib.import_module(name)
    except Exception as error:
        _mark_absent(name)
        known = os.environ.get(_ABSENT, "").split(os.pathsep)
        os.environ[_ABSENT] = os.pathsep.join(filter(None, [*known, str(folder)]))
        logger.debug("%s: %s", name, error)
        return True
    return False


def _mark_absent(name: str) -> None:
    # A None entry makes every import raise ModuleNotFoundError, and find_spec return None.
    sys.modules[name] = None  # type: ignore[assignment]
    answered_before = getattr(sys.modules.get("transformers.utils.import_utils"), f"is_{name}_available", None)
    if answered_before is not None:
        answered_before.cache_clear()
    found_before = sys.modules.get("datasets.config")
    if found_before is not None:
        setattr(found_before, f"{name.upper()}_AVAILABLE", False)


def _package_folder(name: str) -> Path | None:
    """Folder of an installed package, found without importing the package."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def main(argv: list[str]) -> None:
    """Replace this process by ``python -m <module> <args>`` with the cure in place; the process id stays the same."""
    if not argv:
        raise SystemExit("usage: python -m balcaprl.torchvision_compat <module> [arguments ...]")
    env = subprocess_env()
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *argv], env)


if __name__ == "__main__":
    main(sys.argv[1:])
