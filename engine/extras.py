"""How to install what is missing: commands that work for a clone, a wheel and an index alike.

They name the packages themselves, since an extra's name helps only where an index has balcaprl, and the interpreter that
runs, since ``pip`` on the path may belong to another environment.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import sys

from packaging.requirements import Requirement


def pip_install(*requirements: str) -> str:
    """The command that installs ``requirements`` into the environment that runs."""
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *requirements])


def install_extra(extra: str, *names: str) -> str:
    """The command that installs what ``extra`` adds on this machine.

    Args:
        extra: such as ``judge``; one of the extras in setup.py.
        names: only these of its packages; none given: all.

    Returns:
        The command. Where balcaprl runs uninstalled, that for its folder: nothing else knows what the extra holds.
    """
    try:
        lines = importlib.metadata.requires("balcaprl") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    found = [r for r in map(Requirement, lines) if r.marker is not None and _added_by(r, extra)]
    wanted = [f"{r.name}{r.specifier}" for r in found if not names or r.name in names]
    return pip_install(*wanted) if wanted else f"{pip_install('-e', f'.[{extra}]')} in the folder of its sources"


def _added_by(requirement: Requirement, extra: str) -> bool:
    assert requirement.marker is not None
    return requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""})
