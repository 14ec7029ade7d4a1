"""Finds the real place of the image file that a record names, and refuses every place outside the image folder."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, urlsplit

from balcaprl.logtext import printable

_URL = re.compile(r"[a-z][a-z0-9+.\-]*://|data:", re.IGNORECASE)
_LEAVES = "path leaves the image folder"


class ImageError(ValueError):
    """An image must not or cannot be used.

    Attributes:
        reason: one of a few short phrases, for counting: ``missing file``, ``broken image``, ``URL``, ...
    """

    def __init__(self, message: str, reason: str = "broken image") -> None:
        super().__init__(message)
        self.reason = reason


def check_image_file(path: str | os.PathLike[str], root: Path, *, max_file_bytes: int) -> Path:
    """Return the real path of an image file, without opening the file.

    Raises:
        ImageError: the path is refused, or there is no ordinary file of an allowed size.
    """
    resolved = resolve_image_path(path, root)
    shown = printable(path)
    try:
        status = os.stat(resolved)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"{shown}: no such file in {root}", "missing file") from None
    except OSError as error:
        raise ImageError(f"{shown}: cannot be read: {error.strerror}", "unreadable file") from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block, and opening a folder would fail obscurely
        raise ImageError(f"{shown}: not an ordinary file", "not a file")
    check_num_bytes(status.st_size, shown, max_file_bytes)
    return resolved


def check_num_bytes(num_bytes: int, name: str, max_file_bytes: int) -> None:
    """Raise ``ImageError`` for a file with no bytes or too many."""
    if num_bytes == 0:
        raise ImageError(f"{name}: empty file", "broken image")
    if num_bytes > max_file_bytes:
        raise ImageError(f"{name}: {num_bytes:,} bytes exceed data.max_file_bytes ({max_file_bytes:,})", "too large")


def resolve_image_path(path: str | os.PathLike[str], root: Path) -> Path:
    """Return the real location of ``path`` below ``root``, with links followed; the file need not exist.

    Allowed are paths relative to ``root``, with slashes of either kind, and absolute paths and ``file://`` URLs below
    ``root``.

    Raises:
        ImageError: ``path`` is another URL, lies elsewhere, contains ``..``, or follows a link that leaves ``root``.
    """
    given = os.fspath(path)
    name, shown = _without_scheme(given), printable(given)
    # Windows path forms are recognised on every system, so that a data set written on Windows means the same here.
    windows = PureWindowsPath(name)
    is_absolute = name.startswith("/")
    if windows.anchor and not is_absolute:
        raise ImageError(f"{shown}: absolute path of another system; give it relative to {root}", "absolute path")
    if ".." in windows.parts:  # parts are split at both kinds of slash
        raise ImageError(f"{shown}: '..' may not occur in an image path", _LEAVES)
    try:
        real_root = os.path.realpath(root)
        resolved = os.path.realpath(os.path.join(real_root, name))
        if "\\" in name and not os.path.lexists(resolved):
            resolved = os.path.realpath(os.path.join(real_root, name.replace("\\", "/")))
    except (OSError, ValueError) as error:  # a NUL byte, an unencodable character, a name too long
        raise ImageError(f"{shown}: not a usable path: {printable(error)}", "not a usable path") from error
    if not _is_below(resolved, real_root):
        if is_absolute and not _is_below(name, os.fspath(root)) and not _is_below(name, real_root):
            raise ImageError(
                f"{shown}: absolute path outside of {root}; give it relative, or set data.image_root", "absolute path"
            )
        raise ImageError(
            f"{shown}: a link leads to {printable(resolved)}, outside of {root}; set data.image_root to a folder that "
            "holds both, or copy the images into it",
            _LEAVES,
        )
    return Path(resolved)


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath((folder, path)) == folder if os.path.isabs(folder) else False


def _without_scheme(name: str) -> str:
    """Return the path of a local ``file://`` URL, refuse any other URL, and return any other name unchanged."""
    if not _URL.match(name):
        return name
    if name[:7].lower() == "file://":
        try:
            url = urlsplit(name)
        except ValueError:
            url = urlsplit("file://elsewhere/")
        if url.netloc in ("", "localhost") and not url.query and not url.fragment:
            return unquote(url.path)
    raise ImageError(f"{printable(name, 80)}: URLs are not fetched; download the image and give its path", "URL")
