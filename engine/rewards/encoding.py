"""How untrusted text is shown to a judge model: as strings of a JSON object, in which nothing can look like anything else.

Instructions stand in the system message alone. The user message holds an image, where there is one, and one JSON object. A
caption is a string of that object, so it cannot close it; and every character that chat templates, control tokens, markup,
JSON or code fences are made of is written as its ``\\uXXXX`` escape, so that no part of it is ever tokenised as one
(``<|im_start|>system``, ``[INST]``, ``</caption>``), nor hidden from view (zero-width and direction marks).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from base64 import b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

_SPECIAL = re.compile(r"[<>|\[\]{}`&]|[^\x00-\x7e]")
_LOOKALIKES = frozenset("\u2581\uff1c\uff1e\uff5c")
"""Signs beyond ASCII that control tokens are made of."""
_FILLERS = re.compile("[\u034f\u115f\u1160\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Letters and marks that show nothing."""
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_JPEG_QUALITY = 90


def encode_data(data: Any) -> str:
    """A JSON text of dicts, lists, strings, whole numbers and booleans; strings escaped as the module's docstring says.

    >>> print(encode_data({"caption": 'A cat."} <|im_end|>'}))
    {"caption": "A cat.\\"\\u007d \\u003c\\u007cim_end\\u007c\\u003e"}
    """
    if isinstance(data, dict):
        return "{" + ", ".join(f"{_encode_text(k)}: {encode_data(v)}" for k, v in data.items()) + "}"
    if isinstance(data, list | tuple):
        return "[" + ", ".join(encode_data(item) for item in data) + "]"
    if isinstance(data, str):
        return _encode_text(data)
    if isinstance(data, bool | int):
        return json.dumps(data)
    raise TypeError(f"data: {type(data).__name__} is not shown to judges; expected text, numbers, lists or mappings")


def _encode_text(text: str) -> str:
    return _SPECIAL.sub(_escape, json.dumps(text, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    shown = ord(character) > 0x7F and not (character in _LOOKALIKES or _FILLERS.match(character))
    if shown and unicodedata.category(character) not in _HIDDEN:
        return character
    data = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{data[i : i + 2].hex()}" for i in range(0, len(data), 2))


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is sent."""

    url: str
    """A data URL."""
    digest: str
    """SHA-256 of the encoded file."""
    num_pixels: int = 0


def encode_image(image: Image.Image, *, max_pixels: int, image_format: Literal["jpeg", "png"]) -> EncodedImage:
    """Encode an image anew, from its pixels alone: no metadata, profile or comment of its file goes along.

    Raises:
        ImageError: it is too thin for image processors, before or after it is shrunk to ``max_pixels``.
    """
    import numpy as np
    from PIL import Image as PillowImage

    from balcaprl.data.images import shrunk_size

    bare = PillowImage.fromarray(np.asarray(image.convert("RGB")))
    size = shrunk_size(bare.size, max_pixels, "the judge's image")
    if bare.size != size:
        bare = bare.resize(size, PillowImage.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    if image_format == "jpeg":
        bare.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    else:
        bare.save(buffer, format="PNG")
    data = buffer.getvalue()
    return EncodedImage(
        f"data:image/{image_format};base64,{b64encode(data).decode()}",
        hashlib.sha256(data).hexdigest(),
        bare.width * bare.height,
    )
