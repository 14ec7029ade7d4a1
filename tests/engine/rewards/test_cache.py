"""The reply cache: what is committed stays, the bound holds, several processes share it, no failure ends a run."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from balcaprl.rewards.cache import ReplyCache

WRITER = """
import sys
from balcaprl.rewards.cache import ReplyCache
cache = ReplyCache(sys.argv[1], 1 << 30)
name, count = sys.argv[2], int(sys.argv[3])
for i in range(count):
    key = f"{name}-{i}".encode()
    cache.put(key, key * 50, task="verify.v1", model="m")
    print(i, flush=True)
"""


def put(cache, *keys, size=10):
    for key in keys:
        cache.put(key.encode(), b"x" * size, task="verify.v1", model="m")


def test_what_is_put_is_got_and_survives_closing(tmp_path):
    cache = ReplyCache(tmp_path / "sub" / "c.db", 1 << 20)
    put(cache, "a")
    assert cache.get(b"a") == b"x" * 10
    assert cache.get(b"b") is None
    cache.close()
    cache.close()
    assert cache.get(b"a") is None
    again = ReplyCache(tmp_path / "sub" / "c.db", 1 << 20)
    assert again.get(b"a") == b"x" * 10
    assert (tmp_path / "sub" / "c.db").stat().st_mode & 0o077 == 0
    again.close()


def test_the_bound_holds_and_the_least_recently_used_go(tmp_path):
    cache = ReplyCache(tmp_path / "c.db", 20_000)
    for i in range(30):
        put(cache, f"k{i}", size=900)
        cache.get(b"k0")
    report = cache.report()
    assert report.num_bytes <= 20_000
    assert 10 < report.num_entries < 21
    assert cache.get(b"k0") is not None
    assert cache.get(b"k1") is None
    assert cache.get(b"k29") is not None


def test_report_and_prune(tmp_path):
    cache = ReplyCache(tmp_path / "c.db", 1 << 20)
    put(cache, "a", "b", "c")
    cache.put(b"d", b"y", task="style.v1", model="n")
    report = cache.report()
    assert report.by_task == {"style.v1, n": 1, "verify.v1, m": 3}
    assert report.num_bytes == 3 * 110 + 101
    assert abs(report.oldest - time.time()) < 60
    assert cache.prune(unused_days=1) == 0
    assert cache.prune(max_bytes=250) == 2
    assert cache.prune(unused_days=0) == 2
    assert cache.report().num_entries == 0
    assert cache.report().num_bytes == 0


def test_a_file_that_is_no_cache_is_refused_and_left(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 100)
    with pytest.raises(ValueError, match="no judge cache"):
        ReplyCache(path, 1 << 20)
    assert path.read_text().startswith("dear diary")


def test_a_cache_that_breaks_costs_money_not_the_run(tmp_path, caplog):
    cache = ReplyCache(tmp_path / "c.db", 1 << 20)
    put(cache, "a")
    other = sqlite3.connect(tmp_path / "c.db")
    other.execute("DROP TABLE replies")
    other.close()
    assert cache.get(b"a") is None
    put(cache, "b")
    assert cache.num_failures == 1
    assert "left alone" in caplog.text
    cache.close()


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "c.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"w{i}", "150"], stdout=subprocess.DEVNULL)
        for i in range(3)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    cache = ReplyCache(path, 1 << 30)
    assert cache.report().num_entries == 450
    assert all(cache.get(f"w{i}-{j}".encode()) == f"w{i}-{j}".encode() * 50 for i in range(3) for j in range(150))
    cache.close()


def test_kill_in_mid_write_loses_no_committed_entry(tmp_path):
    """50 times: what the writer reported before kill -9 is there, and the file is sound."""
    path = tmp_path / "c.db"
    ReplyCache(path, 1 << 30).close()
    rng = random.Random(0)
    for round_ in range(50):
        reported = _kill_a_writer(path, f"r{round_}", rng.uniform(0.0, 0.03))
        cache = ReplyCache(path, 1 << 30)
        for i in range(reported + 1):
            assert cache.get(f"r{round_}-{i}".encode()) == f"r{round_}-{i}".encode() * 50
        cache.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    told, real = connection.execute("SELECT bytes, (SELECT SUM(length(value) + 100) FROM replies) FROM size").fetchone()
    assert told == real
    connection.close()


FORKED_ENDLESSLY = 1_000_000


def _kill_a_writer(path, name, after_s):
    """Fork (no new interpreter: 50 would take minutes), write until killed; returns the last number that was reported."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            cache = ReplyCache(path, 1 << 30)
            for i in range(FORKED_ENDLESSLY):
                key = f"{name}-{i}".encode()
                cache.put(key, key * 50, task="verify.v1", model="m")
                os.write(send, b"%d\n" % i)
        finally:
            os._exit(1)
    os.close(send)
    with os.fdopen(receive, "rb") as reports:
        first = reports.readline()
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = [first, *reports.read().splitlines(keepends=True)]
    return int([line for line in lines if line.endswith(b"\n")][-1])
