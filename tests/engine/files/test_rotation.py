"""Completions of a long run: compressed in parts, bounded, and the same bits however often the run was stopped."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from logged_completions import STEPS
from logged_completions import write_completions as write

from balcaprl.files import rotation
from balcaprl.files.rotation import COMPLETIONS, EVAL_CAPTIONS, ROTATED, list_parts, read_captions
from balcaprl.reporting import run_reading
from balcaprl.reporting.run_reading import load_run


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl*"))}


def steps_of(folder, name=COMPLETIONS):
    return [record["step"] for record in read_captions(folder, name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write(folder, range(1, STEPS + 1))
    assert len(list_parts(folder)) >= 3
    return folder


def test_parts_are_compressed_named_by_their_steps_and_hold_every_line(whole, tmp_path):
    write(tmp_path, range(1, STEPS + 1), part_bytes=1 << 30)
    lines = (tmp_path / "completions.jsonl").read_bytes()
    unpacked = b"".join(gzip.decompress(part.path.read_bytes()) for part in list_parts(whole))
    live = whole / "completions.jsonl"
    assert unpacked + (live.read_bytes() if live.exists() else b"") == lines
    assert list(read_captions(whole)) == list(read_captions(tmp_path)) == list(map(json.loads, lines.splitlines()))
    ends = [(part.first, part.last) for part in list_parts(whole)]
    assert ends[0][0] == 1
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize(("stopped", "saved"), [(t, s) for t in (3, 7, STEPS) for s in range(t + 1)])
def test_a_run_that_goes_on_at_any_step_ends_with_the_same_files(whole, tmp_path, saved, stopped):
    write(tmp_path, range(1, stopped + 1))
    write(tmp_path, range(saved + 1, STEPS + 1), resume_step=saved)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("point", ["write", "replaced", "unlink", "remove"])
@pytest.mark.parametrize("saved", [2, 5, 6, 9])
def test_a_kill_in_the_middle_of_packing_or_of_cutting_back_is_mended(whole, tmp_path, point, saved):
    """kill -9 at each place where the disk changes, at every occurrence, first while packing, then while resuming."""
    script = """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[5])
        import logged_completions
        from balcaprl.files import ownership, rotation
        folder, point, nth, saved = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        count = 0
        def die():
            global count
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)
        replace, unlink, remove = os.replace, Path.unlink, rotation._remove
        def dying_replace(*a):
            if point == "write": die()
            replace(*a)
            if point == "replaced": die()
        def dying_unlink(self, **k):
            if point == "unlink" and self.name.startswith("completions"): die()
            unlink(self, **k)
        def dying_remove(parts):
            for part in parts:
                remove([part])
                if point == "remove": die()
        os.replace, Path.unlink, rotation._remove = dying_replace, dying_unlink, dying_remove
        if saved < 0:
            logged_completions.write_completions(folder, range(1, logged_completions.STEPS + 1))
        else:
            logged_completions.write_completions(folder, range(saved + 1, logged_completions.STEPS + 1), resume_step=saved)
    """

    def run(folder, nth, saved):
        arguments = [folder, point, str(nth), str(saved), Path(__file__).parents[2] / "helpers"]
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], check=False)
        assert done.returncode in (0, -signal.SIGKILL)

    for nth in (2, 3):
        folder = tmp_path / str(nth)
        run(folder, nth, -1)
        if max(steps_of(folder), default=0) < saved:
            write(folder, range(1, saved + 2))  # it had come so far when it was killed
        run(folder, 1, saved)
        run(folder, 2, saved)
        write(folder, range(saved + 1, STEPS + 1), resume_step=saved)
        assert files(folder) == files(whole)
        assert not list(folder.glob(".*.tmp"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    write(folder, range(STEPS + 1), name=EVAL_CAPTIONS)
    assert len(list_parts(folder, EVAL_CAPTIONS)) >= 3
    return folder


def test_held_out_captions_are_packed_alike_and_never_between_the_modes_of_an_evaluation(evaluated, tmp_path):
    write(tmp_path, range(STEPS + 1), part_bytes=1 << 30, name=EVAL_CAPTIONS)
    assert files(tmp_path).keys() == {EVAL_CAPTIONS}
    assert list(read_captions(evaluated, EVAL_CAPTIONS)) == list(read_captions(tmp_path, EVAL_CAPTIONS))
    assert steps_of(evaluated, EVAL_CAPTIONS) == [step for step in range(STEPS + 1) for _ in range(4)]
    ends = [(part.first, part.last) for part in list_parts(evaluated, EVAL_CAPTIONS)]
    assert ends[0][0] == 0
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize(("stopped", "saved"), [(t, s) for t in (2, 5, STEPS) for s in range(t + 1)])
def test_a_run_that_goes_on_ends_with_the_same_held_out_captions(evaluated, tmp_path, saved, stopped):
    write(tmp_path, range(stopped + 1), name=EVAL_CAPTIONS)
    write(tmp_path, range(saved + 1, STEPS + 1), resume_step=saved, name=EVAL_CAPTIONS)
    assert files(tmp_path) == files(evaluated)


def test_of_held_out_captions_the_first_and_the_newest_stay_and_the_report_finds_them(tmp_path):
    bound = 900
    write(tmp_path / "whole", range(60), max_bytes=bound, name=EVAL_CAPTIONS)
    kept = list_parts(tmp_path / "whole", EVAL_CAPTIONS)
    assert sum(part.path.stat().st_size for part in kept) <= bound
    assert kept[0].first == 0
    assert kept[1].first > kept[0].last + 1
    write(tmp_path / "cut", range(58), max_bytes=bound, name=EVAL_CAPTIONS)
    write(tmp_path / "cut", range(50, 60), max_bytes=bound, resume_step=49, name=EVAL_CAPTIONS)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    steps = {record["step"] for record in load_run(tmp_path / "whole").captions}
    assert {0, 59} <= steps <= set(steps_of(tmp_path / "whole", EVAL_CAPTIONS))


def test_a_report_reads_packed_captions_within_bounds_and_through_no_link_out_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_reading, "_MAX_LOG_BYTES", 1 << 20)
    run = tmp_path / "run"
    run.mkdir()
    with gzip.open(run / "eval_captions-00000000-00000001.jsonl.gz", "wb") as file:
        file.write(b'{"step": 0, "sample_id": "a"}\n')
        for _ in range(64):
            file.write(b"\0" * (1 << 20))
        file.write(b'\n{"step": 1, "sample_id": "a"}\n')
    with gzip.open(tmp_path / "secret.gz", "wb") as file:
        file.write(b'{"step": 2, "sample_id": "a", "caption": "secret"}\n')
    (run / "eval_captions-00000002-00000002.jsonl.gz").symlink_to(tmp_path / "secret.gz")
    assert [record["step"] for record in load_run(run).captions] == [0]


def test_the_oldest_make_room_and_a_resumed_run_agrees(tmp_path):
    bound = 900
    write(tmp_path / "whole", range(1, 60), max_bytes=bound)
    kept = list_parts(tmp_path / "whole")
    assert sum(part.path.stat().st_size for part in kept) <= bound
    assert len(kept) >= 2
    assert steps_of(tmp_path / "whole")[-1] == 59
    assert steps_of(tmp_path / "whole")[0] == kept[0].first > 1
    write(tmp_path / "cut", range(1, 58), max_bytes=bound)
    write(tmp_path / "cut", range(50, 60), max_bytes=bound, resume_step=49)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_the_newest_part_always_stays(tmp_path):
    write(tmp_path, range(1, STEPS), max_bytes=1)
    assert len(list_parts(tmp_path)) == 1


def test_a_fresh_run_discards_old_parts_and_nothing_else(tmp_path):
    write(tmp_path, range(1, STEPS))
    write(tmp_path, range(STEPS, 2 * STEPS), name=EVAL_CAPTIONS, resume_step=STEPS)
    assert all(list_parts(tmp_path, name) for name in ROTATED)
    (tmp_path / "completions-notes.jsonl.gz").write_bytes(b"mine")
    (tmp_path / "completions-00000001-00000002.jsonl").write_bytes(b"mine")
    write(tmp_path, [1])
    assert not any(list_parts(tmp_path, name) for name in ROTATED)
    assert not (tmp_path / EVAL_CAPTIONS).exists()
    assert steps_of(tmp_path) == [1, 1]
    assert (tmp_path / "completions-notes.jsonl.gz").read_bytes() == b"mine"
    assert (tmp_path / "completions-00000001-00000002.jsonl").read_bytes() == b"mine"


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip", "empty", "pipe"])
def test_a_damaged_part_costs_its_lines_and_not_the_rest(tmp_path, damage, caplog):
    write(tmp_path, range(1, STEPS + 1))
    first, *rest = list_parts(tmp_path)
    data = first.path.read_bytes()
    first.path.unlink()
    if damage == "pipe":
        os.mkfifo(first.path)
    else:
        middle = len(data) // 2
        forms = {
            "cut": data[:middle],
            "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
            "no gzip": b"x" * 100,
            "empty": b"",
        }
        first.path.write_bytes(forms[damage])
    found = steps_of(tmp_path)
    assert [step for step in found if step >= rest[0].first] == [
        s for s in range(rest[0].first, STEPS + 1) for _ in range(2)
    ]
    if damage not in ("empty", "pipe"):
        assert str(first.path) in caplog.text


def test_a_part_that_unpacks_without_end_is_read_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(rotation, "_MAX_PART_BYTES", 1 << 20)
    with gzip.open(tmp_path / "completions-00000001-00000002.jsonl.gz", "wb") as file:
        file.write(b'{"step": 1}\n')
        for _ in range(64):
            file.write(b"\0" * (1 << 20))
        file.write(b'{"step": 2}\n')
    assert steps_of(tmp_path) == [1]
