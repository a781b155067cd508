"""Picture files of every kind -> RGB: pixels, limits, and a single kind of error for any bytes."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from data_prep import pixels
from data_prep.pixels import (
    FORMATS,
    READERS,
    BadPicture,
    PictureSettings,
    orientation,
    picture_format,
    read_header,
    require_size,
    resampling,
    resized_window,
    to_rgb,
)
from tests.data_prep.bare_jpegs import in_scans

ON_BLUE = PictureSettings(background=(0, 0, 255))
TURN = PictureSettings(exif="apply")


def file_of(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels_of(data: bytes, chosen: PictureSettings = PictureSettings()) -> NDArray[np.uint8]:  # noqa: B008  # frozen
    image = to_rgb(data, chosen)
    assert image.mode == "RGB"
    return np.asarray(image)


def scene(width: int = 31, height: int = 23) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 8 % 256, y * 11 % 256, (x + y) * 4 % 256], 2).astype(np.uint8))


def exif_of(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif.tobytes()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    between = b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + between + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, list[int]]], body: bytes, order: str = "<") -> bytes:
    """Tags: number -> (type, values). The strip or tile is `body`; 273 or 324 is filled in."""
    sizes = {1: "B", 3: "H", 4: "I"}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    after = 8 + 2 + 12 * len(tags) + 4
    extra = b""
    entries = b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{sizes[kind]}", *values)
        if len(packed) > 4:
            entries += struct.pack(f"{order}HHII", tag, kind, len(values), after + len(extra))
            extra += packed
        else:
            entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    data = head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra
    start = struct.pack(f"{order}I", len(data))
    for tag in (273, 324):
        data = data.replace(
            struct.pack(f"{order}HHII", tag, 4, 1, 0xDEAD), struct.pack(f"{order}HHI", tag, 4, 1) + start
        )
    return data + body


def gray_tiff(
    values: list[int], bits: int, body: bytes, order: str = "<", photometric: int = 1, sign: int = 1
) -> bytes:
    tags = {
        256: (3, [len(values)]),
        257: (3, [1]),
        258: (3, [bits]),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [0xDEAD]),
        277: (3, [1]),
        278: (3, [1]),
        279: (4, [len(body)]),
        339: (3, [sign]),
    }
    return tiff(tags, body, order)


RED_GREEN = np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG2000", {"irreversible": False}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "zstd"}),
    ],
)
def test_lossless_formats_give_the_pixels_that_went_in(file_format: str, options: dict[str, Any]) -> None:
    data = file_of(scene(), file_format, **options)
    assert picture_format(data) == file_format
    assert np.array_equal(pixels_of(data), np.asarray(scene()))


def modes() -> dict[str, tuple[bytes, list[list[int]], list[list[int]]]]:
    """Name -> file of a row of pixels, what it shows, and what it shows on blue."""
    solid = RED_GREEN[0].tolist()
    half = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 255, 0, 0]]], np.uint8))
    mixed = Image.fromarray(np.array([[[200, 100, 50, 128], [200, 100, 50, 255]]], np.uint8))
    two = Image.new("P", (2, 1))
    two.putdata([0, 1])
    two.putpalette([255, 0, 0, 0, 255, 0])
    gray = Image.fromarray(np.array([[200, 100]], np.uint8))
    see_gray = [[200] * 3, [100] * 3]
    key_gray = [[200] * 3, [0, 0, 255]]
    la = Image.merge("LA", (gray, Image.fromarray(np.array([[255, 0]], np.uint8))))
    sixteen = struct.pack(">BHH", 0, 0xC8FF, 0x6400)
    on_blue = [[255, 0, 0], [0, 0, 255]]
    cmyk = Image.new("CMYK", (2, 1))
    cmyk.putdata([(0, 255, 255, 0), (255, 0, 255, 0)])
    return {
        "1": (png(2, 1, 1, 0, b"\0\x80"), [[255] * 3, [0] * 3], [[255] * 3, [0] * 3]),
        "1 with a transparent colour": (
            png(2, 1, 1, 0, b"\0\x80", (b"tRNS", b"\0\1")),
            [[255] * 3, [0] * 3],
            [[0, 0, 255], [0] * 3],
        ),
        "L": (file_of(gray, "PNG"), see_gray, see_gray),
        "L with a transparent colour": (file_of(gray, "PNG", transparency=100), see_gray, key_gray),
        "L of 2 bits with a transparent colour": (
            png(2, 1, 2, 0, b"\0\x90", (b"tRNS", b"\0\1")),
            [[170] * 3, [85] * 3],
            [[170] * 3, [0, 0, 255]],
        ),
        "L of 4 bits with a transparent colour": (
            png(2, 1, 4, 0, b"\0\xa3", (b"tRNS", b"\0\3")),
            [[170] * 3, [51] * 3],
            [[170] * 3, [0, 0, 255]],
        ),
        "LA": (file_of(la, "PNG"), see_gray, key_gray),
        "LA in TIFF": (file_of(la, "TIFF"), see_gray, key_gray),
        "La in TIFF": (
            file_of(la, "TIFF").replace(struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1)),
            see_gray,
            key_gray,
        ),
        "P": (file_of(two, "PNG"), solid, solid),
        "P with alpha values": (file_of(two, "PNG", transparency=b"\xff\x00"), solid, on_blue),
        "P with one transparent colour": (file_of(two, "PNG", transparency=1), solid, on_blue),
        "P in GIF": (file_of(two, "GIF", transparency=1), solid, on_blue),
        "P in TIFF": (file_of(two, "TIFF"), solid, solid),
        "P in BMP": (file_of(two, "BMP"), solid, solid),
        "RGB with a transparent colour": (
            file_of(Image.fromarray(RED_GREEN), "PNG", transparency=(0, 255, 0)),
            solid,
            on_blue,
        ),
        "RGB of 16 bits with a transparent colour": (
            png(
                2,
                1,
                16,
                2,
                struct.pack(">B6H", 0, 0xFF01, 0, 0, 0, 0xFF02, 0),
                (b"tRNS", struct.pack(">3H", 0, 0xFF02, 0)),
            ),
            solid,
            on_blue,
        ),
        "RGBA": (file_of(half, "PNG"), solid, on_blue),
        "RGBA, half transparent": (file_of(mixed, "PNG"), [[200, 100, 50]] * 2, [[100, 50, 152], [200, 100, 50]]),
        "RGBA in TIFF": (file_of(half, "TIFF"), solid, on_blue),
        "RGBA in WebP": (file_of(half, "WEBP", lossless=True, exact=True), solid, on_blue),
        "CMYK in TIFF": (file_of(cmyk, "TIFF"), solid, solid),
        "I;16": (png(2, 1, 16, 0, sixteen), see_gray, see_gray),
        "I;16 with a transparent colour": (
            png(2, 1, 16, 0, sixteen, (b"tRNS", struct.pack(">H", 0x6400))),
            see_gray,
            key_gray,
        ),
        "16 bits with alpha": (
            png(2, 1, 16, 4, struct.pack(">B4H", 0, 0xC800, 0xFFFF, 0x6400, 0)),
            see_gray,
            key_gray,
        ),
        "I;16 in TIFF": (gray_tiff([0, 0], 16, struct.pack("<HH", 0xC8FF, 0x6400)), see_gray, see_gray),
        "I;16B in TIFF": (gray_tiff([0, 0], 16, struct.pack(">HH", 0xC8FF, 0x6400), ">"), see_gray, see_gray),
        "I;16 in TIFF, white is zero": (
            gray_tiff([0, 0], 16, struct.pack("<HH", 0x37FF, 0x9BFF), photometric=0),
            see_gray,
            see_gray,
        ),
        "12 bits in TIFF": (gray_tiff([0, 0], 12, bytes([0xC8, 0xF6, 0x40])), see_gray, see_gray),
        "16 bits in PGM": (b"P5 2 1 65535\n" + struct.pack(">HH", 0xC8FF, 0x6400), see_gray, see_gray),
        "12 bits in PGM": (b"P5 2 1 4095\n" + struct.pack(">HH", 3213, 1607), see_gray, see_gray),
        "text in PGM": (b"P2 # gray\n2 1\n1000\n784 392\n", see_gray, see_gray),
        "text in PPM": (b"P3\n2 1 255\n255 0 0 0 255 0\n", solid, solid),
        "PBM": (b"P1\n2 1\n0 1\n", [[255] * 3, [0] * 3], [[255] * 3, [0] * 3]),
    }


MODES = modes()


@pytest.mark.parametrize("name", MODES)
def test_every_mode_shows_its_colours(name: str) -> None:
    data, plain, on_blue = MODES[name]
    assert pixels_of(data)[0].tolist() == plain
    assert pixels_of(data, ON_BLUE)[0].tolist() == on_blue


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_tiffs_of_other_colour_spaces_are_near_the_colours_they_were_made_of(mode: str) -> None:
    shown = pixels_of(file_of(scene().convert(mode), "TIFF"))
    assert np.abs(shown.astype(int) - np.asarray(scene())).mean() < 3


def planes(compression: int) -> bytes:
    """A TIFF of 2 x 1 px, gray and alpha in planes of their own."""
    packed = (lambda row: bytes([len(row) - 1]) + row) if compression == 32773 else bytes
    gray, alpha = packed(bytes([200, 100])), packed(bytes([255, 0]))
    shorts = [(256, 2), (257, 1), (259, compression), (262, 1), (277, 2), (278, 1), (284, 2), (338, 2)]
    start = 8 + 2 + 11 * 12 + 4
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in shorts]
    entries.append(struct.pack("<HHIHH", 258, 3, 2, 8, 8))
    entries += (struct.pack("<HHII", tag, 4, 2, at) for tag, at in ((273, start), (279, start + 8)))
    entries.sort(key=lambda entry: entry[1::-1])
    body = struct.pack("<4I", start + 16, start + 16 + len(gray), len(gray), len(alpha))
    return b"II*\0" + struct.pack("<IH", 8, 11) + b"".join(entries) + bytes(4) + body + gray + alpha


def test_alpha_in_a_separate_plane_is_refused() -> None:
    assert pixels_of(planes(32773))[0].tolist() == [[200] * 3, [100] * 3]
    with pytest.raises(BadPicture, match="has its alpha in a plane of its own"):
        to_rgb(planes(32773), ON_BLUE)
    with pytest.raises(BadPicture, match="of an unusual kind"):
        to_rgb(planes(1))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (file_of(Image.new("F", (2, 2)), "TIFF"), "has gray values that are fractions"),
        (file_of(Image.new("I", (2, 2)), "TIFF"), "has gray values that are signed or of 32 bits"),
        (gray_tiff([0], 16, b"\0\0", sign=2), "has gray values that are signed or of 32 bits"),
        (gray_tiff([0], 8, b"\0", sign=2), "has signed gray values"),
        (b"", "is empty"),
        (bytes(100), "holds zeros only"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC picture; install pillow-heif, or convert it to PNG first"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "is a HEIC picture"),
        (b"\xff\x0a\xfa\x1f", "is a JPEG XL picture; convert it with `djxl` first"),
        (b"DDS |\0\0\0", "is a DDS texture"),
        (b"8BPS\0\x01", "is a Photoshop file"),
        (file_of(scene(), "TGA"), "is a TGA picture"),
        (file_of(scene(), "EPS"), "is a PostScript file"),
        (file_of(scene(), "ICO"), "is an icon"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns=', "is an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"hello", "is no picture of a format that is read"),
    ],
)
def test_unsupported_kinds_are_named(data: bytes, said: str) -> None:
    with pytest.raises(BadPicture) as error:
        to_rgb(data)
    assert str(error.value).startswith(said)


def test_without_its_reader_an_avif_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(scene(), "AVIF")
    assert picture_format(data) == picture_format(data.replace(b"ftypavif", b"ftypmif1", 1)) == "AVIF"
    monkeypatch.delitem(READERS, "AVIF")
    with pytest.raises(BadPicture, match="is an AVIF picture; install a Pillow that reads AVIF"):
        to_rgb(data)


def test_the_plugin_for_heic_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """pillow-heif is not installed here; Pillow's PNG reader takes its place."""
    ftyp = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"

    def reader(file: io.BytesIO) -> Any:
        return PngImagePlugin.PngImageFile(io.BytesIO(file.read().removeprefix(ftyp)))

    monkeypatch.setattr(pixels, "_heif_reader", lambda: reader)
    data = ftyp + file_of(scene(), "PNG")
    assert read_header(data)[:4] == ("HEIF", "RGB", *scene().size)
    assert np.array_equal(pixels_of(data), np.asarray(scene()))


TURNED_FORMATS = {
    "JPEG": {"exif": exif_of(6), "quality": 95, "subsampling": 0},
    "PNG": {"exif": exif_of(6)},
    "WEBP": {"exif": exif_of(6), "lossless": True},
    "TIFF": {"tiffinfo": {274: 6}},
    "AVIF": {"exif": exif_of(6), "quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize(
    ("file_format", "options"), [*TURNED_FORMATS.items(), ("TIFF", {"tiffinfo": {274: 6}, "compression": "tiff_lzw"})]
)
def test_a_turn_is_ignored_or_applied_alike_in_every_format(file_format: str, options: dict[str, Any]) -> None:
    data = file_of(scene(), file_format, **options)
    plain = np.asarray(scene(), dtype=int)
    assert read_header(data).orientation == 6
    assert np.abs(pixels_of(data) - plain).max() < 20
    assert np.abs(pixels_of(data, TURN) - np.rot90(plain, -1)).max() < 20


@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_turns_are_pillows(turn: int) -> None:
    from PIL import ImageOps

    data = file_of(scene(), "PNG", exif=exif_of(turn))
    assert orientation(data) == turn
    assert np.array_equal(pixels_of(data, TURN), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize("exif", [exif_of(0), exif_of(9), b"Exif\0\0LoremIpsum", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_an_invalid_orientation_turns_nothing(exif: bytes) -> None:
    for file_format in ("JPEG", "PNG", "WEBP"):
        data = file_of(scene(), file_format, exif=exif)
        assert orientation(data) == 1
        assert to_rgb(data, TURN).size == scene().size


def test_an_orientation_in_xmp_alone_turns_no_format() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    for file_format, options in {"JPEG": {"xmp": xmp}, "WEBP": {"xmp": xmp}, "TIFF": {"tiffinfo": {700: xmp}}}.items():
        assert to_rgb(file_of(scene(), file_format, **options), TURN).size == scene().size


@pytest.mark.parametrize(
    "extra",
    [
        b"\xff\xe0\0\x07JFIF\0",
        b"\xff\xe1\0\x0aExif\0\0XY",
        b"\xff\xee\0\x07Adobe",
        b"\xff\xe2\0\x08MPF\0II",
        b"\xff\xed\0\x02",
        b"junk",  # libjpeg skips bytes between segments
        b"\0\0\x7f",
    ],
)
def test_odd_metadata_is_not_damage_and_changes_no_pixel(extra: bytes) -> None:
    data = file_of(scene(), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels_of(data), expected)
    for at in (2, data.index(b"\xff\xdb")):
        odd = data[:at] + extra + data[at:]
        assert np.array_equal(pixels_of(odd), expected)
        assert read_header(odd) == read_header(data)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"iCCP", b"x\0\1"),
        (b"zTXt", b"key\0\0" + zlib.compress(bytes(5 << 20))),
        (b"acTL", bytes(8)),
        (b"fcTL", bytes(26)),
        (b"pHYs", b""),
        (b"eXIf", b"LoremIpsum"),
    ],
)
def test_odd_chunks_are_not_damage(chunk: tuple[bytes, bytes]) -> None:
    rows = b"\0\xff\0\0\0\xff\0"
    data = png(2, 1, 8, 2, rows, chunk)
    assert pixels_of(data).tolist() == RED_GREEN.tolist()
    at = data.index(chunk[0]) + 8 + len(chunk[1])
    assert pixels_of(data[: at - 4] + b"sums" + data[at:]).tolist() == RED_GREEN.tolist()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((0, 5), "0 x 5 px: it has no pixels"),
        ((65_501, 100), "more than 65,500 px on a side"),
        ((20_000, 20_000), "more than 36,000,000 px in all"),
        ((1, 65_500), "one side more than 1,000 times the other"),
    ],
)
def test_sizes_beyond_the_limits_are_refused(size: tuple[int, int], said: str) -> None:
    with pytest.raises(BadPicture, match=said):
        require_size(*size)
    for fits in ((65_500, 500), (30_000, 40), (600, 2), (300, 1), (10, 3_000), (6_000, 6_000)):
        require_size(*fits)


def header_of(file_format: str, width: int, height: int) -> bytes:
    """A file whose header claims these sides, and which holds few pixels."""
    small = file_of(Image.new("RGB", (8, 8)), file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    match file_format:
        case "JPEG":
            at = small.index(b"\xff\xc0")
            return small[: at + 5] + struct.pack(">HH", height, width) + small[at + 9 :]
        case "PNG":
            return png(width, height, 8, 2, b"")
        case "GIF":
            return small[:6] + struct.pack("<HH", width, height) + small[10:]
        case "BMP":
            return small[:18] + struct.pack("<ii", width, height) + small[26:]
        case "WEBP":
            head = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little")
            return b"RIFF" + struct.pack("<I", len(small) + 18) + head + (height - 1).to_bytes(3, "little") + small[12:]
        case "PPM":
            return b"P6 %d %d 255\n" % (width, height)
        case "JPEG2000":
            at = small.index(b"\xff\x4f\xff\x51") + 8
            return small[:at] + struct.pack(">II", width, height) + small[at + 8 :]
        case "AVIF":
            at = small.index(b"ispe") + 8
            return small[:at] + struct.pack(">II", width, height) + small[at + 8 :]
        case _:
            tags = gray_tiff([0], 8, b"\0")
            for tag, side in ((256, width), (257, height)):
                at = tags.index(struct.pack("<HHI", tag, 3, 1))
                tags = tags[:at] + struct.pack("<HHII", tag, 4, 1, side) + tags[at + 12 :]
            return tags


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_limits_are_checked_on_the_header_of_every_format(file_format: str) -> None:
    for data in (header_of(file_format, 16_000, 16_000), header_of(file_format, 1, 16_000)):
        with pytest.raises(BadPicture, match=r"px, more than|times the other"):
            to_rgb(data)
        with pytest.raises(BadPicture, match=r"px, more than|times the other"):
            read_header(data)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    assert to_rgb(in_scans(64, 64)).size == (64, 64)
    with pytest.raises(BadPicture, match="501 scans"):
        to_rgb(in_scans(64, 64, 501))
    with pytest.raises(BadPicture, match="scans"):
        to_rgb(in_scans(5_000, 5_000, 90))


def test_a_tiff_whose_tile_is_larger_than_its_picture_is_refused() -> None:
    tags = {
        256: (4, [96]),
        257: (4, [96]),
        258: (3, [8, 8, 8]),
        259: (3, [8]),
        262: (3, [2]),
        277: (3, [3]),
        284: (3, [1]),
        322: (4, [32_000]),
        323: (4, [20_000]),
        324: (4, [0xDEAD]),
        325: (4, [100]),
    }
    with pytest.raises(BadPicture, match="MiB to decode"):
        to_rgb(tiff(tags, zlib.compress(bytes(10_000))))


SEEDS = [
    *(data for data, _, _ in MODES.values()),
    *(file_of(scene(), name, **options) for name, options in TURNED_FORMATS.items()),
    file_of(scene(), "JPEG", progressive=True),
    file_of(scene().convert("CMYK"), "JPEG"),
    file_of(scene(), "JPEG2000"),
    file_of(scene(), "WEBP"),
    file_of(scene().quantize(16), "GIF"),
    file_of(scene(), "TIFF", compression="jpeg"),
    in_scans(16, 16),
]


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@settings(max_examples=300, deadline=None)
@given(mutants() | st.binary(max_size=200), st.sampled_from([PictureSettings(), ON_BLUE, TURN]))
def test_any_bytes_become_pixels_or_one_readable_line(data: bytes, chosen: PictureSettings) -> None:
    for read in (lambda: to_rgb(data, chosen), lambda: read_header(data)):
        try:
            read()
        except BadPicture as error:
            said = str(error)
            assert said.isprintable()
            assert 0 < len(said) < 400
            assert "0x" not in said


def test_neither_pillow_nor_libtiff_prints_anything() -> None:
    """Of a TIFF with an unknown tag, too many samples and a palette with alpha."""
    code = (
        "import sys; from data_prep.pixels import *\n"
        "for line in sys.stdin:\n"
        "    try: to_rgb(bytes.fromhex(line))\n"
        "    except BadPicture: pass\n"
    )
    good = file_of(scene(), "TIFF", compression="tiff_lzw", tiffinfo={65_000: "x"})
    odd = good.replace(struct.pack("<HHIH", 277, 3, 1, 3), struct.pack("<HHIH", 277, 3, 1, 900))
    alpha = MODES["P with alpha values"][0]
    cut = good[:200] + bytes(50) + good[250:]
    assert odd != good
    lines = "\n".join(data.hex() for data in (good, odd, alpha, cut))
    done = subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout + done.stderr == ""


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_window_of_a_resized_picture_is_the_resized_pictures_window(data: st.DataObject) -> None:
    sides = st.integers(1, 40) | st.sampled_from([1, 2, 3, 300])
    width, height = data.draw(sides), data.draw(sides)
    resized = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 700))
    window = (
        data.draw(st.integers(-5, resized[0])),
        data.draw(st.integers(-5, resized[1])),
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 20)),
    )
    seed = data.draw(st.integers(0, 9))
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    left, top, columns, rows = window
    interpolation = data.draw(st.sampled_from(["bilinear", "bicubic"]))
    whole = picture.resize(resized, resampling(interpolation)).crop((left, top, left + columns, top + rows))
    assert np.array_equal(np.asarray(resized_window(picture, resized, window, interpolation)), np.asarray(whole))


def test_a_strip_costs_no_more_than_its_window() -> None:
    code = (
        "import resource; from PIL import Image; from data_prep.pixels import resized_window\n"
        "Image.new('RGB', (4, 4)).resize((8, 8), Image.Resampling.BILINEAR)\n"
        "strip = Image.new('RGB', (1, 2_000_000), (7, 8, 9))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "part = resized_window(strip, (256, 512_000_000), (16, 255_999_888, 224, 224))\n"
        "assert part.size == (224, 224) and part.getpixel((0, 0)) == (7, 8, 9)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 20_000  # KiB


def test_settings_pass_through_json() -> None:
    for chosen in (PictureSettings(), PictureSettings("apply", (1, 2, 3))):
        assert PictureSettings.from_dict(chosen.as_dict()) == chosen
    assert PictureSettings.from_dict({"encode": "jpeg", "exif": "apply"}) == TURN  # an older manifest's
    for wrong in ({"exif": "turn"}, {"background": [1, 2]}, {"background": [1, 2, 256]}, {"background": "red"}):
        with pytest.raises(ValueError, match="expected"):
            PictureSettings.from_dict(wrong)
