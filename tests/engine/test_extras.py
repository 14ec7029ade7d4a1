"""Advice on installing works where it is read: in this environment, with or without an index that has balcaprl."""

import ast
import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from balcaprl.extras import install_extra, pip_install

ROOT = Path(__file__).resolve().parents[2]


def extras():
    return importlib.metadata.metadata("balcaprl").get_all("Provides-Extra")


@pytest.mark.parametrize("extra", extras())
def test_the_command_names_the_packages_of_an_extra(extra):
    program, *rest = shlex.split(install_extra(extra))
    assert (program, rest[:3]) == (sys.executable, ["-m", "pip", "install"])
    names = {Requirement(text).name for text in rest[3:]}
    assert names
    assert "balcaprl" not in names
    declared = [Requirement(text) for text in importlib.metadata.requires("balcaprl")]
    assert names == {r.name for r in declared if r.marker and r.marker.evaluate({"extra": extra})}


def test_one_package_of_an_extra_and_an_uninstalled_checkout(monkeypatch):
    assert "aiohttp" not in install_extra("judge", "tenacity")
    assert "tenacity>=" in install_extra("judge", "tenacity")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert "-e '.[judge]' in the folder of its sources" in install_extra("judge")


def test_a_command_survives_a_folder_with_blanks(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/my envs/bin/python")
    assert shlex.split(pip_install("rich>=13"))[0] == "/my envs/bin/python"


def test_no_message_sends_the_user_to_an_index_for_balcaprl():
    found = []
    for path in [*ROOT.glob("engine/**/*.py"), *ROOT.glob("kernels/ops/**/*.py"), *ROOT.glob("bench/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [(path.name, m) for m in re.findall(r"balcaprl\[\w+\]|pip install balcaprl", node.value)]
    assert not found


def test_no_extra_needs_what_pip_cannot_build_alone():
    """flash-attn imports torch as it is built: an extra that holds it cannot be installed."""
    names = {Requirement(text).name for text in importlib.metadata.requires("balcaprl")}
    assert "flash-attn" not in names
