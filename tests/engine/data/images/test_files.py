"""Images from untrusted files: every mode becomes upright RGB, everything else an ImageError."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from png_files import png

from balcaprl.data.images.files import ImageError, check_image, check_image_bytes, decode_image, load_image

LIMITS = {"max_pixels": 1_000_000, "max_source_pixels": 64_000_000, "max_file_bytes": 1 << 20}


def gradient(width=40, height=30):
    """Red grows to the right, green downwards: shows turns and shrinking."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def png_header(width, height):
    """A PNG that only announces its size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reason(call, *arguments, **options):
    with pytest.raises(ImageError) as caught:
        call(*arguments, **options)
    return caught.value.reason


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_ordinary_formats(tmp_path, extension):
    gradient().save(tmp_path / f"a.{extension}")
    image = load_image(f"a.{extension}", tmp_path, **LIMITS)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(gradient())).mean() < 8
    check_image(f"a.{extension}", tmp_path, **LIMITS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    name = "a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"
    gradient().convert(mode).save(tmp_path / name, **({"quality": 95} if name == "a.jpg" else {}))
    image = load_image(name, tmp_path, **LIMITS)
    assert image.mode == "RGB"
    if mode != "1":
        expected = np.asarray(gradient().convert(mode).convert("RGB")).astype(int)
        assert np.abs(np.asarray(image) - expected).mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([200, 0, 0] * 256)
        image.putpixel((0, 0), 1)
        image.save(tmp_path / "a.png", transparency=0)
    else:
        image = Image.new(mode, (4, 4), (200, 0, 0, 0)[: len(mode)] if mode == "RGBA" else (200, 0))
        image.putpixel((0, 0), (200, 0, 0, 255) if mode == "RGBA" else (200, 255))
        image.save(tmp_path / "a.png")
    loaded = load_image("a.png", tmp_path, **LIMITS)
    assert loaded.getpixel((2, 2)) == (255, 255, 255)
    assert loaded.getpixel((0, 0))[0] == 200


def test_sixteen_bits_are_scaled_by_their_range(tmp_path):
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image("a.png", tmp_path, **LIMITS))[0, :, 0].tolist() == [0, 1, 255]


def test_floating_point_is_stretched_and_must_be_finite(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(load_image("a.tiff", tmp_path, **LIMITS))[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[np.nan, 0.0, 1.0]], dtype=np.float32)).save(tmp_path / "b.tiff")
    assert reason(load_image, "b.tiff", tmp_path, **LIMITS) == "broken image"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied(tmp_path, orientation, extension):
    # what undoes each orientation, from the EXIF standard: where the stored row 0 and column 0 belong
    undo = {2: [1], 3: [1, 0], 4: [0], 5: ["t"], 6: ["t", 1], 7: ["t", 1, 0], 8: ["t", 0]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient().save(tmp_path / f"a.{extension}", exif=exif.tobytes(), **({"quality": 95} if extension != "png" else {}))
    expected = np.asarray(gradient())
    for move in undo.get(orientation, []):
        expected = expected.transpose(1, 0, 2) if move == "t" else np.flip(expected, move)
    image = np.asarray(load_image(f"a.{extension}", tmp_path, **LIMITS))
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (1999, 10), (17, 3001), (1000, 1000)])
def test_shrinks_to_the_budget_and_keeps_the_shape(tmp_path, size, extension):
    gradient(*size).save(tmp_path / f"a.{extension}")
    image = load_image(f"a.{extension}", tmp_path, **{**LIMITS, "max_pixels": 5000})
    assert 0.7 * 5000 < image.width * image.height <= 5000
    assert abs(np.log((image.width / image.height) / (size[0] / size[1]))) < 0.25
    if min(size) > 100:
        wanted = np.asarray(gradient(*size).resize(image.size, Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(image) - wanted).mean() < 4


def test_small_images_are_not_enlarged(tmp_path):
    gradient(5, 4).save(tmp_path / "a.png")
    assert load_image("a.png", tmp_path, **LIMITS).size == (5, 4)


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_animations_give_their_first_frame(tmp_path, extension):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / f"a.{extension}", save_all=True, append_images=[blue])
    pixel = load_image(f"a.{extension}", tmp_path, **LIMITS).getpixel((4, 4))
    assert pixel[0] > 240
    assert pixel[2] < 15


def test_bytes_are_decoded_like_files(tmp_path):
    gradient().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert decode_image(data, "row 3", **LIMITS).tobytes() == load_image("a.png", tmp_path, **LIMITS).tobytes()
    assert reason(decode_image, data, "row 3", **{**LIMITS, "max_file_bytes": 10}) == "too large"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.png", "missing file"),
        ("inside.png/deeper.png", "missing file"),
        ("../outside.png", "path leaves the image folder"),
        ("folder/../../outside.png", "path leaves the image folder"),
        ("folder\\..\\..\\outside.png", "path leaves the image folder"),
        ("leaves.png", "path leaves the image folder"),
        ("leaves/outside.png", "path leaves the image folder"),
        ("C:\\pictures\\a.png", "absolute path"),
        ("\\\\server\\share\\a.png", "absolute path"),
        ("https://example.com/a.png", "URL"),
        ("file:///etc/passwd", "absolute path"),
        ("file://host/etc/passwd", "URL"),
        ("file:///etc/../etc/passwd", "path leaves the image folder"),
        ("file:///%2e%2e/passwd", "path leaves the image folder"),
        ("file://[broken", "URL"),
        ("FTP://example.com/a.png", "URL"),
        ("//server/share/a.png", "absolute path"),
        ("folder\\missing.png", "missing file"),
        ("data:image/png;base64,AAAA", "URL"),
        ("folder", "not a file"),
        ("", "not a file"),
        ("pipe", "not a file"),
        ("a\0.png", "not a usable path"),
        ("\ud800.png", "not a usable path"),
        ("x" * 5000, "unreadable file"),
    ],
)
@pytest.mark.parametrize("call", [load_image, check_image])
def test_paths_are_confined(tmp_path, call, path, expected):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    gradient().save(tmp_path / "outside.png")
    gradient().save(root / "inside.png")
    (root / "leaves.png").symlink_to(tmp_path / "outside.png")
    (root / "leaves").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    assert reason(call, path, root, **LIMITS) == expected


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "FILE://{}"])
def test_absolute_paths_below_the_root_are_taken(tmp_path, form):
    root = tmp_path / "root with space"
    (root / "folder").mkdir(parents=True)
    gradient().save(root / "folder" / "a%.png")
    (tmp_path / "link").symlink_to(root)
    for base in (root, tmp_path / "link"):
        path = base / "folder" / "a%.png"
        name = form.format(quote(str(path)) if "://" in form else path)
        assert load_image(name, root, **LIMITS).size == (40, 30)
        assert load_image(name, tmp_path / "link", **LIMITS).size == (40, 30)
    (root / "out.png").symlink_to(tmp_path / "elsewhere.png")
    assert reason(load_image, str(root / "out.png"), root, **LIMITS) == "path leaves the image folder"


def test_backslashes_separate_folders_where_no_file_is_called_so(tmp_path):
    (tmp_path / "folder").mkdir()
    gradient().save(tmp_path / "folder" / "a.png")
    assert load_image("folder\\a.png", tmp_path, **LIMITS).size == (40, 30)
    gradient(9, 9).save(tmp_path / "folder\\a.png")
    assert load_image("folder\\a.png", tmp_path, **LIMITS).size == (9, 9)


def test_a_sibling_folder_with_the_same_beginning_is_outside(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "root2").mkdir()
    gradient().save(tmp_path / "root2" / "a.png")
    (root / "a.png").symlink_to(tmp_path / "root2" / "a.png")
    assert reason(load_image, "a.png", root, **LIMITS) == "path leaves the image folder"


def test_links_inside_the_root_and_a_linked_root_are_fine(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    gradient().save(root / "a.png")
    (root / "b.png").symlink_to(root / "a.png")
    (tmp_path / "link").symlink_to(root)
    assert load_image("b.png", tmp_path / "link", **LIMITS).size == (40, 30)


@pytest.mark.parametrize("size", [(50_000, 50_000), (9_000, 9_000)])
def test_a_bomb_is_refused_by_its_header(tmp_path, size, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were read"))
    with pytest.raises(ImageError, match="pixels") as caught:
        load_image("bomb.png", tmp_path, **LIMITS)
    assert caught.value.reason == "too large"


def test_a_header_of_impossible_shape_is_refused(tmp_path):
    (tmp_path / "thin.png").write_bytes(png_header(4001, 20))
    assert reason(load_image, "thin.png", tmp_path, **LIMITS) == "too thin"


@pytest.mark.parametrize(
    ("size", "max_pixels", "usable"),
    [
        ((100, 20_000), 1_003_520, False),  # 70 x 14,166 is 202.4
        ((20_000, 100), 1_003_520, False),
        ((100, 20_000), 2_000_000, True),
        ((100, 20_001), 3_000_000, False),
        ((17, 3_400), 4_000, False),
        ((17, 3_000), 5_000, True),
        ((1, 200), 100, True),
    ],
)
def test_the_ratio_is_checked_after_rounding_too(tmp_path, size, max_pixels, usable):
    Image.new("L", size).save(tmp_path / "a.png")
    limits = {**LIMITS, "max_pixels": max_pixels}
    for call in (check_image, load_image):
        if usable:
            call("a.png", tmp_path, **limits)
        else:
            assert reason(call, "a.png", tmp_path, **limits) == "too thin"
    if usable:
        width, height = load_image("a.png", tmp_path, **limits).size
        assert max(width, height) <= 200 * min(width, height)


def test_files_over_the_byte_bound_are_not_opened(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(bytes(2 << 20))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the file was opened"))
    assert reason(load_image, "a.png", tmp_path, **LIMITS) == "too large"


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif"])
def test_truncated_files_pass_the_header_and_fail_to_decode(tmp_path, extension):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / f"a.{extension}")
    whole = (tmp_path / f"a.{extension}").read_bytes()
    (tmp_path / f"a.{extension}").write_bytes(whole[: 2 * len(whole) // 3])
    assert reason(load_image, f"a.{extension}", tmp_path, **LIMITS) == "broken image"
    if extension != "webp":  # its header reader wants the whole file
        check_image(f"a.{extension}", tmp_path, **LIMITS)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff", b"<svg/>", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert reason(load_image, "a.png", tmp_path, **LIMITS) in ("not an image", "broken image")
    assert reason(check_image, "a.png", tmp_path, **LIMITS) in ("not an image", "broken image")


def test_other_formats_are_not_even_tried(tmp_path):
    gradient().save(tmp_path / "a.ppm")
    assert reason(load_image, "a.ppm", tmp_path, **LIMITS) == "not an image"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow comments on what it reads
@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "tiff", "bmp", "webp"])
def test_damage_anywhere_is_an_image_error_or_an_image(extension):
    buffer = io.BytesIO()
    gradient().save(buffer, {"jpg": "JPEG"}.get(extension, extension.upper()))
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(buffer.getvalue())
        for place in rng.integers(0, min(len(damaged), 400), 4):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(ImageError):
            assert decode_image(bytes(damaged), "damaged", **LIMITS).mode == "RGB"


def test_photographs_of_the_real_set_decode(photograph_set):
    _, root = photograph_set
    paths = sorted((root / "images").iterdir())
    assert len(paths) >= 8
    for path in paths:
        image = load_image(path.relative_to(root), root, **{**LIMITS, "max_pixels": 50_000})
        assert 40_000 < image.width * image.height <= 50_000
        assert np.asarray(image).std() > 10


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    gradient().save(tmp_path / "a.png")
    original = os.stat

    def refuse(path, *arguments, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert reason(load_image, Path("a.png"), tmp_path, **LIMITS) == "unreadable file"


_LARGE = b"x" * (3 << 20)
METADATA = {
    "tEXt": [(b"tEXt", b"key\0" + _LARGE)],
    "zTXt": [(b"zTXt", b"key\0\0" + zlib.compress(_LARGE))],
    "iTXt": [(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(_LARGE))],
    "iCCP": [(b"iCCP", b"key\0\0" + zlib.compress(_LARGE))],
    "eXIf": [(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0" + _LARGE)],
    "many": [(b"zTXt", b"k%d\0\0" % i + zlib.compress(_LARGE[: 1 << 20])) for i in range(80)],
}


@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize("place", ["before", "after"])
def test_any_amount_of_png_metadata_is_valid(kind, place):
    limits = {**LIMITS, "max_file_bytes": 64 << 20}
    data = png(2, 1, 8, 2, b"\0\x01\x02\x03\xff\x00\x00", **{place: METADATA[kind]})
    if not (kind == "iCCP" and place == "after"):  # profiles precede pixels
        assert np.asarray(decode_image(data, "a", **limits))[0].tolist() == [[1, 2, 3], [255, 0, 0]]
    check_image_bytes(data, "a", **limits)


WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "transparent", "expected"),
    [
        (16, 0, struct.pack(">x3H", 0, 1000, 65535), (1000,), [[0, 0, 0], WHITE, WHITE]),
        (16, 0, struct.pack(">x3H", 0, 1000, 257), (5,), [[0, 0, 0], [4, 4, 4], [1, 1, 1]]),
        (16, 2, struct.pack(">x6H", 1000, 2000, 3000, 65535, 0, 0), (1000, 2000, 3000), [WHITE, [255, 0, 0]]),
        (8, 0, b"\0\x00\x05\xff", (5,), [[0, 0, 0], WHITE, WHITE]),
        (8, 2, b"\0\x01\x02\x03\xff\x00\x00", (1, 2, 3), [WHITE, [255, 0, 0]]),
        (4, 0, b"\0\x3f", (3,), [WHITE, WHITE]),
        (4, 0, b"\0\x3c", (12,), [[51, 51, 51], WHITE]),
        (2, 0, b"\0\x1b", (1,), [[0, 0, 0], WHITE, [170, 170, 170], WHITE]),
        (1, 0, b"\0\x40", (0,), [WHITE, WHITE]),
        (1, 0, b"\0\x40", (1,), [[0, 0, 0], WHITE]),
        (16, 4, struct.pack(">x4H", 30000, 65535, 30000, 0), None, [[117, 117, 117], WHITE]),
        (16, 6, struct.pack(">x8H", 30000, 0, 0, 65535, 30000, 0, 0, 0), None, [[117, 0, 0], WHITE]),
    ],
)
def test_png_transparency_of_every_depth_is_laid_on_white(depth, colour, rows, transparent, expected):
    before = [] if transparent is None else [(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    data = png(len(expected), 1, depth, colour, rows, before=before)
    assert np.asarray(decode_image(data, "a", **LIMITS))[0].tolist() == expected


def test_interlaced_files_decode():
    rows = b"\0\x00\0\x80\0\xff\0\x40" * 4
    assert decode_image(png(1, 1, 8, 0, b"\0\x07", interlace=1), "a", **LIMITS).getpixel((0, 0)) == (7, 7, 7)
    assert reason(decode_image, png(8, 8, 8, 0, rows[:5], interlace=1), "a", **LIMITS) == "broken image"


def test_a_jpeg_file_of_several_pictures_gives_its_first(tmp_path):
    gradient(400, 300).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (400, 300), "blue")]
    )
    image = load_image("a.jpg", tmp_path, **{**LIMITS, "max_pixels": 5000})
    assert image.getpixel((image.width - 1, 0))[0] > 200
    assert image.getpixel((0, 0))[2] < 60


def test_a_tiff_file_of_one_giant_tile_is_refused_by_its_header():
    content = zlib.compress(bytes(16 * 16))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 200, 325: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + content
    assert reason(decode_image, data, "a", **LIMITS) == "too large"


BOMBS = [
    ("RGB", "PNG", {}), ("RGBA", "PNG", {}), ("LA", "PNG", {}), ("P", "PNG", {"transparency": 0}), ("I;16", "PNG", {}),
    ("L", "PNG", {"transparency": 0}), ("F", "TIFF", {"compression": "tiff_adobe_deflate"}), ("P", "GIF", {"transparency": 0}),
    ("RGB", "JPEG", {"progressive": True, "subsampling": 0}), ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
    ("RGBA", "WEBP", {"lossless": True, "method": 0}), ("RGBA", "TIFF", {"compression": "tiff_adobe_deflate"}),
]  # fmt: skip
MEASURE = """
import sys
from balcaprl.data.images.files import BYTES_PER_PIXEL, ImageError, decode_image
def rss(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) << 10
data = open(sys.argv[1], "rb").read()
decode_image(open(sys.argv[2], "rb").read(), "small", max_pixels=1 << 20, max_source_pixels=1 << 24, max_file_bytes=1 << 30)
before = rss("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
try:
    decode_image(data, "bomb", max_pixels=1 << 20, max_source_pixels=int(sys.argv[3]), max_file_bytes=1 << 30)
    refused = False
except ImageError as error:
    refused = error.reason == "too large"
print(rss("VmHWM") - before, BYTES_PER_PIXEL, refused)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured by Linux's /proc")
@pytest.mark.parametrize(("mode", "extension", "options"), BOMBS)
def test_decoding_takes_the_stated_memory_and_no_more(tmp_path, mode, extension, options):
    """An image as large as is allowed, from a file of kilobytes."""
    side = 3600
    Image.new(mode, (side, side)).save(tmp_path / "bomb", extension, **options)
    Image.new(mode, (8, 8)).save(tmp_path / "small", extension, **options)
    allowed = side * side if extension != "WEBP" else side * side * 16 // 12
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "bomb"), str(tmp_path / "small")]
    for limit, expected in ((allowed, "False"), (allowed - side, "True")):
        done = subprocess.run([*command, str(limit)], check=True, capture_output=True, text=True, timeout=300)
        peak, bytes_per_pixel, refused = done.stdout.split()
        assert refused == expected
        assert int(peak) < int(bytes_per_pixel) * limit + (40 << 20)
