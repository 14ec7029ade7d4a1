"""Commands that install missing packages, whether balcaprl comes from a clone, a wheel or a package index.

The commands name the packages themselves, because the name of an extra helps only where an index has balcaprl. They
name the running interpreter, because ``pip`` on the path may belong to another environment.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import sys

from packaging.requirements import Requirement


def pip_install(*requirements: str) -> str:
    """The command that installs ``requirements`` into the running environment."""
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *requirements])


def install_extra(extra: str, *names: str) -> str:
    """The command that installs the packages of an extra on this machine.

    Args:
        extra: one of the extras in setup.py, such as ``judge``.
        names: packages of the extra to install; all of them if none is given.

    Returns:
        The command. If balcaprl runs without being installed, the command installs its source folder with the extra,
        because nothing else knows what the extra holds.
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
