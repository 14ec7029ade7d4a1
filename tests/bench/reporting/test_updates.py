"""The report of updates: goals hold what the rows say, a plot carries its metadata."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))
from reporting import updates
from reporting.updates import UpdateResults


def row(provider: str, median: float, **more) -> dict:
    shape = {"size": "8m", "groups": 1, "group_size": 8, "image_tokens": 256, "completion": 64, "ragged": True}
    place = {
        "device": "a processor",
        "threads": 2,
        "torch": "2",
        "commit": "abcdef0123",
        "sources": "x",
        "dtype": "float32",
    }
    base = {
        "case": "c",
        "provider": provider,
        "median_s": median,
        "peak_bytes": 30 << 20,
        "time": "2026-11-23T00:00:00",
    }
    return {**shape, **place, **base, "predicted_ratio": 1.0, "acceptance": False, "auto_shares": True, **more}


def some_rows() -> list[dict]:
    base = {"case": "base", "acceptance": True}
    return [
        row("ours", 9.0, **base),  # measured again below: the last row counts
        row("ours", 1.0, predicted_ratio=5.0, **base),
        row("repeated", 4.8, peak_bytes=100 << 20, **base),
        row("trl", 3.0, **base),
        row("repeated-one-tower", 4.0, **base),
        row("ours", 1.1, case="short", group_size=2, predicted_ratio=1.1),
        row("repeated", 1.0, case="short", group_size=2),
        row("repeated-one-tower", 1.0, case="short", group_size=2),
        {**row("prefix-grouper", 0.0, case="short"), "skipped": "ImportError: gone"},
    ]


def test_goals_are_ratios_of_medians_and_misses_are_named() -> None:
    goals = {what: (pytest.approx(value), bound) for what, value, _, bound in updates.goals(UpdateResults(some_rows()))}
    assert goals == {
        "base: times faster than the repeated batch": (4.8, 4.5),
        "base: times faster than TRL's update": (3.0, 4.0),
        "base: peak memory over the repeated batch's": (0.3, 0.35),
        "least share of the predicted ratio above 2, over 1 cases (base)": (0.96, 0.9),
        "time of `auto` over the faster layout's, at worst (short)": (1.1, 1.05),
    }
    text = updates.acceptance(UpdateResults(some_rows()))
    assert "| 4.8 | at least 4.5 | holds |" in text
    assert "| 3 | at least 4 | **missed** |" in text


def test_table_and_points() -> None:
    results = UpdateResults(some_rows())
    text = updates.table(results)
    assert "| base | **1** | 4.8 | 4 | 3 | 4.80 | 5.00 | 30 of 100 |" in text
    assert "| short | 1.1 | **1** | **1** |  | 0.91 | 1.10 | 30 of 30 |" in text
    assert "- prefix-grouper: left out, ImportError: gone" in text
    points = updates.drawn_points(results, "a processor")
    assert ("group_size", "ours", 2, pytest.approx(1 / 1.1)) in points
    assert ("image_tokens", "predicted", 256, 5.0) in points
    assert updates.block(UpdateResults([]), []) == updates.UNMEASURED
    assert "plots/x.png" in updates.block(results, ["plots/x.png"])


def test_the_plot_carries_its_metadata(tmp_path: Path) -> None:
    from PIL import Image

    updates.draw(UpdateResults(some_rows()), "a processor", tmp_path / "plot.png", {"Description": "digest"})
    with Image.open(tmp_path / "plot.png") as image:
        assert image.info["Description"] == "digest"
