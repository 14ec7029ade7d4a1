"""Reads what a data set gives for an image: a path, or an embedded image file in one of several forms."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, urlsafe_b64decode
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from balcaprl.data.images.paths import ImageError

DICT_KEYS = ("bytes", "path", "image", "image_url", "url", "base64", "file_name")
"""Keys of an object that stands for an image; the first key that holds something counts."""
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
"""The first bytes of files in the formats that are opened."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}={0,2}\s*")
_MAX_DEPTH = 4


def image_source(value: Any, depth: int = _MAX_DEPTH) -> str | bytes:
    """Return the path of an image file, or its bytes.

    ``value`` may be the path, the bytes, a data URL or Base64 text; or a list of one of these, or an object with one.

    Raises:
        ImageError: ``value`` gives no image, a broken one, or several.
    """
    if isinstance(value, bytes | bytearray | memoryview) and len(value):
        return bytes(value)
    if isinstance(value, str) and value.strip():
        return _from_text(value)
    if value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and not len(value)) or depth == 0:
        raise ImageError("there is no image", "no image")
    if isinstance(value, list | tuple) and all(isinstance(item, str | bytes | Mapping | list) for item in value):
        if len(value) > 1 and not any(isinstance(item, list) for item in value):
            raise ImageError(f"there are {len(value)} images, expected one", "several images")
        if len(value) == 1:
            return image_source(value[0], depth - 1)
    if isinstance(value, Mapping):
        found = next((value[key] for key in DICT_KEYS if value.get(key)), None)
        return image_source(found, depth - 1)
    raise ImageError(f"{type(value).__name__} is not an image; expected a path or an image file", "not an image")


def _from_text(text: str) -> str | bytes:
    """Return the bytes of a data URL or a Base64 text; any other text is a path and is returned unchanged."""
    if text[:5].lower() == "data:":
        return _from_data_url(text)
    if _BASE64.fullmatch(text):
        data = _from_base64(text[:64])
        if data is not None and data.startswith(_MAGIC):
            whole = _from_base64(text)
            if whole is None:
                raise ImageError("broken Base64", "broken image")
            return whole
    return text


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("a data URL without data", "broken image")
    data = _from_base64(body) if head.lower().endswith(";base64") else unquote_to_bytes(body)
    if not data:
        raise ImageError("a data URL of no or broken data", "broken image")
    return data


def _from_base64(text: str) -> bytes | None:
    """Decode Base64 of either alphabet, with or without padding and line ends; return None if it is broken."""
    dense = "".join(text.split()).rstrip("=")
    dense += "=" * (-len(dense) % 4)
    try:
        return urlsafe_b64decode(dense) if "-" in dense or "_" in dense else b64decode(dense, validate=True)
    except (binascii.Error, ValueError):
        return None
