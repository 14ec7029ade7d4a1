"""Start-up hook of Python subprocesses: it cures a torchvision whose import fails in them too.

``balcaprl.torchvision_compat`` puts this folder into ``PYTHONPATH``. The hook imports only the standard library and
that module.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType


def _run_shadowed_sitecustomize():
    """Run the environment's own sitecustomize, which this file hides.

    There may be several such files, each of which runs the one that it hides, and one of them may be another checkout's
    copy of this file. The files that have run are remembered in ``sys.modules``, so that none runs twice and no two
    call each other forever.
    """
    state = sys.modules.setdefault("_balcaprl_startup", ModuleType("_balcaprl_startup"))
    started = vars(state).setdefault("started", set())
    first = getattr(sys.modules.get("sitecustomize"), "__file__", None)
    started.update(str(Path(file).resolve()) for file in (__file__, first) if file)
    for entry in sys.path:
        spec = PathFinder.find_spec("sitecustomize", [entry]) if entry else None
        if spec is None or spec.loader is None or spec.origin is None:
            continue
        file = str(Path(spec.origin).resolve())
        if file in started:
            continue
        started.add(file)
        spec.loader.exec_module(module_from_spec(spec))
        return


try:
    from balcaprl.torchvision_compat import cure_on_import
except ImportError:  # another environment that inherited PYTHONPATH, or an older balcaprl
    pass
else:
    cure_on_import()
_run_shadowed_sitecustomize()
