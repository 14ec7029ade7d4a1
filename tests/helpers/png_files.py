"""PNG files from their scan lines, for what Pillow does not write: interlacing, odd depths, chunks in odd places."""

import struct
import zlib
from collections.abc import Sequence

Chunks = Sequence[tuple[bytes, bytes]]


def png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    rows: bytes,
    *,
    before: Chunks = (),
    after: Chunks = (),
    interlace: int = 0,
) -> bytes:
    """A file with further chunks around the pixels; ``colour`` as PNG numbers it, ``rows`` with their filter bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    extra = [b"".join(chunk(*each) for each in chunks) for chunks in (before, after)]
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra[0] + chunk(b"IDAT", zlib.compress(rows)) + extra[1] + end
