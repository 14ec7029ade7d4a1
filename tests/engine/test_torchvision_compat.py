"""torchvision and torchaudio never take a process down, whichever wheels are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import balcaprl
from balcaprl.torchvision_compat import ensure_importable, subprocess_env


def _python(*args, env):
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=600)


def _clean_env(**extra):
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | extra


def test_is_idempotent_and_torchvision_imports_afterwards():
    code = (
        "from balcaprl.torchvision_compat import ensure_importable as e; e(); assert e() == ();"
        "import torchvision; from transformers import Qwen2_5_VLProcessor; import transformers.audio_utils"
    )
    result = _python("-c", code, env=_clean_env())
    assert result.returncode == 0, result.stderr


def test_cures_a_process_that_has_imported_transformers_already():
    code = (
        "from transformers.utils import is_torchaudio_available; is_torchaudio_available();"
        "from balcaprl.torchvision_compat import ensure_importable as e; e();"
        "from transformers import Qwen2_5_VLProcessor"
    )
    result = _python("-c", code, env=_clean_env())
    assert result.returncode == 0, result.stderr


def test_cures_a_process_that_has_imported_datasets_already():
    pytest.importorskip("datasets", reason="datasets is an optional extra")
    code = (
        "import datasets; from balcaprl.torchvision_compat import ensure_importable as e; e();"
        "datasets.Dataset.from_dict({'text': ['a']}).map(lambda row: {'length': 1})"
    )
    result = _python("-c", code, env=_clean_env())
    assert result.returncode == 0, result.stderr


def test_children_are_cured_by_the_startup_hook():
    result = _python("-c", "import torchvision, transformers.audio_utils", env=subprocess_env(_clean_env()))
    assert result.returncode == 0, result.stderr


def test_children_inherit_the_hook_exactly_where_the_cure_was_needed():
    code = (
        "import os; from balcaprl.torchvision_compat import ensure_importable as e; changed = e();"
        "assert bool(changed) == ('startup' in os.environ.get('PYTHONPATH', ''))"
    )
    result = _python("-c", code, env=_clean_env())
    assert result.returncode == 0, result.stderr


def test_hook_is_free_until_needed_and_runs_the_hidden_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['HIDDEN_RAN'] = '1'")
    env = subprocess_env(_clean_env(PYTHONPATH=str(tmp_path)))
    code = "import os, sys; assert 'torch' not in sys.modules; print(os.environ['HIDDEN_RAN'])"
    result = _python("-c", code, env=env)
    assert result.stdout.strip() == "1", result.stderr


def test_module_runner_starts_a_cured_program(tmp_path):
    (tmp_path / "program.py").write_text("import sys, torchvision, transformers.audio_utils; print(sys.argv[1])")
    env = _clean_env(PYTHONPATH=str(tmp_path))
    result = _python("-m", "balcaprl.torchvision_compat", "program", "argument", env=env)
    assert result.stdout.strip() == "argument", result.stderr


DECLARES = """
import torch
from . import _native
"""
LOADS = "import torch; library = torch.library.Library('torchvision', 'FRAGMENT')\n" + "".join(
    f"library.define('{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n" for name in ("nms", "qnms")
)


def package(folder, name, init, **modules):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(init)
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(text)


@pytest.mark.parametrize("library", ["_C.so", "_C_stable.so", "ops.so", None])
@pytest.mark.parametrize("how", ["in-process", "hook"])
def test_a_healthy_torchvision_is_left_alone_whatever_its_library_is_called(tmp_path, library, how):
    """Its own declarations would meet ours; in C++ that ends the process."""
    package(tmp_path, "torchvision", DECLARES, _native=LOADS)
    if library is not None:
        (tmp_path / "torchvision" / library).write_bytes(b"not to be judged by looking at it")
    env = _clean_env(PYTHONPATH=str(tmp_path))
    code = "import torchvision, torch; assert torchvision._native.library; print(torch.ops.torchvision.nms)"
    if how == "in-process":
        code = (
            "from balcaprl.torchvision_compat import ensure_importable as e, _declared; import os; e();"
            f"assert not _declared; {code}"
        )
    else:
        env = subprocess_env(env)
    result = _python("-c", code, env=env)
    assert "torchvision.nms" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("init", "error"),
    [
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13: cannot open"),
        ("raise RuntimeError('compiled with different CUDA major versions')", "RuntimeError: compiled with different"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise RuntimeError('operator torchvision::other does not exist')", "torchvision::other does not exist"),
        ("raise SystemError('odd')", "SystemError: odd"),
    ],
)
def test_a_torchvision_that_breaks_otherwise_keeps_its_own_error_and_leaves_no_trace(tmp_path, init, error):
    package(tmp_path, "torchvision", init)
    code = (
        "from balcaprl.torchvision_compat import ensure_importable as e; import torch, gc\n"
        "e(); gc.collect(); assert not hasattr(torch.ops.torchvision, 'nms')\nimport torchvision"
    )
    result = _python("-c", code, env=_clean_env(PYTHONPATH=str(tmp_path)))
    assert error in result.stderr.strip().splitlines()[-1], result.stderr


ASK = """
import sys
from importlib.util import find_spec
print(*(find_spec(name) is None for name in ("torchaudio", "torchcodec")))
"""
RUN_ASK = """
import os, subprocess, sys
from balcaprl.torchvision_compat import ensure_importable, subprocess_env
ensure_importable()
env = subprocess_env()
for path in (env["PYTHONPATH"], env["PYTHONPATH"].replace(sys.argv[2], sys.argv[3])):
    subprocess.run([sys.executable, sys.argv[1]], env=env | {"PYTHONPATH": path}, check=True)
"""


@pytest.mark.parametrize("broken", ["torchaudio", "torchcodec"])
@pytest.mark.parametrize("error", ["OSError('Could not load this library')", "RuntimeError('no FFmpeg')"])
def test_a_package_is_hidden_exactly_where_its_import_fails(tmp_path, broken, error):
    """In a child too, and never in a child whose package is another one."""
    for name in ("torchaudio", "torchcodec", "torchvision"):
        package(tmp_path / "one", name, f"raise {error}" if name == broken else "")
        package(tmp_path / "other", name, "")
    (tmp_path / "ask.py").write_text(ASK)
    arguments = (str(tmp_path / name) for name in ("ask.py", "one", "other"))
    result = _python("-c", RUN_ASK, *arguments, env=_clean_env(PYTHONPATH=str(tmp_path / "one")))
    expected = "True False" if broken == "torchaudio" else "False True"
    assert result.stdout.splitlines() == [expected, "False False"], result.stderr


def test_the_log_says_what_was_done(tmp_path):
    package(tmp_path, "torchcodec", "raise OSError('no library')")
    failing = "import torch\nfrom torchvision import fakes\n"
    package(
        tmp_path, "torchvision", failing, fakes="import torch\ntorch.library.register_fake('torchvision::nms')(print)"
    )
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from balcaprl.torchvision_compat import ensure_importable as e; assert e(); import torchvision.fakes"
    )
    result = _python("-c", code, env=_clean_env(PYTHONPATH=str(tmp_path)))
    assert result.returncode == 0, result.stderr
    assert "torchvision was built for another torch" in result.stderr
    assert "treated as not installed: " in result.stderr
    assert "torchcodec" in result.stderr


IMAGES = (
    "import datasets; from PIL import Image;"
    "rows = datasets.Dataset.from_list([{'image': Image.new('RGB', (8, 8)), 'text': 'a'}]);"
    "assert rows[0]['image'].size == (8, 8); print('read')"
)


@pytest.mark.parametrize("first", ["", "import torch;", "import transformers;", "import torchvision;"])
def test_images_of_datasets_are_read_in_a_hooked_child_whatever_comes_first(first):
    pytest.importorskip("datasets", reason="datasets is an optional extra")
    result = _python("-c", first + IMAGES, env=subprocess_env(_clean_env()))
    assert result.stdout.strip() == "read", result.stderr


STARTUP = Path(balcaprl.__file__).parent / "assets" / "startup"
CHAINING = """
import importlib.machinery, importlib.util, os, sys
print("foreign")
here = os.path.dirname(__file__)
spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if p != here])
if spec:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@pytest.mark.parametrize(
    "order",
    [
        ("ours", "copy", "last"),
        ("copy", "ours", "link", "last"),
        ("ours", "foreign", "copy", "last"),
        ("foreign", "ours", "last"),
        ("ours", "copy", "copy2", "foreign", "last"),
    ],
    ids="-".join,
)
def test_several_startup_hooks_run_each_file_once_and_end(tmp_path, order):
    """Two checkouts in one PYTHONPATH called each other for ever."""
    shutil.copytree(STARTUP, tmp_path / "copy")
    shutil.copytree(STARTUP, tmp_path / "copy2")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    for name, text in (("foreign", CHAINING), ("last", "print('last')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sitecustomize.py").write_text(text)
    folders = [str(STARTUP if name == "ours" else tmp_path / name) for name in order]
    result = _python("-c", "print('program')", env=_clean_env(PYTHONPATH=os.pathsep.join(folders)))
    assert "Error" not in result.stderr, result.stderr
    expected = [name for name in ("foreign", "last") if name in order] + ["program"]
    assert result.stdout.split() == expected, result.stderr


def test_environment_is_not_grown_by_repetition():
    once = subprocess_env({"PYTHONPATH": "/a"})
    assert subprocess_env(once) == once
    ensure_importable()
    assert ensure_importable() == ()
