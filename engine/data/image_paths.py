"""Where the image file that a record names really lies: below the image folder, or nowhere."""

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
    """An image that may not or cannot be used.

    Attributes:
        reason: one of a few short phrases, for counting: ``missing file``, ``broken image``, ``URL``, ...
    """

    def __init__(self, message: str, reason: str = "broken image") -> None:
        super().__init__(message)
        self.reason = reason


def check_image_file(path: str | os.PathLike[str], root: Path, *, max_file_bytes: int) -> Path:
    """Return where the image really lies, without opening it.

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
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block, a folder would fail obscurely
        raise ImageError(f"{shown}: not an ordinary file", "not a file")
    check_num_bytes(status.st_size, shown, max_file_bytes)
    return resolved


def check_num_bytes(num_bytes: int, name: str, max_file_bytes: int) -> None:
    """Raise ``ImageError`` for a file of no bytes or too many."""
    if num_bytes == 0:
        raise ImageError(f"{name}: empty file", "broken image")
    if num_bytes > max_file_bytes:
        raise ImageError(f"{name}: {num_bytes:,} bytes exceed data.max_file_bytes ({max_file_bytes:,})", "too large")


def resolve_image_path(path: str | os.PathLike[str], root: Path) -> Path:
    """Return the real location of ``path`` below ``root``, links followed; the file need not exist.

    Taken are paths relative to ``root``, with slashes of either kind, and absolute paths and ``file://`` URLs below it.

    Raises:
        ImageError: another URL, a path elsewhere, a ``..``, or a link that leaves ``root``.
    """
    given = os.fspath(path)
    name, shown = _without_scheme(given), printable(given)
    # Windows forms count everywhere: a data set written there must not mean something else here.
    windows = PureWindowsPath(name)
    is_absolute = name.startswith("/")
    if windows.anchor and not is_absolute:
        raise ImageError(f"{shown}: absolute path of another system; give it relative to {root}", "absolute path")
    if ".." in windows.parts:  # splits at both kinds of slash
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
    """The path of a ``file://`` URL of this machine; another name as it is."""
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
