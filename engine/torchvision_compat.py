"""Lets torchvision, torchaudio and torchcodec stand beside a torch that they were not built for.

A wheel built for CUDA cannot load its native library beside a CPU build of torch (nor can any mismatched pair), and the
registries' default wheels are CUDA builds. Two things then break every transformers vision-language class, and vLLM:

- ``import torchvision`` survives the missing library, but registers fake kernels for two operators that nobody has
  declared and dies with "operator torchvision::nms does not exist". Declaring the two schemas beforehand is enough:
  image transforms need no native operator, and only ``torchvision.ops.nms`` itself stays unusable.
- ``import torchaudio`` and ``import torchcodec`` die with an OSError, which transformers and vLLM do not catch: they
  only expect that a package may be absent. Both are marked as absent, which they are for all purposes.

Subprocesses that import torchvision need the same cure before anything else runs; vLLM's plugins are loaded too late,
as importing vLLM is what fails. Hence a start-up hook (``assets/startup``) that travels in ``PYTHONPATH``.
A program of one's own is started with it by::

    python -m balcaprl.torchvision_compat vllm.entrypoints.openai.api_server --model ...
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_HIDEABLE = {"torchaudio": "lib/_torchaudio*", "torchcodec": "libtorchcodec_image*"}
"""Package -> its native library that is loaded, unguarded, as the package is imported."""
_STARTUP = Path(__file__).resolve().parent / "assets" / "startup"


def ensure_importable() -> bool:
    """Cure the three packages in this process and in its future children, where they are broken.

    Does nothing where they are absent, healthy, imported or already cured. Costs milliseconds beyond ``import torch``
    and imports none of them.

    Returns:
        Whether this call changed anything in this process.
    """
    changed = _declare_missing_ops()
    for name, pattern in _HIDEABLE.items():
        changed = _hide_if_broken(name, pattern) or changed
    if changed:
        os.environ["PYTHONPATH"] = subprocess_env(os.environ)["PYTHONPATH"]
    return changed


def subprocess_env(env: os._Environ[str] | dict[str, str] | None = None) -> dict[str, str]:
    """A copy of ``env`` (default: this process's) in which Python subprocesses cure themselves as they start."""
    result = dict(os.environ if env is None else env)
    parts = [p for p in result.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(_STARTUP)]
    result["PYTHONPATH"] = os.pathsep.join([str(_STARTUP), *parts])
    return result


def _declare_missing_ops() -> bool:
    package = _package_folder("torchvision")
    if package is None or _has_op("nms") or _loads_library(package, "_C.*"):
        return False
    import torch

    missing = [name for name in _SCHEMAS if not _has_op(name)]
    for name in missing:
        torch.library.define(f"torchvision::{name}", _SCHEMAS[name])
    return bool(missing)


def _hide_if_broken(name: str, pattern: str) -> bool:
    package = _package_folder(name)
    if package is None or name in sys.modules or not any(package.glob(pattern)) or _loads_library(package, pattern):
        return False
    # A None entry makes every import raise ModuleNotFoundError, and find_spec return None.
    sys.modules[name] = None  # type: ignore[assignment]
    answered_before = getattr(sys.modules.get("transformers.utils.import_utils"), f"is_{name}_available", None)
    if answered_before is not None:
        answered_before.cache_clear()
    found_before = sys.modules.get("datasets.config")
    if found_before is not None:
        setattr(found_before, f"{name.upper()}_AVAILABLE", False)
    return True


def _package_folder(name: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    if name in sys.modules and sys.modules[name] is None:
        return None
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _has_op(name: str) -> bool:
    import torch

    return hasattr(torch.ops.torchvision, name)


def _loads_library(folder: Path, pattern: str) -> bool:
    """Whether the package's operators can be loaded: the very call that importing it makes first."""
    import torch

    for path in sorted(p for p in folder.glob(pattern) if p.suffix in (".so", ".pyd", ".dylib")):
        try:
            torch.ops.load_library(str(path))
        except (ImportError, OSError):
            continue
        return True
    return False


def main(argv: list[str]) -> None:
    """Become ``python -m <module> <args>`` with the cure in place; the process id stays."""
    if not argv:
        raise SystemExit("usage: python -m balcaprl.torchvision_compat <module> [arguments ...]")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *argv], subprocess_env())


if __name__ == "__main__":
    main(sys.argv[1:])
