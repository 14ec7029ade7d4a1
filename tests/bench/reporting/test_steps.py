"""Tables of the sync and of the whole step: goals are held to what the rows say, failures stay in sight."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))
import sync
import train_step
from reporting import steps
from reporting.steps import Table
from support import workers

PLACE = {
    "device": "a processor",
    "threads": 2,
    "torch": "2",
    "commit": "abcdef0123",
    "sources": "x",
    "time": "2026-11-23T0",
}


def sync_row(size: str, way: str, median: float, num_parameters: int, **more) -> dict:
    row = {"size": size, "way": way, "median_ms": median, "num_parameters": num_parameters, "weight_copies": 1.1}
    percent = {"percent_of_copy_bandwidth": None, "bytes_copied": 0}
    return {**PLACE, **row, **percent, **more}


def sync_table() -> Table:
    moved = {"bytes_copied": 8, "percent_of_copy_bandwidth": 55.0, "weight_copies": 2.1}
    rows = [
        sync_row("1m", "shared", 99.0, 1_500_000),  # measured again below: the last row counts
        sync_row("1m", "shared", 0.5, 1_500_000, weight_copies=9.0),
        sync_row("500m", "shared", 1.25, 490_000_000),
        sync_row("500m", "inplace", 250.0, 490_000_000, **moved),
        sync_row("500m", "reload", 900.0, 490_000_000, push_ms=400.0, **moved),
        {**PLACE, "size": "500m", "way": "trl", "failed": "KeyError: gone"},
    ]
    return Table(rows, "size", "way")


def test_goals_of_the_sync_count_large_models_only_where_they_say_so() -> None:
    goals = {what: (value, bound) for what, value, _, bound in steps.sync_goals(sync_table())}
    assert goals == {
        "slowest `shared` sync, ms (490 M parameters)": (1.25, 2.0),
        "bytes that `shared` copies": (0, 0),
        "copies of the weights in memory, `shared`, 490 M": (1.1, 1.5),
        "percent of a plain copy's speed, `inplace`, 490 M": (55.0, 60.0),
    }
    text = steps.sync_block(sync_table())
    assert "| 55 | at least 60 | **missed** |" in text
    assert "| 1.25 | at most 2 | holds |" in text
    assert "| 490 M | 1.25 | 250 | 900 (400) | 1.1, 2.1 |" in text
    assert "| 1.5 M | 0.5 |  |  | 9 |" in text
    assert "- trl, 500m: failed, KeyError: gone" in text
    assert "a processor, 2 threads; torch 2; commit abcdef0, 2026-11-23." in text


def step_row(provider: str, pixels: int, median: float, **phases: float) -> dict:
    size = {"prompts": 4, "group_size": 8, "max_tokens": 48, "peak_resident_bytes": 3 << 29}
    rate = {"median_s": median, "completions_per_second": 32 / median, "phases_s": {"step": median, **phases}}
    return {**PLACE, "provider": provider, "pixels": pixels, **size, **rate}


def test_a_step_is_compared_with_the_faster_way_of_the_peer() -> None:
    rows = [
        step_row("ours", 448, 1.0, sample=0.5, score=0.01, update=0.4, sync=0.001),
        step_row("trl", 448, 4.0, sample=3.0, score=0.0, update=1.0),
        step_row("trl-accumulated", 448, 2.5, sample=1.5, score=0.0, update=1.0),
        step_row("ours", 112, 0.5, sample=0.2),
        step_row("trl", 112, 0.6, sample=0.3),
        {**PLACE, "provider": "trl-accumulated", "pixels": 112, "failed": "MemoryError"},
    ]
    table = Table(rows, "pixels", "provider")
    goals = {what: (value, bound) for what, value, _, bound in steps.step_goals(table)}
    assert goals == {
        "448 x 448 pixels: completions per second over TRL's": (pytest.approx(2.5), 3.0),
        "112 x 112 pixels: completions per second over TRL's": (pytest.approx(1.2), 1.0),
    }
    text = steps.step_block(table)
    assert "| 448 | **ours** | 32 | 1 | 0.5 | 0.01 | 0.4 | 0.001 | 0.089 | 1.5 |" in text
    assert "| 448 | TRL, accumulated | 12.8 | 2.5 | 1.5 | 0 | 1 |  | 0 | 1.5 |" in text
    assert "| 2.5 | at least 3 | **missed** |" in text
    assert "4 prompts x 8 completions of at most 48 tokens a step" in text
    assert "- trl-accumulated, 112: failed, MemoryError" in text


def test_without_results_it_says_so(tmp_path: Path) -> None:
    nothing = Table.load(tmp_path / "none", "size", "way")
    assert steps.sync_block(nothing) == steps.UNMEASURED["sync"]
    assert steps.step_block(nothing) == steps.UNMEASURED["train_step"]


def test_a_worker_that_fails_leaves_a_row(tmp_path: Path) -> None:
    output = tmp_path / "rows" / "x.jsonl"
    worker = [sys.executable, "-c", "print('{}'); raise MemoryError('too large')"]
    workers.emit(worker, {"size": "1b", "way": "reload"}, output, "sync")
    workers.emit([sys.executable, "-c", "print('noise'); print('{\"median_ms\": 2}')"], {"size": "1m"}, output, "sync")
    failed, done = (json.loads(line) for line in output.read_text("utf-8").splitlines())
    assert (failed["size"], failed["failed"]) == ("1b", "MemoryError: too large")
    assert {"device", "commit", "time"} <= failed.keys()
    assert done == {"size": "1m", "median_ms": 2}


def test_every_provider_and_way_has_a_label() -> None:
    assert set(steps.WAYS) == set(sync.WAYS)
    assert set(steps.PROVIDERS) == set(train_step.PROVIDERS)
