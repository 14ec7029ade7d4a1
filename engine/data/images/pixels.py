"""Converts decoded pixels of any mode to RGB of a given size, in bands, so that a large image is not copied whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

_BAND_PIXELS = 1 << 20
_REDUCING_GAP = 3.0
"""A dimension that is at least 2 x this factor (6 times) the target's is first averaged in whole blocks, then filtered,
as with ``reducing_gap`` in ``PIL.Image.resize``."""
_LOW_DEPTH = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow multiplies the pixels of PNG files of 2 and 4 bits, but not the value that is transparent."""


def shrunk_rgb(image: Image.Image, size: tuple[int, int], rawmode: str = "") -> Image.Image:
    """Return an RGB image of ``size``, laid on white where it is transparent; shrinking is filtered.

    Args:
        image: a loaded image of any mode.
        size: the width and height to return, at most those of ``image``.
        rawmode: how the file stored the pixels, if the decoder says so.

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
    """Yield (first row, strip of rows); every strip but the last has a multiple of ``multiple`` rows."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width // multiple) * multiple
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(height, top + rows)))


def _mend_transparency(image: Image.Image, rawmode: str) -> None:
    """Convert the value that a PNG file marks as transparent to the bit depth in which Pillow gives the pixels."""
    value = image.info.get("transparency")
    if isinstance(value, int) and rawmode in _LOW_DEPTH:
        image.info["transparency"] = value * _LOW_DEPTH[rawmode]
    elif isinstance(value, tuple) and rawmode.startswith("RGB;16"):
        image.info["transparency"] = tuple(v >> 8 for v in value)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode with eight bits to RGB, laid on white where it is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _value_range(image: Image.Image) -> tuple[float, float]:
    """Return the values that become black and white: 0 and 65535 for 16-bit pixels, otherwise the image's extremes."""
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
