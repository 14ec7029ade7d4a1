"""Runs the tests of the Triton kernels under Triton's interpreter, in a process of their own.

``TRITON_INTERPRET`` is read when triton is imported, and a process that interprets cannot compile. So tests with
``impl="triton"`` carry ``pytest.mark.interpreter``, the ordinary run leaves them out, and this one test runs them all:
``TRITON_INTERPRET=1 pytest -m interpreter tests/kernels`` by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_triton_kernels_pass_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-m", "interpreter", "-p", "no:cacheprovider", "tests/kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    # Exit status 5 is "no test ran": then the marker was lost.
    assert done.returncode == 0, f"pytest exited with {done.returncode}:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
