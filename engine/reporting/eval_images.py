"""The pictures of held-out samples that a run keeps for its report."""

from __future__ import annotations

import hashlib
import io
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from balcaprl.files.ownership import write_atomically

if TYPE_CHECKING:
    from PIL import Image

EVAL_IMAGES = "eval_images"
_MARK = ("Software", "balcaprl")
"""PNG text that marks the pictures that balcaprl writes; it lies within the first 128 bytes of the file."""


def eval_image_path(output_dir: Path, sample_id: str) -> Path:
    """Path of the picture of a held-out sample: ``eval_images/<sample_id>.png``.

    Sample ids come from data files. Characters that could lead out of the folder are percent-encoded, and a name that
    is too long for a file system is cut and ends in a hash.
    """
    name = urllib.parse.quote(sample_id, safe=" ", errors="replace")
    if len(name) > 200:
        name = f"{name[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return Path(output_dir) / EVAL_IMAGES / f"{name}.png"


def save_eval_image(output_dir: Path, sample_id: str, image: Image.Image) -> Path:
    """Save a held-out image for the report, completely or not at all, and return its path."""
    path = eval_image_path(output_dir, sample_id)
    from PIL.PngImagePlugin import PngInfo

    path.parent.mkdir(parents=True, exist_ok=True)
    mark, buffer = PngInfo(), io.BytesIO()
    mark.add_text(*_MARK)
    image.convert("RGB").save(buffer, format="PNG", pnginfo=mark)
    write_atomically(path, buffer.getvalue())
    return path


def is_our_picture(path: Path) -> bool:
    """Whether a file is a picture that balcaprl wrote."""
    with open(path, "rb") as file:
        return b"tEXt" + "\0".join(_MARK).encode() in file.read(128)
