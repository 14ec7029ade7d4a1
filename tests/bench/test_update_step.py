"""The update's bench: the providers compute the same gradients, operations are counted right, a run resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import update_step
from update.providers import PROVIDERS, Shape, build_policy, make_rollouts

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape("3m", 3, 16, 8, groups=2)


@pytest.fixture(scope="module")
def prepared() -> dict[str, dict]:
    policy = build_policy(SHAPE.size, torch.device("cpu"), torch.float32)
    rows = update_step.prepare(SHAPE, policy, make_rollouts(SHAPE, policy), list(PROVIDERS))
    return {row["provider"]: row for row in rows}


def test_shapes_are_what_their_names_say() -> None:
    assert SHAPE.name == "3m B2 G3 image16 completion~8"
    assert [sorted(group) for group in SHAPE.lengths()] == [[4, 8, 12]] * 2
    assert update_step.ACCEPTANCE.prompt == 281
    assert update_step.ACCEPTANCE.lengths() == [[64] * 8]
    assert len({shape.name for shape in update_step.CASES}) == len(set(update_step.CASES))


@pytest.mark.parametrize("name", [n for n in PROVIDERS if n != "repeated"])
def test_all_providers_have_the_gradients_of_the_stock_model(name: str, prepared: dict[str, dict]) -> None:
    if name == "trl":
        pytest.importorskip("trl", reason="TRL is a peer to compare with, in the extras trl and test")
    assert prepared[name].get("skipped") is None
    assert prepared[name]["gradient_difference"] < 1e-5


def test_operations_by_hand(prepared: dict[str, dict]) -> None:
    """Two prompts of 41 tokens, completions of 4, 8 and 12 each."""
    # Per token: q, k, v and o of heads 3 and 1 of 64; gate, up and down.
    layer = 2 * (192 * (192 + 64 + 64) + 192 * 192 + 3 * 192 * 512)
    patches, window = 64, 64
    block = 2 * patches * (96 * 4 * 96 + 3 * 96 * 264)
    merger = 2 * 16 * (384 * 384 + 384 * 192)
    embedding = 2 * patches * 1176 * 96
    tower = 3 * block + merger + embedding + 4 * 96 * (2 * patches**2 + patches * window)
    text = 4 * layer * (41 + 3 + 7 + 11)
    # Of the last layer q, o and the MLP run where a token is predicted: not at the prompt's first 40.
    text -= 2 * 40 * (2 * 192 * 192 + 3 * 192 * 512)
    pairs = 41 * 42 // 2 + sum(n * 41 + n * (n + 1) // 2 for n in (4, 8, 12))
    head = 2 * 24 * 4096 * 192
    assert prepared["ours"]["flops"] == 3 * 2 * (tower + text + 4 * pairs * 192 * 4 + head)
    rows = 3 * 2 * (3 * tower + 4 * layer * 3 * 53 + head)
    pairs = sum((41 + n) * (41 + n + 1) // 2 for n in (4, 8, 12))
    assert prepared["repeated"]["flops"] == rows + 3 * 2 * 4 * pairs * 192 * 4


def test_a_wrong_provider_stops_or_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build_policy("3m", torch.device("cpu"), torch.float32)
    shape = Shape("3m", 2, 16, 4)
    rollouts = make_rollouts(shape, policy)

    def doubled(policy, rollouts):
        forward = PROVIDERS["repeated"](policy, rollouts)
        return lambda: 2 * forward()

    with monkeypatch.context() as patch:
        patch.setitem(PROVIDERS, "trl", doubled)
        rows = list(update_step.prepare(shape, policy, rollouts, ["trl"]))
        assert rows[1]["skipped"] == "its gradient differs from the stock model's by 1.0e+00, more than 1e-04"
        patch.setitem(PROVIDERS, "ours", doubled)
        with pytest.raises(AssertionError, match=r"^ours, 3m B1 G2 .* differs"):
            list(update_step.prepare(shape, policy, rollouts, ["ours"]))


def test_quick_run_appends_rows_and_resumes(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "update_step.py"), "--quick", "--device", "cpu"]
    command += ["--provider", "ours", "--provider", "repeated", "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert {row["provider"] for row in rows} == {"ours", "repeated"}
    for row in rows:
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["rounds"] == update_step.MIN_ROUNDS
        assert {"commit", "sources", "device", "threads", "time", "torch"} <= row.keys()
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert len(output.read_text("utf-8").splitlines()) == len(rows)
