"""The reply cache: what is committed stays, the bound holds, several processes share it, no failure ends a run."""

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from balcaprl.rewards.endpoint.server.cache import ReplyCache

WRITER = """
import sys
from balcaprl.rewards.endpoint.server.cache import ReplyCache
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


# ------------------------------------------------------------------------------------------------------ the bound on disk


def on_disk(path):
    """Bytes of the file, its log and the log's index."""
    return sum(each.stat().st_size for each in path.parent.glob(path.name + "*"))


def fill(cache, num, seed, most_bytes=6000, check=None):
    rng = random.Random(seed)
    for i in range(num):
        key = hashlib.sha256(b"%d-%d" % (seed, i)).digest()
        cache.put(key, rng.randbytes(rng.randrange(50, most_bytes)), task="verify.v1", model="m")
        cache.get(hashlib.sha256(b"%d-%d" % (seed, rng.randrange(i + 1))).digest())
        if check is not None and i % 20 == 0:
            check()


@pytest.mark.parametrize(("mib", "most_bytes"), [(1, 6000), (1, 400), (1, 60_000), (3, 20_000)])
def test_the_files_never_outgrow_their_bound(tmp_path, mib, most_bytes):
    """Twice the bound and more is written: file, log and index together stay below it all the time, and much of it is used."""
    path, sizes = tmp_path / "c.db", []
    cache = ReplyCache(path, mib << 20)
    num = (5 * mib << 19) // (most_bytes // 2)
    fill(cache, min(num, 2500), 1, most_bytes, lambda: sizes.append(on_disk(path)))
    assert max(sizes) <= mib << 20
    assert cache.num_failures == 0
    assert cache.report().num_bytes > 0.25 * (mib << 20) or most_bytes == 400
    cache.close()
    assert on_disk(path) <= mib << 20


def test_processes_that_write_together_keep_the_bound_too(tmp_path):
    path, sizes = tmp_path / "c.db", []
    children = []
    for seed in range(3):
        child = os.fork()
        if child == 0:
            try:
                cache = ReplyCache(path, 1 << 20)
                fill(cache, 200, seed)
                cache.close()
                os._exit(1 if cache.num_failures else 0)
            except BaseException:
                os._exit(2)
        children.append(child)
    while children:
        sizes.append(on_disk(path))
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            children.remove(done)
            assert status == 0
        time.sleep(0.005)
    assert max(sizes) <= 1 << 20


def test_a_lowered_bound_holds_from_the_next_start(tmp_path):
    path = tmp_path / "c.db"
    cache = ReplyCache(path, 8 << 20)
    fill(cache, 2000, 3)
    cache.close()
    assert on_disk(path) > 4 << 20
    cache = ReplyCache(path, 2 << 20)
    assert on_disk(path) <= 2 << 20
    last = [hashlib.sha256(b"3-%d" % i).digest() for i in range(1990, 2000)]
    assert sum(cache.get(key) is not None for key in last) == 10, "the latest stay"
    cache.close()


def test_pruning_gives_the_room_back(tmp_path):
    path = tmp_path / "c.db"
    cache = ReplyCache(path, 8 << 20)
    fill(cache, 1500, 4)
    cache.prune(max_bytes=1 << 18)
    assert cache.report().file_bytes == on_disk(path) < 1 << 20
    cache.close()


def test_a_value_that_would_drive_out_all_others_is_not_kept(tmp_path):
    cache = ReplyCache(tmp_path / "c.db", 1 << 20)
    put(cache, "a")
    put(cache, "huge", size=1 << 19)
    assert cache.get(b"huge") is None
    assert cache.get(b"a") is not None
    cache.close()


# ------------------------------------------------------------------------------------------------------ damage


def filled(path, num=120):
    cache = ReplyCache(path, 4 << 20)
    for i in range(num):
        cache.put(b"key-%d" % i, b"value-%d " % i * (1 + i * 7), task="verify.v1", model="m")
    cache.close()


def check_use(path, num=120):
    """Every value is right or missing; new ones are kept. Returns how many are there."""
    cache = ReplyCache(path, 4 << 20)
    there = 0
    for i in range(num):
        value = cache.get(b"key-%d" % i)
        assert value in (None, b"value-%d " % i * (1 + i * 7))
        there += value is not None
    for i in range(num, num + 20):
        cache.put(b"key-%d" % i, b"anew", task="verify.v1", model="m")
    if not cache._broken:
        assert sum(cache.get(b"key-%d" % i) == b"anew" for i in range(num, num + 20)) >= 19
    cache.report()
    cache.close()
    return there


def test_flipped_bits_are_misses(tmp_path):
    """400 files with one bit flipped each, anywhere: no value is wrong, and nothing raises."""
    filled(tmp_path / "sound.db")
    sound, rng, there = (tmp_path / "sound.db").read_bytes(), random.Random(0), []
    for position in [*range(100), *(rng.randrange(100, len(sound)) for _ in range(300))]:
        path = tmp_path / "c.db"
        damaged = bytearray(sound)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        there.append(check_use(path))
        for file in tmp_path.glob("c.db*"):
            file.unlink()
    assert sum(there) > 0.6 * 120 * len(there), "most flips cost one entry"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:5000],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4096],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: random.Random(1).randbytes(len(data)),
        lambda data: data[:4096] + random.Random(2).randbytes(len(data) - 4096),
        lambda data: data[:100] + random.Random(3).randbytes(len(data) - 100),
        lambda data: random.Random(4).randbytes(100) + data[100:],
        lambda data: data[:8192] + bytes(len(data) - 8192),
    ],
)
def test_a_damaged_file_is_set_aside_and_the_run_goes_on(tmp_path, damage):
    path = tmp_path / "c.db"
    filled(path)
    path.write_bytes(damage(path.read_bytes()))
    check_use(path)
    assert check_use(path) <= 120


@pytest.mark.parametrize("num_kept", [0, 100, 4096, 12_288])
def test_a_file_that_is_damaged_while_it_is_used_is_set_aside(tmp_path, caplog, num_kept):
    path = tmp_path / "c.db"
    filled(path)
    mine, other = ReplyCache(path, 4 << 20), ReplyCache(path, 4 << 20)
    assert other.get(b"key-5") == mine.get(b"key-5") is not None
    with open(path, "r+b") as file:
        file.seek(num_kept)
        file.write(random.Random(0).randbytes(path.stat().st_size - num_kept))
    for i in range(300):
        cache = (mine, other)[i % 2]
        assert cache.get(b"key-%d" % i) in (None, b"value-%d " % i * (1 + i * 7))
        cache.put(b"new-%d" % i, b"x" * 300, task="verify.v1", model="m")
    assert not mine._broken
    assert not other._broken
    assert caplog.text.count("was damaged") == 1, "the second finds the new file"
    assert mine.get(b"new-299") == other.get(b"new-298") == b"x" * 300
    assert (tmp_path / "c.db.damaged").exists()
    mine.close()
    other.close()


def test_an_entry_that_was_changed_is_a_miss_and_can_be_stored_anew(tmp_path):
    path = tmp_path / "c.db"
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE replies SET value = 12345678901234 WHERE key = ?", (b"key-1",))
    connection.execute("UPDATE replies SET value = CAST('{}' AS BLOB) WHERE key = ?", (b"key-2",))
    connection.execute("UPDATE replies SET key = CAST('key-x' AS BLOB) WHERE key = ?", (b"key-3",))
    connection.commit()
    connection.close()
    cache = ReplyCache(path, 4 << 20)
    assert [cache.get(key) for key in (b"key-1", b"key-2", b"key-x")] == [None] * 3
    assert cache.num_damaged == 3
    put(cache, "key-2")
    assert cache.get(b"key-2") == b"x" * 10
    cache.close()


@pytest.mark.parametrize("name", ["c.db", "c.sqlite"])
def test_another_programs_database_is_refused_and_not_touched(tmp_path, name):
    path = tmp_path / name
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another database"):
        ReplyCache(path, 1 << 20)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["picture.png", "notes.txt", "data.jsonl"])
def test_a_file_that_is_not_named_like_a_database_is_refused_and_not_touched(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no judge cache"):
        ReplyCache(path, 1 << 20)
    assert path.read_bytes() == before


def test_a_cache_of_an_earlier_version_begins_anew(tmp_path):
    """Its keys did not tell what a server was really asked for, and are never asked for again."""
    path = tmp_path / "c.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(
        "CREATE TABLE replies (key BLOB PRIMARY KEY, value BLOB, task, model, created, used) WITHOUT ROWID"
    )
    connection.execute("CREATE TABLE size (only INTEGER PRIMARY KEY, bytes INTEGER NOT NULL)")
    connection.executemany(
        "INSERT INTO replies VALUES (?, ?, 1, 1, 1, 1)", [(b"%d" % i, b"x" * 2000) for i in range(2000)]
    )
    connection.commit()
    connection.close()
    cache = ReplyCache(path, 1 << 20)
    put(cache, "a")
    assert cache.get(b"a") is not None
    assert cache.report().num_entries == 1
    assert on_disk(path) <= 1 << 20
    cache.close()
