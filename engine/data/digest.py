"""A digest of a data set's files, which shows whether a resumed run still has the data that it began with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from balcaprl.config import DataConfig

_CHUNK_BYTES = 1 << 20
_WHOLE_BYTES = 64 << 20
_NUM_SAMPLES = 64


def data_digest(config: DataConfig) -> str | None:
    """Return a digest of the content of ``data.path``; None for drawn scenes.

    A single file is read whole. In a folder, files whose names begin with ``cache-`` or a dot are left out; of all
    others, path and size count. Files of up to 64 MiB are read whole. Of larger files, 64 pieces of 1 MiB are read,
    because a data set that holds its images in its tables has too many bytes to read at each start. Image files outside
    ``data.path`` do not count.

    Raises:
        OSError: a file cannot be read.
    """
    path = config.path
    if config.kind == "scenes" or path is None:
        return None
    digest = hashlib.sha256()
    if path.is_file():
        _add(digest, path, whole=True)
        return digest.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(("cache-", "."))):
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        _add(digest, file, whole=file.stat().st_size <= _WHOLE_BYTES)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, path: Path, *, whole: bool) -> None:
    with path.open("rb") as file:
        if whole:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
            return
        step = (path.stat().st_size - _CHUNK_BYTES) // (_NUM_SAMPLES - 1)
        for index in range(_NUM_SAMPLES):
            file.seek(index * step)
            digest.update(file.read(_CHUNK_BYTES))
