import io
from types import SimpleNamespace

from rich.console import Console

from balcaprl.reporting.progress import ProgressLine

METRICS = {
    "reward/b_capscore": 0.512,
    "reward/precision": 0.48,
    "length_ratio": 1.25,
    "sampling_kl": None,
    "tokens_per_second": 812.3,
}


def test_progress_prints_plain_lines_off_a_terminal():
    stream = io.StringIO()
    with ProgressLine(25, console=Console(file=stream), every_steps=10, every_seconds=1e9) as progress:
        for step in range(1, 26):
            progress.update(step, METRICS)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/25", "step 11/25", "step 21/25", "step 25/25"]
    assert "b-cap 0.512  prec 0.480  len 1.25  tok/s 812" in lines[0]
    assert "\x1b" not in stream.getvalue()


def test_progress_prints_when_time_has_passed():
    stream = io.StringIO()
    with ProgressLine(5, console=Console(file=stream), every_steps=100, every_seconds=0.0) as progress:
        for step in range(1, 5):
            progress.update(step, {})
    assert len(stream.getvalue().splitlines()) == 4


def test_progress_is_one_live_line_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200)
    with ProgressLine(10, start_step=4, console=console) as progress:
        progress.update(5, METRICS)
        progress.message("saved [step 5]")
    progress.close()
    assert "saved [step 5]" in stream.getvalue()
    assert "step 5/10" in stream.getvalue()


def test_eta_counts_this_process_only(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("balcaprl.reporting.progress.time.monotonic", lambda: clock.now)
    stream = io.StringIO()
    progress = ProgressLine(1000, start_step=900, console=Console(file=stream))
    clock.now += 3000.0  # loads, compiles and evaluates: says nothing of the steps to come
    progress.update(901, {})
    assert "eta -:--:--" in stream.getvalue()
    for step in range(902, 911):
        clock.now += 40.0
        progress.update(step, {})
    assert "eta 1:00:00" in stream.getvalue().splitlines()[-1]
    clock.now += 90 * 40.0
    progress.update(1000, {})
    assert "eta 0:00:00" in stream.getvalue().splitlines()[-1]
