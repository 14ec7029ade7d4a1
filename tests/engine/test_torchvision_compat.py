"""torchvision and torchaudio never take a process down, whichever wheels are installed."""

import os
import subprocess
import sys

import pytest

from balcaprl.torchvision_compat import ensure_importable, subprocess_env


def _python(*args, env):
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=120)


def _clean_env(**extra):
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | extra


def test_is_idempotent_and_torchvision_imports_afterwards():
    code = (
        "from balcaprl.torchvision_compat import ensure_importable as e; e(); assert e() is False;"
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
        "assert changed == ('startup' in os.environ.get('PYTHONPATH', ''))"
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


def test_environment_is_not_grown_by_repetition():
    once = subprocess_env({"PYTHONPATH": "/a"})
    assert subprocess_env(once) == once
    ensure_importable()
    assert ensure_importable() is False
