"""Loads images from untrusted files: confined to a folder, limited in size before decoding, and always as RGB.

A data set names its image files. No such name may reach outside the image folder, and no file may end the run or
exhaust the machine's memory. Every fault of an image raises ``ImageError`` with a short ``reason``.

    image = load_image("coco/000000000009.jpg", root, max_pixels=1_003_520, max_source_pixels=64_000_000,
                       max_file_bytes=64 << 20)
"""

from __future__ import annotations

import io
import math
import os
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import ExifTags, Image

from balcaprl.data.images.paths import ImageError, check_image_file, check_num_bytes
from balcaprl.data.images.pixels import shrunk_rgb
from balcaprl.data.images.png_text import without_text
from balcaprl.logtext import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The only formats that are opened; Pillow's many other readers are never tried on a data set's files."""
MAX_ASPECT_RATIO = 200
"""Largest ratio of longer to shorter side; image processors (Qwen2.5-VL's) refuse images beyond it."""
BYTES_PER_PIXEL = 12
"""Decoding takes at most this many bytes for each of ``max_source_pixels``, whatever the file contains: three quarters
of a gigabyte by default. Most pictures take less; a progressive JPEG with four colour channels takes this much."""
_COSTS = {"WEBP": 16}
"""Bytes per pixel of the formats whose decoders take more; for these, fewer pixels are allowed."""
_TIFF_TILE = (322, 323)
"""Tags of a tile's width and length in TIFF files; a tile is decoded whole, however small the image is."""

_DIGEST_SIZE = 12
_END_BYTES = 4096
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # the operation that undoes each EXIF orientation


def load_image(
    path: str | os.PathLike[str], root: Path, *, max_pixels: int, max_source_pixels: int, max_file_bytes: int
) -> Image.Image:
    """Read an image file that lies in ``root``.

    Args:
        path: relative to ``root``, or absolute and below it; no ``..``, no link that leaves ``root``.
        root: the folder that the path may not leave.
        max_pixels: a larger image is shrunk to at most this many pixels; its aspect ratio stays.
        max_source_pixels: an image whose header announces more is refused before anything is decoded.
        max_file_bytes: a larger file is refused unread.

    Returns:
        an upright RGB image (EXIF orientation applied), transparency laid on white; of an animation, the first frame.

    Raises:
        ImageError: the path is refused, or the file is missing, too large, of another format, or damaged.
    """
    with _open_file(path, root, max_file_bytes) as file:
        return _decode(file, printable(path), max_pixels, max_source_pixels)


def decode_image(
    data: bytes, name: str, *, max_pixels: int, max_source_pixels: int, max_file_bytes: int
) -> Image.Image:
    """Decode an image file that is already in memory, like ``load_image``; ``name`` appears in error messages."""
    return _decode(_open_bytes(data, name, max_file_bytes), name, max_pixels, max_source_pixels)


def check_image(
    path: str | os.PathLike[str], root: Path, *, max_pixels: int, max_source_pixels: int, max_file_bytes: int
) -> str:
    """Raise the ``ImageError`` that ``load_image`` would, if path, size or header show the fault; decode nothing.

    Returns:
        a digest of the file's length, beginning and end: equal for equal files, and seldom equal for different ones.
    """
    with _open_file(path, root, max_file_bytes) as file:
        _open_header(file, printable(path), max_pixels, max_source_pixels)
        return _ends_digest(file)


def check_image_bytes(data: bytes, name: str, *, max_pixels: int, max_source_pixels: int, max_file_bytes: int) -> None:
    """Raise the ``ImageError`` that ``decode_image`` would, if size or header show the fault; decode nothing."""
    _open_header(_open_bytes(data, name, max_file_bytes), name, max_pixels, max_source_pixels)


def content_digest(content: bytes) -> str:
    """Return a digest of an image file's bytes, which identifies the image."""
    return blake2b(content, digest_size=_DIGEST_SIZE).hexdigest()


def _ends_digest(file: BinaryIO) -> str:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest = blake2b(f"{length} ".encode() + file.read(_END_BYTES), digest_size=_DIGEST_SIZE)
    file.seek(max(0, length - _END_BYTES))
    digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


@contextmanager
def _open_file(path: str | os.PathLike[str], root: Path, max_file_bytes: int) -> Iterator[BinaryIO]:
    resolved = check_image_file(path, root, max_file_bytes=max_file_bytes)
    try:
        file = open(resolved, "rb")  # noqa: SIM115 - the errors of opening and of reading are told apart
    except OSError as error:
        raise ImageError(f"{printable(path)}: cannot be read: {error.strerror}", "unreadable file") from error
    with file:
        yield file


def _open_bytes(data: bytes, name: str, max_file_bytes: int) -> BinaryIO:
    check_num_bytes(len(data), name, max_file_bytes)
    return io.BytesIO(data)


def _open_header(file: BinaryIO, name: str, max_pixels: int, max_source_pixels: int) -> Image.Image:
    """Read the header and check it against the limits; do not read the pixels."""
    try:
        image = _open(file)
    except Image.DecompressionBombError as error:  # Pillow's own limit, about 179 million pixels
        raise ImageError(f"{name}: refused unread: {error}", "too large") from error
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image, or not one of {', '.join(FORMATS)}", "not an image") from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise ImageError(f"{name}: broken header: {type(error).__name__}: {printable(error)}") from error
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(f"{name}: {width} x {height} pixels")
    _check_memory(image, name, max_source_pixels)
    shrunk_size(image.size, max_pixels, name)
    return image


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except ValueError:
        bare = without_text(file)
        if bare is None:
            raise
        return Image.open(bare, formats=FORMATS)


def _check_memory(image: Image.Image, name: str, max_source_pixels: int) -> None:
    """Raise ``ImageError`` if the image has too many pixels, or if decoding it would take too many bytes."""
    width, height = image.size
    if width * height > max_source_pixels:
        raise ImageError(
            f"{name}: {width:,} x {height:,} pixels exceed data.max_source_pixels ({max_source_pixels:,})", "too large"
        )
    cost = _COSTS.get(image.format or "", BYTES_PER_PIXEL) * width * height
    tags: Any = getattr(image, "tag_v2", {})
    try:
        cost = max(cost, BYTES_PER_PIXEL * math.prod(int(tags.get(tag, 1)) for tag in _TIFF_TILE))
    except Exception as error:  # a tag is not a number, or cannot be read
        raise ImageError(f"{name}: broken header: the size of its tiles: {printable(error)}") from error
    if cost > BYTES_PER_PIXEL * max_source_pixels:
        raise ImageError(
            f"{name}: {width:,} x {height:,} pixels of {image.format} take {cost:,} bytes to decode, over {BYTES_PER_PIXEL} "
            f"times data.max_source_pixels ({max_source_pixels:,})",
            "too large",
        )


def _decode(file: BinaryIO, name: str, max_pixels: int, max_source_pixels: int) -> Image.Image:
    try:
        return _decode_pixels(file, name, max_pixels, max_source_pixels)
    except ImageError as error:
        # Texts that Pillow refuses may come after the pixels; they are then found only while decoding.
        bare = without_text(file) if error.reason == "broken image" else None
        if bare is None:
            raise
        return _decode_pixels(bare, name, max_pixels, max_source_pixels)


def _decode_pixels(file: BinaryIO, name: str, max_pixels: int, max_source_pixels: int) -> Image.Image:
    image = _open_header(file, name, max_pixels, max_source_pixels)
    size = shrunk_size(image.size, max_pixels, name)
    rawmode = _rawmode(image)
    try:
        if image.format in ("JPEG", "MPO"):  # MPO: a JPEG file with further pictures behind the first
            # libjpeg scales while it decodes; twice the target size leaves the final filter enough detail
            image.draft(image.mode, (2 * size[0], 2 * size[1]))
        image.load()
        orientation = _orientation(image)
        return _upright(shrunk_rgb(image, size, rawmode), orientation)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}", "too large") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageError(f"{name}: cannot be decoded: {type(error).__name__}: {printable(error)}") from error


def _rawmode(image: Image.Image) -> str:
    """Return how the file stores its pixels, if Pillow's reader says so; otherwise ""."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles and len(tiles[0]) > 3 else ""
    found = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return found if isinstance(found, str) else ""


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 (upright) if none can be read. Pillow's reader turns TIFF images by itself."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata is no reason to refuse a picture
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    upright = image if turn is None else image.transpose(turn)
    upright.info = {}  # profiles and comments have been used; keep no copy in memory
    return upright


def shrunk_size(size: tuple[int, int], max_pixels: int, name: str) -> tuple[int, int]:
    """Return ``size``, shrunk to at most ``max_pixels`` pixels if it has more; the aspect ratio stays, up to rounding.

    Raises:
        ImageError: the image is too thin, before or after shrinking; ``name`` appears in the message.
    """
    _check_ratio(size, name, "")
    width, height = size
    if width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    shrunk = min(width, max(1, max_pixels // height)), min(height, max(1, max_pixels // width))
    _check_ratio(shrunk, name, f", shrunk from {size[0]} x {size[1]} to {max_pixels:,} pixels,")
    return shrunk


def _check_ratio(size: tuple[int, int], name: str, how: str) -> None:
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageError(
            f"{name}: {size[0]} x {size[1]}{how} is more than {MAX_ASPECT_RATIO} times longer than wide", "too thin"
        )
