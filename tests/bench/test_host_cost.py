"""What an update costs the host of a GPU is counted on every run; nothing is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="launches are counted where triton would make them")
ROOT = Path(__file__).resolve().parents[2]


def test_operations_stay_within_their_bounds() -> None:
    done = subprocess.run(
        [sys.executable, "bench/host_cost.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
