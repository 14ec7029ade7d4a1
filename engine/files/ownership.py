"""Ownership of paths: a command writes only what does not exist, what is empty, or what carries its own mark.

A folder that a command writes carries a small mark file, ``.balcaprl-run`` for a run. The name of the mark says what
kind of command owns the folder, and the mark is made before anything else is written. While a process writes, it holds
a lock on the mark, and the mark says which process that is. The system drops the lock when the process ends, however it
ends. A single file that is written over time is locked by a file beside it, ``.NAME.balcaprl-lock``; the beginning of
the file itself shows what kind of file it is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_PREFIX = ".balcaprl-"
_NOBODYS = frozenset({"lost+found", ".DS_Store", ".gitkeep", ".gitignore"})
"""Names of entries that do not count when a folder is checked for being empty; no command writes them."""
_MAX_OWNER_BYTES = 4096
_PARTIAL = re.compile(r"\.(.+)\.\d+\.tmp", re.DOTALL)
_held: weakref.WeakSet[Claim] = weakref.WeakSet()


class ForeignPathError(ValueError):
    """A path that a command was told to write holds something that is not the command's own."""


class PathInUseError(ValueError):
    """Another process, or another part of this one, writes to the path."""


class Claim:
    """The exclusive right of this process to write a path, until ``release`` or until the process ends."""

    def __init__(self, path: Path, lock: Path, descriptor: int, forget: Callable[[], None]) -> None:
        """Take over a lock that is already held; call ``claim_folder`` or ``claim_file`` instead."""
        self.path = path
        self._lock = lock
        self._descriptor: int | None = descriptor
        self._forget = forget
        self._close = weakref.finalize(self, os.close, descriptor)
        _held.add(self)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether this process holds the claim: it was not released, and is not a forked child's copy."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let others write there. Releasing twice is harmless.

        The lock of a file is removed; the mark of a folder is removed only if it was new and the folder stayed empty.
        """
        if self._descriptor is None:
            return
        self._descriptor = None
        try:
            # Tidy up while the lock is still held: the next process to lock it checks that the lock file still exists.
            self._forget()
        except OSError as error:  # for example, the folder is gone, and nothing is left to tidy
            logger.debug("%s: %s", self.path, error)
        self._close()

    def drop_in_child(self) -> None:
        """Give up the claim in a forked child, because it belongs to the parent.

        Closing the descriptor here does not unlock the file, and it keeps an orphaned child from holding a dead run's
        lock.
        """
        self._descriptor = None
        self._close()


def _drop_claims_in_child() -> None:
    for claim in list(_held):
        claim.drop_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_claims_in_child)


def claim_folder(path: Path, kind: str, *, option: str, adopt: bool = False) -> Claim:
    """Claim a folder for this process to write, and mark it as one of ``kind``.

    Args:
        path: the folder; it is made if missing.
        kind: one word for what is written there, such as ``run``.
        option: name of the option in which the user gave the folder, for messages.
        adopt: whether to accept a folder without a mark too, because the caller has found files in it that only this
            kind writes.

    Raises:
        NotADirectoryError: the path, or one of its parents, is not a folder.
        ForeignPathError: the folder holds something, and has no mark of this kind.
        PathInUseError: another process writes there, or this one already does; the message says which.
    """
    refuse_no_folder(path, option=option)
    created = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    mark = path / (_PREFIX + kind)
    if not adopt:
        _refuse_foreign_folder(path, kind, option)
    marked = mark.exists()
    descriptor = _lock(mark, path, option)

    def forget() -> None:
        if not marked and [entry.name for entry in path.iterdir()] == [mark.name]:
            mark.unlink(missing_ok=True)
            if created:
                path.rmdir()

    return Claim(path, mark, descriptor, forget)


def refuse_no_folder(path: Path, *, option: str) -> None:
    """Raise NotADirectoryError if ``path``, or its nearest parent that exists, is not a folder."""
    existing = next((part for part in (path, *path.parents) if part.exists()), None)
    if existing is not None and not existing.is_dir():
        raise NotADirectoryError(f"{option}: {existing} is no folder; name another one")


def refuse_filled_folder(path: Path, *, option: str) -> None:
    """Refuse a folder that exists and is not empty, where a whole new folder is to be put in place.

    Raises:
        NotADirectoryError: no folder can be at the path.
        ForeignPathError: the folder holds something.
    """
    refuse_no_folder(path, option=option)
    found = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if found:
        raise ForeignPathError(
            f"{option}: {path} is not empty (it holds {_some(found)}): nothing in it is touched. Name a folder that is empty "
            "or does not exist yet"
        )


def claim_file(path: Path, *, option: str) -> Claim:
    """Claim a file for this process to write; the caller checks whether an existing file is balcaprl's.

    Raises:
        PathInUseError: another process writes the file, or this one already does; the message says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}{_PREFIX}lock")
    return Claim(path, lock, _lock(lock, path, option), lambda: lock.unlink(missing_ok=True))


def has_mark(path: Path, kind: str) -> bool:
    """Whether a folder carries the mark of ``kind``."""
    return (path / (_PREFIX + kind)).is_file()


def refuse_foreign_file(path: Path, is_ours: Callable[[bytes], bool], *, what: str, option: str) -> None:
    """Refuse an existing file that is not empty and does not begin as balcaprl's files of this kind do.

    The file is only read.

    Args:
        path: the file; it may be missing.
        is_ours: function that recognises a file of balcaprl by its beginning, at most 1 MiB.
        what: name of such a file, for the message.
        option: name of the option in which the user gave the file, for the message.

    Raises:
        ForeignPathError: the path is not an ordinary file, or is a file of another kind.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise ForeignPathError(f"{option}: {path} is no ordinary file; name another one")
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    if head and not is_ours(head):
        raise ForeignPathError(
            f"{option}: {path} exists and is no {what}: it is left as it is. Name another file, or move this one away"
        )


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace a file by ``data``, completely or not at all, flushed to disk.

    Whatever lies under the temporary name, such as a link, is removed and not followed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def clear_partial_files(folder: Path, is_ours: Callable[[str], object]) -> None:
    """Remove what ``write_atomically`` left half-written when its process was killed.

    The caller must hold the claim on the folder.

    Args:
        folder: folder in which to look.
        is_ours: function that recognises a file by the name under which it was to be written.
    """
    for path in folder.glob(".*.tmp"):
        match = _PARTIAL.fullmatch(path.name)
        if match and is_ours(match[1]):
            path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_foreign_folder(path: Path, kind: str, option: str) -> None:
    if has_mark(path, kind):
        return
    found = sorted(entry.name for entry in path.iterdir() if entry.name not in _NOBODYS)
    if not found:
        return
    others = [name.removeprefix(_PREFIX) for name in found if name.startswith(_PREFIX)]
    whose = f"the folder of another kind of output ({others[0]})" if others else f"no {kind} folder of balcaprl"
    raise ForeignPathError(
        f"{option}: {path} is not empty and is {whose} (it holds {_some(found)}): nothing in it is touched. "
        "Name a folder that is empty or does not exist yet"
    )


def _some(names: list[str]) -> str:
    return ", ".join(repr(name)[1:-1][:80] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _lock(lock: Path, path: Path, option: str) -> int:
    """Open and lock a lock file, and return its descriptor.

    Programs that this process starts do not inherit the descriptor.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        descriptor = os.open(lock, flags, 0o666)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_OWNER_BYTES:
                raise ForeignPathError(f"{option}: {lock} is no mark of ours; remove it, or name another path")
            _take(descriptor, path, option)
            if _is_still(lock, descriptor):  # otherwise its owner removed it after it was opened here
                _write_owner(descriptor)
                return descriptor
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise


def _take(descriptor: int, path: Path, option: str) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PathInUseError(
            f"{option}: {path} is being written by {_owner(descriptor)}. Wait until it ends or stop it, or name another path"
        ) from None
    except OSError as error:
        logger.warning(
            "%s: this file system cannot lock (%s): see to it that no second process writes there", path, error.strerror
        )


def _is_still(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n"
    os.pwrite(descriptor, owner, 0)
    os.ftruncate(descriptor, len(owner))
    os.fsync(descriptor)


def _owner(descriptor: int) -> str:
    try:
        owner: Any = json.loads(os.pread(descriptor, _MAX_OWNER_BYTES, 0))
        pid, host = int(owner["pid"]), ascii(str(owner["host"]))[1:-1][:100]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    here = pid == os.getpid() and host == socket.gethostname()
    return f"this very process ({pid}), which has not closed it" if here else f"process {pid} on {host}"
