"""The READMEs and plots say what the committed results say, and what is made of results is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import report
from reporting import ops
from reporting.ops import Results

ROOT = Path(__file__).resolve().parents[2]
HEAD = "linear_policy_loss"
MIDDLE = "512x896x32768x8 float32"


def row(provider: str, median: float, case: str = MIDDLE, op: str = HEAD, direction: str = "both", **more) -> dict:
    values = {"median_ms": median, "quartile_low_ms": 0.9 * median, "quartile_high_ms": 1.2 * median}
    place = {
        "device": "a processor",
        "threads": 2,
        "simd": "avx512",
        "torch": "2",
        "commit": "abcdef0123",
        "sources": "x",
    }
    base = {"op": op, "case": case, "what": "", "device_type": "cpu", "provider": provider, "direction": direction}
    row = {**base, **values, "peak_bytes": 30 << 20, "gradient_error": 1e-3, "percent_of_ceiling": 1e4 / median}
    return {**row, "size_tokens": 512, "time": "2026-11-23T00:00:00", **place, **more}


def some_rows() -> list[dict]:
    return [
        row("native", 999.0),  # measured again below: the last row counts
        row("native", 108.0),
        row("gemms", 100.0),
        row("trl", 150.0),
        row("liger", 300.0),
        row("liger-whole", 170.0),
        row("native-every-token", 140.0, f"{MIDDLE} zero0.5", direction="backward"),
        row("native", 126.0, f"{MIDDLE} zero0.5", direction="backward"),
        {**row("liger", 1.0, "other"), "direction": "skipped", "skipped": "ImportError: gone"},
    ]


def test_committed_readmes_and_plots_agree_with_the_results() -> None:
    assert report.differences(Results.load()) == []


def test_goals_are_ratios_of_medians_and_misses_are_named() -> None:
    results = Results(some_rows())
    goals = {what: (value, bound) for what, value, _, bound in ops.goals(results)}
    assert goals[f"`{HEAD}`, {MIDDLE}: time over the bare GEMMs'"] == (pytest.approx(1.08), 1.10)
    # Against Liger as it comes, and against the faster of its two ways.
    assert goals[f"`{HEAD}`, {MIDDLE}: Liger's time over ours"] == (pytest.approx(300 / 108), 1.5)
    assert goals[f"`{HEAD}`, {MIDDLE}: Liger's with its best chunk over ours"] == (pytest.approx(170 / 108), 1.0)
    assert goals[f"`{HEAD}`, {MIDDLE}: peak MiB beyond inputs and gradients"] == (pytest.approx(30), 64)
    text = ops.acceptance(results)
    assert "| 1.08 | at most 1.1 | holds |" in text
    assert "backward over the full one's | 0.9 | at most 0.6 | **missed** |" in text


def test_a_goal_with_little_room_is_held_against_the_median_of_all_runs() -> None:
    runs = {"b": (120.0, 100.0, "x"), "c": (104.0, 100.0, "x"), "d": (1.0, 100.0, "older sources")}
    repeats = [
        row(provider, median, time=time, sources=sources)
        for time, (*medians, sources) in runs.items()
        for provider, median in zip(("native", "gemms"), medians, strict=True)
    ]
    results = Results(some_rows(), [*repeats, row("native", 500.0, time="e")])  # one that was broken off
    assert results.ratios("cpu", HEAD, MIDDLE, "native", "gemms") == pytest.approx([1.08, 1.2, 1.04])
    assert "GEMMs', median of 3 runs from 1.04 to 1.2 | 1.08 | at most 1.1 | holds |" in ops.acceptance(results)


def test_tables_mark_the_fastest_and_list_who_was_left_out() -> None:
    text = ops.tables(Results(some_rows()))
    assert "| **108** |" in text
    assert "**100**" not in text  # the ceiling does not compete
    assert "- `linear_policy_loss`, liger: left out, ImportError: gone" in text
    assert "a processor, 2 threads, avx512" in text
    assert "| 108 | 100 |  | 150 | 170 | 30.0, 30.0 MiB |" in ops.headline(Results(some_rows()))


def test_without_results_it_says_so() -> None:
    for render in (ops.headline, ops.acceptance, ops.tables):
        assert render(Results([])) == ops.UNMEASURED


def test_a_changed_figure_is_a_difference(tmp_path: Path) -> None:
    for file in {file for file, _ in report.blocks(Results([]))}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text("utf-8"), "utf-8")
    results = Results(row_ for row_ in some_rows() if row_["provider"] != "gemms")  # without it nothing is drawn
    for path, text in report.rendered(results, tmp_path).items():
        path.write_text(text, "utf-8")
    assert report.differences(results, tmp_path) == []
    page = tmp_path / "kernels" / "README.md"
    page.write_text(page.read_text("utf-8").replace("**108**", "**8**"), "utf-8")
    assert report.differences(results, tmp_path) == [
        "kernels/README.md: not what bench/results says; run python bench/report.py"
    ]


def test_missing_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^tables: expected one"):
        report.with_block("no markers here", "tables", "content")


def test_a_plot_carries_the_digest_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PLOTS", tmp_path)
    results = Results(some_rows())
    drawn = report.plots(results)[0]
    assert drawn.path == tmp_path / "kernels_cpu.png"
    drawn.draw(drawn.path, {report.PLOT_KEY: drawn.digest})
    assert report._drawn_digest(drawn.path) == drawn.digest
    assert report._drawn_digest(tmp_path / "none.png") is None
