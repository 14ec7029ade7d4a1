"""The manifest of a checkpoint: names, sizes and SHA-256 of its files.

    {"format": 1, "files": {"config.json": {"bytes": 1843, "sha256": "..."}, ...}}

The manifest is written last, and compared with the files before anything is loaded. It shows damage, not forgery:
whoever can change a file can change the manifest too. The names in a manifest are not trusted, and a name that leads
out of the folder is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 20
_MAX_BYTES = 16 << 20
"""Largest manifest that is read, in bytes; a real manifest has a few thousand."""
_READ_BY_LIBRARIES = {".json", ".jinja", ".model", ".txt", ".py", ".safetensors", ".bin", ".pt", ".pth", ".gguf"}
"""Suffixes of files that must be in the manifest, because they may change how a folder is loaded. Other files, such as
notes and pictures, may lie in the folder without being listed."""


def write_manifest(folder: Path) -> None:
    """Write the manifest of ``folder``, which lists every other file in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        digests = list(pool.map(sha256_of, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")


def faults(folder: Path, counts: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Differences between a folder and its manifest, each naming its file; empty if there are none.

    Args:
        folder: a folder with a manifest.
        counts: function that says whether a file with a given name is checked.
    """
    try:
        listed = _read(folder / MANIFEST)
    except (OSError, ValueError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    names = sorted(name for name in listed if counts(name))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: _fault_of(folder / name, listed[name]), names)
    wrong = [f"{name} {fault}" for name, fault in zip(names, found, strict=True) if fault]
    return wrong + [f"{name} is no part of it" for name in _strays(folder, listed) if counts(name)]


def damage(folder: Path, counts: Callable[[str], bool] = lambda name: True) -> str | None:
    """Message and advice for the user if a folder's files are not as they were saved; None if they are.

    Args:
        folder: a folder. Without a manifest there is nothing to compare, and the result is None.
        counts: function that says whether a file with a given name is checked.
    """
    wrong = faults(folder, counts) if (folder / MANIFEST).is_file() else []
    if not wrong:
        return None
    advice = f"Take another one; if you changed it on purpose, remove {MANIFEST}"
    return f"the checkpoint is damaged: {'; '.join(wrong[:5])}. {advice}"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, which is read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    plain = json.loads(path.read_bytes())
    if not isinstance(plain, dict) or not isinstance(plain.get("files"), dict):
        raise ValueError("it lists no files")
    if plain.get("format") != FORMAT:
        raise ValueError(f"its format is {plain.get('format')!r}, and this version of balcaprl reads {FORMAT}")
    for name, entry in plain["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"it names a file outside of the folder: {name!r}")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"its entry of {name!r} has not the keys bytes and sha256")
    return plain["files"]  # type: ignore[no-any-return]


def _fault_of(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        if path.is_symlink() or not path.is_file():
            return "is missing" if not path.exists() else "is no ordinary file"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, and was saved with {entry['bytes']}"
        return None if sha256_of(path) == entry["sha256"] else "is not what was saved: its SHA-256 differs"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _strays(folder: Path, listed: Iterable[str]) -> list[str]:
    """Files that the manifest does not list, and that a library could take for a part of the model."""
    known = {MANIFEST, *listed}
    found = (path.relative_to(folder).as_posix() for path in folder.iterdir() if path.is_symlink() or path.is_file())
    return sorted(name for name in found if name not in known and Path(name).suffix in _READ_BY_LIBRARIES)
