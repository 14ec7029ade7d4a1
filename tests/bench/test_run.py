"""The benchmark runs, its rows are complete, and it refuses to time a wrong result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from balcaprl.kernels import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("op", ["grouped_advantages", "policy_loss"])
def test_quick_run_prints_complete_rows(op: str, tmp_path: Path) -> None:
    if op == "grouped_advantages" and not native.is_available():
        pytest.skip(f"no native library: {native.unavailable_reason()}")
    output = tmp_path / "results.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--op", op, "--quick", "--output", str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout == output.read_text()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    providers = {"grouped_advantages": 3, "policy_loss": 2}[op]
    passes = {"grouped_advantages": 1, "policy_loss": 3}[op]
    assert len(rows) == providers * passes
    for row in rows:
        assert row["op"] == op
        assert 0 < row["quartile_low_ms"] <= row["median_ms"] <= row["quartile_high_ms"]
        assert row["percent_of_floor"] > 0
        assert row["threads"] >= 1
        assert row["torch"]


def test_a_wrong_provider_is_not_timed() -> None:
    script = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "bench")!r})
from registry import OPS
from timing import measure
op = OPS["policy_loss"]
op.providers["eager"] = lambda inputs, sizes: inputs["logprobs"].sum()
try:
    measure(op, op.shapes[0], "forward", torch.device("cpu"), rounds=1)
except AssertionError as error:
    assert "not timed" in str(error)
else:
    raise SystemExit("a wrong provider was timed")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
