"""A command writes only into what does not exist, what is empty, or what is its own; and one process at a time."""

import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from balcaprl.cli.main import main
from balcaprl.files.ownership import (
    ForeignPathError,
    PathInUseError,
    claim_file,
    claim_folder,
    has_mark,
    refuse_foreign_file,
    write_atomically,
)
from balcaprl.reporting.metrics import RunLog
from balcaprl.rewards.endpoint.server.cache import ReplyCache


def snapshot(folder):
    """Every name below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
    }


# ---------------------------------------------------------------------------------------------------- folders


def test_new_and_empty_folders_are_taken_and_marked(tmp_path):
    for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with claim_folder(folder, "run", option="output_dir"):
            assert has_mark(folder, "run")
            (folder / "metrics.jsonl").touch()
        with claim_folder(folder, "run", option="output_dir"):
            pass
        assert has_mark(folder, "run")


def test_a_folder_that_stayed_empty_is_left_as_it_was(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("new", "old"):
        claim_folder(tmp_path / name, "run", option="output_dir").release()
    assert snapshot(tmp_path) == {"old": False}


def foreign(folder, kind):
    folder.mkdir()
    if kind == "a file":
        (folder / "thesis.tex").write_text("precious")
    elif kind == "a folder":
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events.out.tfevents.1").write_bytes(b"theirs")
    elif kind == "pictures":
        (folder / "eval_images").mkdir()
        (folder / "eval_images" / "mine.png").write_bytes(b"mine")
    elif kind == "metrics":
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    elif kind == "hidden":
        (folder / ".env").write_text("KEY=1")
    elif kind == "dangling link":
        (folder / "metrics.jsonl").symlink_to(folder / "nowhere")
    elif kind == "another mark":
        (folder / ".balcaprl-evaluation").touch()
    elif kind == "a mark that is a folder":
        (folder / ".balcaprl-run").mkdir()
        (folder / "x").touch()


KINDS = [
    "a file",
    "a folder",
    "pictures",
    "metrics",
    "hidden",
    "dangling link",
    "another mark",
    "a mark that is a folder",
]


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_folders_are_refused_untouched(tmp_path, kind):
    folder = tmp_path / "theirs"
    foreign(folder, kind)
    before = snapshot(tmp_path)
    with pytest.raises(ForeignPathError, match=r"output_dir: .*theirs.*empty"):
        claim_folder(folder, "run", option="output_dir")
    with pytest.raises(ForeignPathError):
        RunLog(folder, tensorboard=False)
    for arguments in (
        ["demo", "--steps", "1", "--sampler", "hf", "--out", str(folder)],
        ["train", "--steps", "1", "--rollout.sampler", "hf", "--output_dir", str(folder)],
        ["warmstart", str(folder)],
    ):
        assert main(arguments) == 1
    assert snapshot(tmp_path) == before


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "f").write_text("precious")
    assert main(["demo", "--out", str(tmp_path / "f")]) == 1
    assert (tmp_path / "f").read_text() == "precious"


@pytest.mark.parametrize("name", ["lost+found", ".gitkeep", ".DS_Store"])
def test_what_nobody_put_there_does_not_count(tmp_path, name):
    (tmp_path / name).mkdir()
    claim_folder(tmp_path, "run", option="output_dir").release()


def test_evaluate_does_not_write_into_a_run(tmp_path, capsys):
    """Neither into one with a mark, nor into one of an earlier version, nor into its checkpoints."""
    from balcaprl.assets import demo_model_path

    old, new = tmp_path / "old", tmp_path / "new"
    for run in (old, new):
        (run / "checkpoints" / "step_00000003").mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        (run / "config.yaml").write_text("seed: 0\n")
    (new / ".balcaprl-run").touch()
    before = snapshot(tmp_path)
    for out in (old, new, new / "checkpoints", new / "checkpoints" / "step_00000003" / ".."):
        assert main(["evaluate", str(demo_model_path()), "--out", str(out)]) == 1
        assert "--out" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------------------- locks


HOLD = """
    import sys, time
    from pathlib import Path
    from balcaprl.files.ownership import claim_file, claim_folder
    path = Path(sys.argv[2])
    claim = claim_file(path, option="--out") if sys.argv[1] == "file" else claim_folder(path, "run", option="output_dir")
    print("held", flush=True)
    time.sleep(600)
"""
TAKE = {
    "folder": lambda path: claim_folder(path, "run", option="output_dir"),
    "file": lambda path: claim_file(path, option="--out"),
}


@pytest.mark.parametrize("what", TAKE)
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, what):
    path = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), what, path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(PathInUseError, match=f"process {holder.pid} on {socket.gethostname()}"):
            TAKE[what](path)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with TAKE[what](path):
        pass


@pytest.mark.parametrize("what", TAKE)
def test_this_process_is_told_of_itself(tmp_path, what):
    with TAKE[what](tmp_path / "out"), pytest.raises(PathInUseError, match="this very process"):
        TAKE[what](tmp_path / "out")
    with TAKE[what](tmp_path / "out"):
        pass


@pytest.mark.parametrize("what", TAKE)
@pytest.mark.parametrize("method", ["fork", "exec"])
def test_children_do_not_keep_the_lock_of_a_parent_that_died(tmp_path, what, method):
    """What samples or loads data in a child may outlive a run that is killed."""
    script = """
        import os, signal, subprocess, sys, time
        from pathlib import Path
        from balcaprl.files.ownership import claim_file, claim_folder
        path = Path(sys.argv[2])
        claim = claim_file(path, option="--out") if sys.argv[1] == "file" else claim_folder(path, "run", option="output_dir")
        if sys.argv[3] == "fork":
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writer, b"!")  # from here on the child runs, and has dropped what is its parent's
                time.sleep(600)
            os.read(reader, 1)
        else:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False).pid
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), what, tmp_path / "out", method], stdout=subprocess.PIPE
    )
    child = int(parent.stdout.readline())
    try:
        assert parent.wait() == -signal.SIGKILL
        os.kill(child, 0)
        with TAKE[what](tmp_path / "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def child_releases(claim):
    claim.release()


def test_a_child_cannot_release_what_its_parent_holds(tmp_path):
    with claim_folder(tmp_path / "out", "run", option="output_dir") as claim:
        child = multiprocessing.get_context("fork").Process(target=child_releases, args=(claim,))
        child.start()
        child.join()
        assert child.exitcode == 0
        with pytest.raises(PathInUseError):
            claim_folder(tmp_path / "out", "run", option="output_dir")


def test_a_claim_that_is_forgotten_is_no_longer_held(tmp_path):
    claim = claim_folder(tmp_path / "out", "run", option="output_dir")
    del claim
    claim_folder(tmp_path / "out", "run", option="output_dir").release()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 3000, b'{"pid": "\x1b[2J", "host": 3}', b"\x00\xff"])
def test_what_stands_in_a_mark_is_not_trusted(tmp_path, content):
    import fcntl

    mark = tmp_path / ".balcaprl-run"
    mark.write_bytes(content)
    with open(mark, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(PathInUseError, match="another process"):
            claim_folder(tmp_path, "run", option="output_dir")
    claim_folder(tmp_path, "run", option="output_dir").release()
    assert json.loads(mark.read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large"])
def test_a_mark_that_is_no_mark_is_refused(tmp_path, kind):
    mark, target = tmp_path / "out" / ".balcaprl-run", tmp_path / "precious"
    mark.parent.mkdir()
    target.write_text("precious")
    if kind == "link":
        mark.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(mark)
    elif kind == "folder":
        mark.mkdir()
    else:
        mark.write_bytes(b"x" * 10_000)
    with pytest.raises((ForeignPathError, OSError)):
        claim_folder(mark.parent, "run", option="output_dir")
    assert target.read_text() == "precious"


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    with claim_folder(tmp_path / "run", "run", option="output_dir"):
        assert main(["demo", "--steps", "1", "--sampler", "hf", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert f"{os.getpid()}" in error
    assert "output_dir" in error


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("content", [b"precious", b"{}\n", b"\x00" * 100, b'{"written_by": "me"}\n'])
def test_an_audit_replaces_no_foreign_file_and_asks_nothing_first(tmp_path, content, monkeypatch, capsys):
    monkeypatch.setattr("balcaprl.rewards.audit.audit_config", lambda *_, **__: pytest.fail("audited first"))
    out = tmp_path / "report.json"
    out.write_bytes(content)
    assert main(["judge-audit", "--reward.judge", "lexical", "--out", str(out)]) == 1
    assert "--out" in capsys.readouterr().err
    assert snapshot(tmp_path) == {"report.json": content}


def test_an_audit_replaces_its_own_report(tmp_path):
    out = tmp_path / "report.json"
    for _ in range(2):
        arguments = ["--reward.judge", "scene", "--scenes", "2", "--captions", "1", "--out", str(out)]
        assert main(["judge-audit", *arguments]) == 0
    assert json.loads(out.read_text())["num_captions"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_or_a_pipe_is_no_file_of_ours(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ForeignPathError, match="no ordinary file"):
            refuse_foreign_file(path, lambda _: True, what="x", option="--out")


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / f".f.{os.getpid()}.tmp").symlink_to(precious)
    write_atomically(tmp_path / "f", b"new")
    assert precious.read_text() == "precious"
    assert snapshot(tmp_path) == {"f": b"new", "precious": b"precious"}


@pytest.mark.parametrize("kind", ["another database", "no database", "folder"])
def test_the_cache_takes_no_foreign_database(tmp_path, kind):
    path = tmp_path / "places.sqlite"
    if kind == "another database":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE moz_places (url TEXT)")
        connection.close()
    elif kind == "no database":
        path.write_bytes(b"precious" * 1000)
    else:
        path.mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"endpoint\.cache"):
        ReplyCache(path, max_bytes=1 << 20)
    assert snapshot(tmp_path) == before


def test_the_cache_takes_its_own_and_an_empty_file(tmp_path):
    path = tmp_path / "judge % ?.db"
    path.touch()
    for _ in range(2):
        cache = ReplyCache(path, max_bytes=1 << 20)
        cache.put(b"k", b"v", task="t", model="m")
        cache.close()
    again = ReplyCache(path, max_bytes=1 << 20)
    assert again.get(b"k") == b"v"
    again.close()


def test_what_a_killed_process_left_half_written_goes_and_nothing_else(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log_step(1, {"loss": 0.5})
    ours = [".metrics.jsonl.123.tmp", ".completions-00000001-00000002.jsonl.gz.9.tmp", ".config.yaml.1.tmp"]
    theirs = [
        ".mine.txt.123.tmp",
        ".metrics.jsonl.tmp",
        "metrics.jsonl.123.tmp",
        ".metrics.jsonl.swp",
        ".completions.9.tmp",
    ]
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    (tmp_path / "eval_images").mkdir()
    (tmp_path / "eval_images" / ".a.png.5.tmp").touch()
    RunLog(tmp_path, tensorboard=False, resume_step=1).close()
    assert {path.name for path in tmp_path.glob("*tmp")} | {path.name for path in tmp_path.glob(".*swp")} == set(theirs)
    assert list((tmp_path / "eval_images").iterdir()) == []
