"""Removes texts and profiles from PNG files: they are valid at any size, but Pillow refuses large ones."""

from __future__ import annotations

import io
from typing import BinaryIO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DROPPED = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP"))


def without_text(file: BinaryIO) -> BinaryIO | None:
    """Return a copy of a PNG file without texts and profiles; None if the file is not PNG, or has none of them."""
    file.seek(0)
    data = file.read()
    if not data.startswith(_SIGNATURE):
        return None
    kept, place = [_SIGNATURE], len(_SIGNATURE)
    dropped = False
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")  # length, kind, content, checksum
        if data[place + 4 : place + 8] in _DROPPED:
            dropped = True
        else:
            kept.append(data[place:end])
        place = end
    return io.BytesIO(b"".join(kept)) if dropped else None
