import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from balcaprl.reporting.eval_images import eval_image_path, save_eval_image
from balcaprl.reporting.metrics import (
    LOG_FILES,
    PhaseTimer,
    RunLog,
    encode_line,
    is_reproducible,
    nanmean,
    read_jsonl,
    truncate_jsonl,
)
from balcaprl.types import Assertion, Completion, ReferenceUnit, RewardBreakdown, Rollout, RolloutGroup


def make_group(sample_id="scene-7", captions=("A red circle.", "A blue square.")):
    breakdown = RewardBreakdown(
        precision=0.5,
        recall=1.0,
        linguistic=0.75,
        clarity=4.0,
        fluency=4.0,
        coherence=4.0,
        assertions=(
            Assertion("circle: color = red", ((2, 5), (2, 12)), True, True),
            Assertion("mood", (), True, False),
        ),
        reference_units=(ReferenceUnit("red circle", True),),
    )
    rollouts = [
        Rollout(Completion([1, 2], text, [-0.1, -0.2], True), breakdown, length=3, reference_length=4, advantage=0.5)
        for text in captions
    ]
    sample = SimpleNamespace(sample_id=sample_id, reference="A red circle is at the top.")
    return RolloutGroup(SimpleNamespace(sample=sample), rollouts)


def write_steps(folder, steps, **options):
    with RunLog(folder, tensorboard=False, **options) as log:
        for step in steps:
            log.log_step(step, {"loss": step / 10, "time/step": 0.1})
            log.log_completions(step, [make_group()])
            if step % 2 == 0:
                log.log_evaluation(step, "sampled", {"precision": 0.5})
                log.log_eval_captions(step, "sampled", [make_group()])


def steps_in(path):
    return [record["step"] for record in read_jsonl(path)]


def test_nanmean_takes_finite_values_only():
    assert nanmean([1.0, math.nan, None, math.inf, 3.0]) == 2.0
    assert math.isnan(nanmean([math.nan]))
    assert math.isnan(nanmean([]))


def test_every_record_reads_back(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_step(1, {"loss": 0.25, "tokens": 7, "lr": torch.tensor(1e-4), "kl": np.float32(0.5)})
        log.log_evaluation(0, "greedy", {"precision": 0.5, "num_samples": 2})
        log.log_completions(1, [make_group()])
        log.log_eval_captions(0, "greedy", [make_group()])
    (step,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert step == {"step": 1, "loss": 0.25, "tokens": 7, "lr": pytest.approx(1e-4), "kl": 0.5}
    assert read_jsonl(tmp_path / "evaluations.jsonl") == [
        {"step": 0, "mode": "greedy", "precision": 0.5, "num_samples": 2}
    ]
    first, second = read_jsonl(tmp_path / "completions.jsonl")
    assert (first["rollout"], second["rollout"], second["caption"]) == (0, 1, "A blue square.")
    assert first["length_ratio"] == 0.75
    assert first["b_capscore"] == pytest.approx(3 / (1 / 0.5 + 1 + 1 / 0.75))
    assert first["assertions"][0] == {
        "text": "circle: color = red",
        "spans": [[2, 5], [2, 12]],
        "verified": True,
        "pointable": True,
    }
    assert first["reference_units"] == [{"text": "red circle", "covered": True}]
    held_out = read_jsonl(tmp_path / "eval_captions.jsonl")[0]
    assert (held_out["mode"], held_out["reference"]) == ("greedy", "A red circle is at the top.")


def test_nan_becomes_null_and_text_survives():
    record = {
        "step": 1,
        "kl": math.nan,
        "inf": -math.inf,
        "caption": "naïve \u2028\n\ud800 图",
        "x": torch.tensor(math.nan),
    }
    line = encode_line(record)
    assert line.count(b"\n") == 1
    assert json.loads(line) == {**record, "kl": None, "inf": None, "x": None}


@pytest.mark.parametrize("value", [object(), torch.zeros(2), np.zeros(3), {1, 2}])
def test_what_cannot_be_logged_is_named(value):
    with pytest.raises(TypeError, match="grad_norm"):
        encode_line({"step": 1, "grad_norm": value})


def test_unjudged_rollout_is_written_with_null_scores(tmp_path):
    group = make_group(captions=("one",))
    group.rollouts[0].breakdown = None
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_completions(1, [group])
    (record,) = read_jsonl(tmp_path / "completions.jsonl")
    assert record["precision"] is None
    assert record["error"] == "not judged"


def test_completions_can_be_switched_off(tmp_path):
    write_steps(tmp_path, [2], completions=False)
    assert not (tmp_path / "completions.jsonl").exists()
    assert len(read_jsonl(tmp_path / "eval_captions.jsonl")) == 2


def test_resume_cuts_all_files_back_and_goes_on(tmp_path):
    write_steps(tmp_path, range(1, 7))
    write_steps(tmp_path, [4, 5], resume_step=3)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert steps_in(tmp_path / "completions.jsonl") == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert steps_in(tmp_path / "evaluations.jsonl") == [2, 4]
    assert steps_in(tmp_path / "eval_captions.jsonl") == [2, 2, 4, 4]


def test_resumed_log_equals_uninterrupted_log(tmp_path):
    write_steps(tmp_path / "whole", range(1, 7))
    write_steps(tmp_path / "cut", range(1, 6))
    write_steps(tmp_path / "cut", range(4, 7), resume_step=3)
    for name in LOG_FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_fresh_run_discards_old_logs(tmp_path):
    write_steps(tmp_path, range(1, 5))
    save_eval_image(tmp_path, "old", Image.new("RGB", (4, 4)))
    write_steps(tmp_path, [1])
    assert steps_in(tmp_path / "metrics.jsonl") == [1]
    assert not (tmp_path / "evaluations.jsonl").exists()
    assert not eval_image_path(tmp_path, "old").exists()


@pytest.mark.parametrize(
    "tail", [b'{"step":3,"loss":0.', b'{"step":3,"loss":0.3}', b"\x00\x00\x00", b'[3]\n{"loss": 1}\n']
)
def test_broken_tail_is_dropped(tmp_path, tail):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(tail)
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    write_steps(tmp_path, [3], resume_step=3)
    assert steps_in(path) == [1, 2, 3]
    assert path.read_bytes().endswith(b"}\n")


def test_truncation_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    monkeypatch.setattr("balcaprl.reporting.metrics.os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        truncate_jsonl(path, 1)
    assert path.read_bytes() == before


def test_truncating_a_missing_file_is_nothing(tmp_path):
    assert truncate_jsonl(tmp_path / "none.jsonl", 3) == 0
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_lines_survive_kill_minus_nine(tmp_path):
    script = f"""
        import os, signal
        from balcaprl.reporting.metrics import RunLog
        log = RunLog({str(tmp_path)!r}, tensorboard=False)
        for step in range(1, 51):
            log.log_step(step, {{"loss": 0.5}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert steps_in(tmp_path / "metrics.jsonl") == list(range(1, 51))


def test_a_line_is_one_write(tmp_path, monkeypatch):
    class ShortDisk(io.BytesIO):
        def write(self, data):
            return super().write(data[:5])

    log = RunLog(tmp_path, tensorboard=False)
    monkeypatch.setitem(log._files, "metrics.jsonl", ShortDisk())
    with pytest.raises(OSError, match="disk full"):
        log.log_step(1, {"loss": 0.5})


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_purges_on_resume(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 5):
            log.log_step(step, {"loss": float(step), "kl": math.nan})
        log.log_evaluation(4, "greedy", {"recall": 0.5})
    with RunLog(tmp_path, resume_step=2) as log:
        log.log_step(3, {"loss": 30.0})
        log.sync()
    scalars = read_events(tmp_path / "tensorboard")
    assert scalars["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "kl" not in scalars


def test_missing_tensorboard_says_what_to_do_and_discards_nothing(tmp_path, monkeypatch):
    write_steps(tmp_path, [1])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        RunLog(tmp_path)
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_phase_timer_adds_up_and_starts_over(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("balcaprl.reporting.metrics.time.perf_counter", lambda: next(clock))
    timer = PhaseTimer()  # 0
    for _ in range(2):
        with timer("sample"):  # 1 to 3, 3 to 4
            pass
    assert timer.finish_step() == {"time/sample": 3.0, "time/step": 10.0}
    timer.start_step()  # 20
    assert timer.finish_step() == {"time/step": 1.0}


def test_phase_timer_synchronizes_at_both_ends_and_keeps_failed_phases():
    calls = []
    timer = PhaseTimer(synchronize=lambda: calls.append(1))
    with timer("update"):
        assert len(calls) == 1
    assert len(calls) == 2
    with pytest.raises(KeyError), timer("score"):
        raise KeyError
    assert set(timer.finish_step()) == {"time/update", "time/score", "time/step"}


def test_times_memory_and_rates_are_not_reproducible():
    assert [is_reproducible(k) for k in ("memory/rss_gib", "time/step", "tokens_per_second", "loss")] == [
        False,
        False,
        False,
        True,
    ]


def test_reading_a_run_needs_no_torch():
    code = "import sys, balcaprl.reporting.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
