"""From decoded pixels of any mode to RGB of a given size, in bands: no second copy of a large image is made on the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

_BAND_PIXELS = 1 << 20
_REDUCING_GAP = 3.0
"""From twice this times the target on, whole blocks are averaged before the final filter; see ``PIL.Image.resize``."""
_LOW_DEPTH = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies the values of shallow PNG files with, but not their transparent one."""


def shrunk_rgb(image: Image.Image, size: tuple[int, int], rawmode: str = "") -> Image.Image:
    """RGB of ``size``, transparency laid on white; what is smaller than it was is filtered.

    Args:
        image: loaded, of any mode.
        size: at most that of ``image``.
        rawmode: how the file stored the pixels, where the decoder says so.

    Raises:
        ValueError: pixel values are not finite.
    """
    _mend_transparency(image, rawmode)
    if image.mode == "RGB" and not image.has_transparency_data:
        if image.size == size:
            return image.convert("RGB")
        return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
    width, height = image.size
    blocks = max(1, int(width / size[0] / _REDUCING_GAP)), max(1, int(height / size[1] / _REDUCING_GAP))
    canvas = Image.new("RGB", (-(-width // blocks[0]), -(-height // blocks[1])))
    value_range = _value_range(image) if image.mode.startswith(("I", "F")) else None
    for top, band in _bands(image, blocks[1]):
        rgb = _to_rgb(band) if value_range is None else _deep_gray_to_rgb(band, *value_range)
        canvas.paste(rgb.reduce(blocks) if max(blocks) > 1 else rgb, (0, top // blocks[1]))
    if canvas.size == size:
        return canvas
    return canvas.resize(size, Image.Resampling.BICUBIC, box=(0, 0, width / blocks[0], height / blocks[1]))


def _bands(image: Image.Image, multiple: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """The image in strips of whole rows, each a multiple of ``multiple`` but for the last, with their first row."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width // multiple) * multiple
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(height, top + rows)))


def _mend_transparency(image: Image.Image, rawmode: str) -> None:
    """The transparent value of a PNG file in the depth in which Pillow gives its pixels."""
    value = image.info.get("transparency")
    if isinstance(value, int) and rawmode in _LOW_DEPTH:
        image.info["transparency"] = value * _LOW_DEPTH[rawmode]
    elif isinstance(value, tuple) and rawmode.startswith("RGB;16"):
        image.info["transparency"] = tuple(v >> 8 for v in value)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of eight bits to RGB, transparency laid on white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _value_range(image: Image.Image) -> tuple[float, float]:
    """What becomes black and white: 16-bit values have a range; 32-bit and floating point ones have none and are stretched."""
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high = np.inf, -np.inf
    for _, band in _bands(image):
        values = np.asarray(band)
        if not np.isfinite(values).all():
            raise ValueError("pixel values are not finite")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    # Pillow before 11 opens 16-bit PNG files in mode "I".
    return (0.0, 65535.0) if image.format == "PNG" and high <= 65535 else (low, high)


def _deep_gray_to_rgb(image: Image.Image, low: float, high: float) -> Image.Image:
    gray = np.asarray(image).astype(np.float64)
    scaled = (gray - low) * (255.0 / (high - low)) if high > low else np.zeros_like(gray)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[gray == transparent] = 255.0
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
