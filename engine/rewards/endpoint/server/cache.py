"""Replies of judge models on disk: one SQLite file of bounded size, shared by runs and processes.

Every ``put`` is one transaction in a write-ahead log: after kill -9 the file holds everything that was committed and
no half-written entry. Keys are hashes of everything that a reply depends on (``protocol.cache_key``). Values are
validated replies, each with a checksum, so that a damaged one counts as missing. Neither images nor keys of servers are
stored, and of captions only what a reply quotes. The file, its log and the index of the log together stay within the
bound: pages are counted before they are written, the least recently used entries make room, and the log is written back
before it exceeds an eighth of the bound.

A cache that fails costs money, but does not end the run. A damaged file is renamed and stays beside the new one. A file
that can no longer be written is left alone. Both are logged. A file that is not a judge cache, or cannot be used, is
refused at the start and not touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

_BUSY_S = 30.0
"""Longest wait for a database that another process writes to, in seconds."""
_PAGE = 4096
_LEAST_BYTES = 1 << 20
"""Smallest bound for the files; a smaller ``max_bytes`` limits only the values, because SQLite itself needs room."""
_INDEX_BYTES = 1 << 16
"""Room for the file that indexes the log."""
_MOST_LOG_BYTES = 8 << 20
"""Largest write-ahead log."""
_CHECKPOINT_MS = 100
"""Longest wait for other processes while the log is written back, in milliseconds."""
_TOUCH_BATCH = 256
"""Most entries in one write of times of use, or in one deletion of unused entries."""
_EVICT_BATCH = 8
"""Most entries dropped at once for want of room."""
_VACUUM_PAGES = 64
"""Most pages given back to the file system at once."""
_SPARE_PAGES = 12
"""Pages kept free for an insertion; more than it needs beside its value."""
_MOST_REPAIRS = 3
"""Number of times that a damaged file is replaced before the cache is given up."""
_ENTRY_OVERHEAD = 100
"""Bytes that are counted for a row beside its value."""
_MAGIC = b"SQLite format 3\0"
_APPLICATION = 0x62636A63
_SUFFIXES = ("", ".db", ".sqlite", ".sqlite3")
_NOT_THE_FILES = ("unable to open", "locked", "full", "disk I/O", "permission")
"""Parts of error messages at opening that blame the machine; any other error is blamed on the file's content."""
_CORRUPT = (11, 26)
"""SQLITE_CORRUPT and SQLITE_NOTADB, which Python names from 3.11 on."""
_SHORT_READ = 522
_SCHEMA = (
    "CREATE TABLE replies (key BLOB NOT NULL UNIQUE, value BLOB NOT NULL, checksum BLOB NOT NULL, task TEXT NOT NULL, "
    "model TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL)",
    "CREATE INDEX replies_used ON replies (used)",
    "CREATE TABLE size (only INTEGER PRIMARY KEY CHECK (only = 0), bytes INTEGER NOT NULL)",
    "INSERT INTO size VALUES (0, 0)",
    "CREATE TRIGGER grow AFTER INSERT ON replies "
    f"BEGIN UPDATE size SET bytes = bytes + length(NEW.value) + {_ENTRY_OVERHEAD}; END",
    "CREATE TRIGGER shrink AFTER DELETE ON replies "
    f"BEGIN UPDATE size SET bytes = bytes - length(OLD.value) - {_ENTRY_OVERHEAD}; END",
    f"PRAGMA application_id = {_APPLICATION}",
)


class _LogFullError(OSError):
    """The log has reached its size limit, and look-ups by others keep it from being written back."""


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds."""

    path: Path
    num_entries: int
    num_bytes: int
    """Bytes of the values and their bookkeeping."""
    by_task: dict[str, int]
    """Number of entries by task and model."""
    oldest: float
    """When the least recently used entry was used, in seconds since the epoch; 0 in an empty cache."""
    file_bytes: int
    """Bytes on disk, including the log."""


class ReplyCache:
    """A bounded store of replies by key; safe under several threads and processes.

    Args:
        path: the file; it and its folder are made if missing, and the file is readable only by the user.
        max_bytes: most bytes that its files may take; the least recently used entries make room. A value larger than a
            sixteenth of the bound is not kept.

    Raises:
        ValueError: the path holds something that is no judge cache, or the file cannot be used.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = Path(path).expanduser()
        self._max_bytes = max_bytes
        on_disk = max(max_bytes, _LEAST_BYTES)
        self._log_bytes = min(_MOST_LOG_BYTES, on_disk // 4)
        self._max_pages = min((1 << 32) - 2, (on_disk - self._log_bytes - _INDEX_BYTES) // _PAGE)
        self._max_value = on_disk // 16
        self.num_failures = 0
        self.num_damaged = 0
        """Number of entries whose checksum was wrong."""
        self._num_repairs = 0
        self._broken = False
        self._touched: dict[bytes, float] = {}
        self._touch_batch = min(_TOUCH_BATCH, self._log_bytes // _PAGE // 8)
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            writable = os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
            if any(sign in str(error) for sign in _NOT_THE_FILES) or ("readonly" in str(error) and not writable):
                raise ValueError(f"endpoint.cache: {self.path} cannot be used ({error}); name another file") from error
            self._set_aside(error)
            self._connection = self._open()

    # ------------------------------------------------------------------------------------------------ entries

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None if the cache has none or fails."""
        return self._guarded(lambda: self._get(key), None)

    def put(self, key: bytes, value: bytes, *, task: str, model: str) -> None:
        """Store or replace a value; it is committed on return, unless it is too large or the cache fails."""
        if len(value) <= self._max_value:
            self._guarded(lambda: self._put(key, value, task, model), None)

    def _get(self, key: bytes) -> bytes | None:
        row = self._connection.execute("SELECT value, checksum FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        value, checksum = row
        if not isinstance(value, bytes) or checksum != _checksum(key, value):
            self.num_damaged += 1
            logger.warning("the judge cache %s holds a damaged entry, which counts as missing", self.path)
            self._connection.execute("DELETE FROM replies WHERE key = ?", (key,))
            return None
        self._touched[key] = time.time()
        if len(self._touched) >= self._touch_batch:
            self._flush_touched()
        return value

    def _put(self, key: bytes, value: bytes, task: str, model: str) -> None:
        now = time.time()
        row = (key, value, _checksum(key, value), task, model, now, now)
        self._make_room(len(value))
        with self._transaction():
            self._connection.execute("DELETE FROM replies WHERE key = ?", (key,))
            self._connection.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def _make_room(self, num_bytes: int) -> None:
        """Evict entries until a value of ``num_bytes`` fits, both by pages and by bytes."""
        needed = num_bytes // _PAGE + _SPARE_PAGES
        while True:
            pages = self._pragma("page_count") - self._pragma("freelist_count") + needed - self._max_pages
            excess = max(pages * _PAGE, self._num_bytes() + num_bytes + _ENTRY_OVERHEAD - self._max_bytes)
            if excess <= 0 or not self._evict(excess):
                return

    def _evict(self, num_bytes: int) -> int:
        """Drop some of the least recently used entries in one small transaction; returns how many."""
        self._flush_touched()
        with self._transaction():
            rows = self._connection.execute(
                "SELECT rowid, length(value) FROM replies ORDER BY used, rowid LIMIT ?", (_EVICT_BATCH,)
            ).fetchall()
            doomed = []
            for rowid, size in rows:
                if num_bytes <= 0:
                    break
                doomed.append((rowid,))
                num_bytes -= size + _ENTRY_OVERHEAD
            self._connection.executemany("DELETE FROM replies WHERE rowid = ?", doomed)
        return len(doomed)

    def _flush_touched(self) -> None:
        """Write the times of use in one batch, because a write at each look-up would cost more than the look-up."""
        touched, self._touched = self._touched, {}
        if touched:
            with contextlib.suppress(_LogFullError), self._transaction():
                rows = [(used, key) for key, used in touched.items()]
                self._connection.executemany("UPDATE replies SET used = ? WHERE key = ?", rows)

    # ------------------------------------------------------------------------------------------------ upkeep

    def prune(self, *, max_bytes: int | None = None, unused_days: float | None = None) -> int:
        """Drop entries unused for ``unused_days``, then the least recently used ones until ``max_bytes`` suffice.

        Returns:
            the number of entries that were dropped.
        """
        with self._lock:
            self._flush_touched()
            before = self._count()
            if unused_days is not None:
                oldest = (time.time() - 86_400 * unused_days, _TOUCH_BATCH)
                some = "DELETE FROM replies WHERE rowid IN (SELECT rowid FROM replies WHERE used < ? LIMIT ?)"
                while self._connection.execute(some, oldest).rowcount > 0:
                    pass
            while (
                max_bytes is not None and self._num_bytes() > max_bytes and self._evict(self._num_bytes() - max_bytes)
            ):
                pass
            dropped = before - self._count()
            self._shrink(0)
            return dropped

    def report(self) -> CacheReport:
        """Summarise what the cache holds."""
        with self._lock:
            self._flush_touched()
            groups = self._connection.execute("SELECT task, model, COUNT(*) FROM replies GROUP BY 1, 2 ORDER BY 1, 2")
            by_task = {f"{task}, {model}": count for task, model, count in groups}
            oldest = self._connection.execute("SELECT MIN(used) FROM replies").fetchone()[0] or 0.0
            on_disk = sum(path.stat().st_size for path in self._files(self.path) if path.exists())
            return CacheReport(self.path, sum(by_task.values()), self._num_bytes(), by_task, oldest, on_disk)

    def close(self) -> None:
        """Write the last times of use and close; closing twice is harmless."""
        with self._lock:
            if not self._broken:
                with contextlib.suppress(sqlite3.Error):
                    self._flush_touched()
            self._broken = True
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()

    def _shrink(self, max_pages: int) -> None:
        """Give pages back to the file system, a few at a time, until ``max_pages`` are left or none is free."""
        while self._pragma("page_count") > max_pages and self._pragma("freelist_count"):
            self._connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _count(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def _num_bytes(self) -> int:
        return int(self._connection.execute("SELECT bytes FROM size").fetchone()[0])

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    def _hold_log(self) -> None:
        """Write the log back if it has grown. SQLite itself does so only at a moment when nobody reads, and with many
        processes there may be no such moment."""
        if self._log_size() > self._log_bytes // 4:
            self._connection.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_MS}")
            try:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self._connection.execute(f"PRAGMA busy_timeout = {int(1000 * _BUSY_S)}")

    def _log_size(self) -> int:
        try:
            return self._files(self.path)[1].stat().st_size
        except OSError:
            return 0

    @contextlib.contextmanager
    def _transaction(self, bounded: bool = True) -> Iterator[None]:
        self._hold_log()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            if bounded and self._log_size() > self._log_bytes // 2:  # no other process can write now
                raise _LogFullError(f"{self.path} is in use by other processes; try again")
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    # ------------------------------------------------------------------------------------------------ opening

    def _open(self) -> sqlite3.Connection:
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"endpoint.cache: {self.path} is no ordinary file; name another one")
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        self._refuse_what_is_not_ours()
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=16
        )
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        self._opened = _identity(self.path)
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._is_earlier_version()  # raises for another database, before anything is written to it
        for setting in (
            f"page_size = {_PAGE}",
            "auto_vacuum = INCREMENTAL",
            "journal_mode = WAL",
            "synchronous = NORMAL",
        ):
            connection.execute(f"PRAGMA {setting}")
        with self._transaction(bounded=False):
            is_earlier = self._is_earlier_version()
            if is_earlier is not None:
                for statement in (*(("DROP TABLE replies", "DROP TABLE size") if is_earlier else ()), *_SCHEMA):
                    connection.execute(statement)
        if is_earlier:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {max(8, self._log_bytes // _PAGE // 2)}")
        connection.execute(f"PRAGMA journal_size_limit = {self._log_bytes // 2}")
        connection.execute(f"PRAGMA max_page_count = {self._max_pages}")
        if self._pragma("page_count") > self._max_pages:  # the file was written under a larger bound
            with contextlib.suppress(_LogFullError):
                self._make_room(0)
                self._shrink(self._max_pages)

    def _is_earlier_version(self) -> bool | None:
        """Return True for a cache of an earlier version, False for an empty file, None if nothing has to be changed.

        The keys of an earlier version are never asked for. Another database raises ``ValueError``.
        """
        if self._pragma("application_id") == _APPLICATION:
            return None
        tables = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables not in (set(), {"replies", "size"}):
            raise ValueError(f"endpoint.cache: {self.path} is no judge cache, but another database; name another file")
        return bool(tables)

    def _refuse_what_is_not_ours(self) -> None:
        """Raise unless the file is a SQLite file or empty.

        Text, and any file that is not named like a database, belongs to somebody else (``ValueError``). Other bytes
        under a database's name are taken for a damaged cache (``DatabaseError``).
        """
        with open(self.path, "rb") as file:
            head = file.read(_PAGE)
        if head.startswith(_MAGIC) or _MAGIC.startswith(head):
            return
        is_text = b"\0" not in head and not any(
            character == "\ufffd" for character in head[:-3].decode("utf-8", "replace")
        )
        if not is_text and self.path.suffix in _SUFFIXES:
            raise sqlite3.DatabaseError("file is not a database")
        raise ValueError(f"endpoint.cache: {self.path} is no judge cache; move it away, or name another file")

    # ------------------------------------------------------------------------------------------------ failures

    def _guarded(self, work: Callable[[], T], otherwise: T) -> T:
        """Return the result of ``work``, or ``otherwise`` if the cache fails, so that no exception interrupts a run."""
        with self._lock:
            if self._broken:
                return otherwise
            try:
                return work()
            except _LogFullError:
                pass  # the next call may succeed
            except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
                self.num_failures += 1
                try:
                    self._recover(error)
                except (sqlite3.Error, ValueError, TypeError, OSError) as further:
                    self._give_up(further)
        return otherwise

    def _recover(self, error: Exception) -> None:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return  # locked for longer than we wait; the next call may succeed
        if "full" in str(error) and self._pragma("page_count") >= self._max_pages - _SPARE_PAGES:
            return  # full by our own bound, which another process has reached meanwhile
        if not _is_damage(error) or self._num_repairs >= _MOST_REPAIRS:
            self._give_up(error)
            return
        self._num_repairs += 1
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._set_aside(error)
        self._connection = self._open()

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        logger.warning("the judge cache %s failed and is left alone from here on: %s", self.path, error)

    def _set_aside(self, error: Exception) -> None:
        """Rename a damaged file and its log, unless another process already did; replaces a file renamed earlier."""
        damaged = self.path.with_name(self.path.name + ".damaged")
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            opened = getattr(self, "_opened", None)
            if opened is None or opened == _identity(self.path):
                for file, target in zip(self._files(self.path), self._files(damaged), strict=True):
                    target.unlink(missing_ok=True)
                    if file.exists():
                        os.replace(file, target)
                logger.warning(
                    "the judge cache %s was damaged (%s): it is %s now, and begins anew", self.path, error, damaged
                )
        finally:
            os.close(folder)

    @staticmethod
    def _files(path: Path) -> list[Path]:
        return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(key + b"\0" + value, digest_size=16).digest()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_damage(error: Exception) -> bool:
    """Whether the file's content is to blame: SQLite says so, or a stored value is of the wrong type."""
    if not isinstance(error, sqlite3.Error):
        return True
    code = getattr(error, "sqlite_errorcode", 0)  # exists from Python 3.11 on
    return code & 0xFF in _CORRUPT or code == _SHORT_READ or "malformed" in str(error) or "not a database" in str(error)
