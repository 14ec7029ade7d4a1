"""Start-up hook of Python subprocesses: cures torchvision and its like just before something asks for them.

``balcaprl.torchvision_compat`` puts this folder into ``PYTHONPATH``. Costs nothing until one of the packages below is
imported; torch is not imported before that.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


class _CureFirst(MetaPathFinder):
    """Finds nothing; runs the cure at the first import of a package that the broken ones would take down."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in ("transformers", "vllm", "torchvision", "torchaudio", "torchcodec"):
            sys.meta_path.remove(self)
            try:
                from balcaprl.torchvision_compat import ensure_importable
            except ImportError:  # another environment that inherited PYTHONPATH
                return
            ensure_importable()
        return


def _run_shadowed_sitecustomize():
    """The environment's own sitecustomize, which this file hides, still has to run."""
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if p and Path(p).resolve() != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


sys.meta_path.insert(0, _CureFirst())
_run_shadowed_sitecustomize()
