"""Checks whether ``model.path`` looks like a model at all, before anything heavy is loaded."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelFilesError(ValueError):
    """A folder or hub id cannot be loaded as a model; the message says which and why."""


def refuse_no_model(path_or_id: str | Path, *, option: str = "model.path") -> None:
    """Raise ModelFilesError if ``path_or_id`` is neither a folder nor a possible hub id.

    ``option`` is the name of the option that the user set, for the message.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.exists():
        if not _HUB_ID.fullmatch(str(path_or_id)):
            raise ModelFilesError(
                f"{option}: {path_or_id} does not exist, and is no hub id such as Qwen/Qwen3-VL-4B-Instruct"
            )
    elif not folder.is_dir():
        raise ModelFilesError(f"{option}: {path_or_id} is a file; give the folder that it lies in")
