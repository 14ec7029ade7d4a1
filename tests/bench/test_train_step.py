"""The interleaving of whole steps: nobody computes out of turn, and who dies is a row, not a hang."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import train_step

STEPS = """
import sys
sys.path.insert(0, {bench!r})
import train_step
turn = train_step.Turn()
for step in range({steps}):
    turn.next()
    with open({log!r}, "a") as file:
        file.write({name!r})
    print("noise")
{end}
"""


def start(tmp_path: Path, name: str, steps: int, end: str) -> train_step.Worker:
    bench = str(Path(train_step.__file__).parent)
    code = STEPS.format(bench=bench, log=str(tmp_path / "log"), name=name, steps=steps, end=end)
    return train_step.Worker([sys.executable, "-c", code], tmp_path / f"{name}.err")


def test_workers_take_turns(tmp_path):
    row = "print('{\"median_s\": 2}')"
    workers = [start(tmp_path, "a", 3, row), start(tmp_path, "b", 3, row)]
    assert not (tmp_path / "log").exists(), "started, and waiting"
    rounds = 0
    while sum(worker.take_turn() for worker in workers):
        rounds += 1
    assert (tmp_path / "log").read_text() == "ababab"
    assert rounds == 2, "the third turn is the last"
    assert [worker.row for worker in workers] == [{"median_s": 2}] * 2


def test_a_worker_that_dies_is_a_row_and_the_others_go_on(tmp_path):
    dies = start(tmp_path, "a", 1, "raise ValueError('out of memory')")
    lives = start(tmp_path, "b", 2, "print('{}')")
    never = start(tmp_path, "c", 0, "raise SystemExit(3)")
    assert [dies.take_turn(), lives.take_turn(), never.take_turn()] == [False, True, False]
    assert not lives.take_turn()
    assert dies.row["failed"] == "ValueError: out of memory"
    assert never.row["failed"] == "exit status 3"
    assert "failed" in lives.row, "a row without a figure is none"
