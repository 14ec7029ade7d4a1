"""``summary.json`` says what was evaluated, and what was not."""

import json

import pytest

from balcaprl.reporting.summary import write_summary

SCORES = ("precision", "recall", "linguistic", "b_capscore", "length_ratio")


def run_folder(folder, steps, evaluations):
    lines = [{"step": step, "time/step": 0.5} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [
        {"step": step, "mode": mode, **dict.fromkeys(SCORES, 0.1 * (i + 1))}
        for i, step in enumerate(evaluations)
        for mode in ("sampled", "greedy")
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def summary_of(folder, planned):
    summary = write_summary(folder, sampler="hf", seed=0, planned_steps=planned)
    assert json.loads((folder / "summary.json").read_text()) == summary
    return summary


def test_a_finished_run_compares_its_first_and_last_evaluation(tmp_path):
    summary = summary_of(run_folder(tmp_path, 10, [0, 5, 10]), 10)
    assert (summary["status"], summary["before_step"], summary["after_step"]) == ("finished", 0, 10)
    assert summary["after"]["recall"] == pytest.approx(0.3)
    assert summary["after_greedy"]["recall"] == pytest.approx(0.3)
    assert "note" not in summary
    assert summary["train_seconds"] == 5.0


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_an_interrupted_run_was_not_evaluated_afterwards(tmp_path, steps):
    summary = summary_of(run_folder(tmp_path, steps, [0]), 10)
    assert summary["status"] == "interrupted"
    assert summary["before"]["recall"] == pytest.approx(0.1)
    assert summary["after"] is summary["after_greedy"] is summary["after_step"] is None
    assert "has not been evaluated" in summary["note"]
    assert f"after step {steps} of 10" in summary["note"]


def test_a_run_of_no_steps_ends_where_it_began(tmp_path):
    summary = summary_of(run_folder(tmp_path, 0, [0]), 0)
    assert summary["status"] == "finished"
    assert summary["before"] == summary["after"]


def test_an_interrupted_run_says_which_evaluation_was_its_last(tmp_path):
    summary = summary_of(run_folder(tmp_path, 8, [0, 5]), 10)
    assert (summary["status"], summary["after_step"]) == ("interrupted", 5)
    assert summary["after"]["recall"] == pytest.approx(0.2)
    assert "last evaluated at step 5" in summary["note"]


def test_a_run_without_evaluation_has_no_scores(tmp_path):
    summary = summary_of(run_folder(tmp_path, 10, []), 10)
    assert summary["before"] is summary["after"] is None
    assert summary["status"] == "finished"


def test_odd_lines_do_not_stop_a_run_at_its_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n{"step": 2, "time/step": 1e999}\n{"step": 3, "time/step": -1}\n'
    )
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0}\n{"step": 0, "mode": "sampled"}\nhalf')
    summary = summary_of(tmp_path, 3)
    assert (summary["steps"], summary["train_seconds"]) == (3, 0.0)
    assert summary["before"]["recall"] is None
