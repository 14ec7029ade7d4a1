"""Replies of judge models on disk: one SQLite file, shared by runs and processes, bounded.

Write-ahead logging makes every ``put`` one transaction: after kill -9 the file holds all that was committed and nothing half.
Keys are hashes of everything that a reply depends on (``protocol.cache_key``); values are validated replies. Neither captions,
images nor keys of servers are stored. A cache that fails, because a disk is full or a file damaged, costs money, not the run:
failures are counted, logged once, and the cache is left alone.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_BUSY_S = 30.0
_TOUCH_BATCH = 256
_EVICT_TO = 0.9
_ENTRY_OVERHEAD = 100
"""Bytes of a row beside its value."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, task TEXT NOT NULL, model TEXT NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS replies_used ON replies (used);
CREATE TABLE IF NOT EXISTS size (only INTEGER PRIMARY KEY CHECK (only = 0), bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO size VALUES (0, 0);
CREATE TRIGGER IF NOT EXISTS grow AFTER INSERT ON replies
    BEGIN UPDATE size SET bytes = bytes + length(NEW.value) + 100; END;
CREATE TRIGGER IF NOT EXISTS shrink AFTER DELETE ON replies
    BEGIN UPDATE size SET bytes = bytes - length(OLD.value) - 100; END;
"""


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds."""

    path: Path
    num_entries: int
    num_bytes: int
    """Values and their bookkeeping; the file may be larger."""
    by_task: dict[str, int]
    """Entries by task and model."""
    oldest: float
    """When the entry was used that was unused for longest; seconds since the epoch, 0 in an empty cache."""


class ReplyCache:
    """A bounded store of replies by key; safe under several threads and processes.

    Args:
        path: the file; made if missing, its folder too, readable by the user alone.
        max_bytes: when the values outgrow it, the least recently used ones go until a tenth is free.

    Raises:
        ValueError: the file is there and is no such cache.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = Path(path).expanduser()
        self._max_bytes = max_bytes
        self.num_failures = 0
        self._broken = False
        self._touched: dict[bytes, float] = {}
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(self.path)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        self._connection = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=16
        )
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"endpoint.cache: {self.path} is no judge cache ({error}); move it away") from error

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        with self._lock:
            if self._broken:
                return None
            try:
                row = self._connection.execute("SELECT value FROM replies WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    self._touched[key] = time.time()
                    if len(self._touched) >= _TOUCH_BATCH:
                        self._flush_touched()
            except sqlite3.Error as error:
                self._note_failure(error)
                return None
        return None if row is None else bytes(row[0])

    def put(self, key: bytes, value: bytes, *, task: str, model: str) -> None:
        """Store a value; on return it is committed."""
        now = time.time()
        with self._lock:
            if self._broken:
                return
            try:
                self._connection.execute(
                    "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?)", (key, value, task, model, now, now)
                )
                if self._num_bytes() > self._max_bytes:
                    self._evict(int(_EVICT_TO * self._max_bytes))
            except sqlite3.Error as error:
                self._note_failure(error)

    def prune(self, *, max_bytes: int | None = None, unused_days: float | None = None) -> int:
        """Drop entries unused for so many days, then the least recently used until the bound holds; returns how many."""
        with self._lock:
            self._flush_touched()
            before = self._count()
            if unused_days is not None:
                self._connection.execute("DELETE FROM replies WHERE used < ?", (time.time() - 86_400 * unused_days,))
            if max_bytes is not None:
                self._evict(max_bytes)
            dropped = before - self._count()
            self._connection.execute("VACUUM")
            return dropped

    def report(self) -> CacheReport:
        """What the cache holds."""
        with self._lock:
            self._flush_touched()
            groups = self._connection.execute("SELECT task, model, COUNT(*) FROM replies GROUP BY 1, 2 ORDER BY 1, 2")
            by_task = {f"{task}, {model}": count for task, model, count in groups}
            oldest = self._connection.execute("SELECT MIN(used) FROM replies").fetchone()[0] or 0.0
            return CacheReport(self.path, sum(by_task.values()), self._num_bytes(), by_task, oldest)

    def close(self) -> None:
        """Write what is left and close; closing twice is harmless."""
        with self._lock:
            try:
                if not self._broken:
                    self._flush_touched()
            except sqlite3.Error as error:
                self._note_failure(error)
            self._broken = True
            self._connection.close()

    def _count(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def _num_bytes(self) -> int:
        return int(self._connection.execute("SELECT bytes FROM size").fetchone()[0])

    def _flush_touched(self) -> None:
        """When entries were used, written now and then: a write at each look-up would cost more than the look-up."""
        touched, self._touched = self._touched, {}
        if not touched:
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            rows = [(used, key) for key, used in touched.items()]
            self._connection.executemany("UPDATE replies SET used = ? WHERE key = ?", rows)
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            self._connection.execute("ROLLBACK")
            raise

    def _evict(self, max_bytes: int) -> None:
        self._flush_touched()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            excess = self._num_bytes() - max_bytes
            rows = self._connection.execute("SELECT key, length(value) FROM replies ORDER BY used, created")
            doomed = []
            for key, size in rows:
                if excess <= 0:
                    break
                doomed.append((key,))
                excess -= size + _ENTRY_OVERHEAD
            self._connection.executemany("DELETE FROM replies WHERE key = ?", doomed)
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            self._connection.execute("ROLLBACK")
            raise

    def _note_failure(self, error: sqlite3.Error) -> None:
        self.num_failures += 1
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return  # busy for longer than we wait; the next try may do
        self._broken = True
        logger.warning("the judge cache %s failed and is left alone from here on: %s", self.path, error)


def _refuse_foreign(path: Path) -> None:
    """Raise where the file is another program's database: looked at only, and left as it is."""
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    if not path.is_file():
        raise ValueError(f"endpoint.cache: {path} is no ordinary file; name another one")
    try:
        connection = sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=ro", uri=True, timeout=_BUSY_S)
        try:
            columns = {row[1] for row in connection.execute("PRAGMA table_info(replies)")}
            others = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"endpoint.cache: {path} is no judge cache ({error}); move it away") from error
    # A database without tables is one that a kill left before the first.
    if others and not {"key", "value", "task", "model", "used"} <= columns:
        raise ValueError(f"endpoint.cache: {path} is no judge cache, but another database; name another file")
