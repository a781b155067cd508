"""The marker parser against files that Pillow makes, and against files that are broken on purpose."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.jpeg.header import JpegHeader, is_read_by_ffcv, plain, read_jpeg_header, read_odd_jpeg_header

FRAME = struct.pack(">2BHBHHB", 0xFF, 0xC0, 17, 8, 5, 7, 3) + bytes([1, 0x22, 0, 2, 0x11, 0, 3, 0x11, 0])
SCAN = b"\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00\x00\x3f\x00"
QUANTIZATION = b"\xff\xdb\x00\x43\x00" + bytes([1] * 64)
DC, AC = (b"\xff\xc4\x00\x14" + kind + b"\x01" + bytes(15) + b"\x00" for kind in (b"\x00", b"\x10"))
MINIMAL = b"\xff\xd8" + QUANTIZATION + DC + AC + FRAME + SCAN + b"\x12\x34" + b"\xff\xd9"


@pytest.mark.parametrize(
    ("mode", "options", "frame", "sampling"),
    [
        ("RGB", {"subsampling": "4:4:4"}, 0xC0, ((1, 1), (1, 1), (1, 1))),
        ("RGB", {"subsampling": "4:2:2"}, 0xC0, ((2, 1), (1, 1), (1, 1))),
        ("RGB", {"subsampling": "4:2:0"}, 0xC0, ((2, 2), (1, 1), (1, 1))),
        ("RGB", {"progressive": True, "subsampling": "4:4:4"}, 0xC2, ((1, 1), (1, 1), (1, 1))),
        ("L", {}, 0xC0, ((1, 1),)),
        ("CMYK", {"subsampling": "4:4:4"}, 0xC0, ((1, 1),) * 4),
    ],
)
def test_headers_of_pillows_files(picture, image_file, mode, options, frame, sampling) -> None:
    header = read_jpeg_header(image_file(picture(33, 47).convert(mode), **options))
    expected = {"height": 33, "width": 47, "frame": frame, "precision": 8, "sampling": sampling}
    assert header == JpegHeader(**expected, has_end=True, in_one_scan=frame == 0xC0, has_tables=True, is_plain=True)
    assert is_read_by_ffcv(header) == (mode != "CMYK")


def test_an_end_in_a_thumbnail_is_not_the_end(picture, image_file) -> None:
    """A file cut short whose Exif block holds a whole little JPEG."""
    data = image_file(picture())
    exif = b"\xff\xe1" + struct.pack(">H", 2 + len(data)) + data
    whole = data[:2] + exif + data[2:]
    assert read_jpeg_header(whole).has_end
    assert not read_jpeg_header(whole[:-2]).has_end
    assert not is_read_by_ffcv(read_jpeg_header(whole[:-2]))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"comment": b"c" * 900}])
@pytest.mark.parametrize("behind", [b"", b"junk behind the end"])
def test_the_header_of_the_ends_equals_that_of_the_file(behind: bytes, options, picture, image_file) -> None:
    whole = image_file(picture(40, 40), **options) + behind
    expected = read_jpeg_header(whole)
    told = 0
    for head in range(len(whole) + 1):
        for tail in (0, 2, 24):
            header = read_jpeg_header(whole[:head], whole[max(head, len(whole) - tail) :])
            assert header is None or header == expected or not header.has_end
            told += header is not None and header.has_end
    assert told > 100
    cut = whole[: -3 - len(behind)]
    assert not any(read_jpeg_header(cut[:head], cut[max(head, len(cut) - 9) :]) == expected for head in range(len(cut)))


def test_an_end_is_not_made_up_where_head_and_tail_meet() -> None:
    header = read_jpeg_header(MINIMAL[:-2] + b"\xff", b"\xd9" * 9)
    assert header is not None
    assert not header.has_end


@pytest.mark.parametrize(
    ("data", "readable"),
    [
        (MINIMAL, True),
        (MINIMAL.replace(b"\xff\xc0\x00", b"\xff\xff\xff\xc0\x00"), True),  # fill bytes
        (MINIMAL + b"junk", True),
        (MINIMAL.replace(b"\xff\xc0", b"\xff\xc1"), True),
        (MINIMAL.replace(b"\xff\xc0", b"\xff\xc3"), False),  # lossless
        (MINIMAL.replace(b"\xff\xc0", b"\xff\xc9"), False),  # arithmetic coding
        (MINIMAL.replace(b"\x00\x11\x08", b"\x00\x11\x0c"), False),  # 12 bits
        (MINIMAL.replace(b"\x00\x05\x00\x07", b"\x00\x00\x00\x07"), False),  # height told later (DNL)
        (MINIMAL.replace(b"\x01\x22\x00", b"\x01\x31\x00"), False),  # 4:1:0-like sampling
        (MINIMAL.replace(b"\x02\x11\x00", b"\x02\x21\x00"), False),
        # Tables that the decoder would take from another image, or another scan's
        (MINIMAL.replace(QUANTIZATION, b""), False),
        (MINIMAL.replace(DC, b""), False),
        (MINIMAL.replace(AC, b""), False),
        (MINIMAL.replace(SCAN, SCAN.replace(b"\x03\x00\x00\x3f", b"\x03\x10\x00\x3f")), False),
        (MINIMAL.replace(SCAN, SCAN.replace(b"\x03\x00\x00\x3f", b"\x03\x01\x00\x3f")), False),
        (MINIMAL.replace(FRAME, FRAME.replace(b"\x03\x11\x00", b"\x03\x11\x01")), False),
        (MINIMAL.replace(AC, b"") + AC, False),
        (MINIMAL.replace(SCAN, SCAN.replace(b"\x03\x01\x00\x02\x00\x03\x00", b"\x03\x01\x00\x02\x00\x02\x00")), False),
        (MINIMAL.replace(DC, b"\xff\xc4\x00\x15\x00\x02" + bytes(15) + b"\x00\x01"), False),  # all ones
        (MINIMAL.replace(DC, DC[:-1] + b"\x10"), False),  # a DC difference of 16 bits
        # What libjpeg warns of
        (MINIMAL.replace(SCAN, SCAN.replace(b"\x00\x3f\x00", b"\x00\x00\x00")), False),
        (MINIMAL.replace(FRAME, b"\xff\xe0\x00\x10JFIF\0\x01\x01\x00\0\x01\0\x01\0\0" + FRAME), True),
        (MINIMAL.replace(FRAME, b"\xff\xe0\x00\x10JFIF\0\x02\x01\x00\0\x01\0\x01\0\0" + FRAME), False),
        (MINIMAL.replace(FRAME, b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x01" + FRAME), True),
        (MINIMAL.replace(FRAME, b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x02" + FRAME), False),
    ],
)
def test_files_that_ffcv_reads(data: bytes, readable: bool) -> None:
    header = read_jpeg_header(data)
    assert header is not None
    assert is_read_by_ffcv(header) == readable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        MINIMAL[:10],
        b"\xff\xd8" + FRAME,  # no scan
        b"\xff\xd8" + SCAN + b"\xff\xd9",  # no frame
        b"\xff\xd8" + FRAME + FRAME + SCAN,
        b"\xff\xd8\xff\xd9" + FRAME + SCAN,
        b"\xff\xd8\xff\xe0\x00\x01" + FRAME + SCAN,  # a length that cannot be
        MINIMAL.replace(SCAN, b"\x00" + SCAN),
        MINIMAL.replace(SCAN, b"\xff\xf0\x00\x02" + SCAN),  # markers that libjpeg does not know
        MINIMAL.replace(SCAN, b"\xff\x02\x00\x02" + SCAN),
        MINIMAL.replace(SCAN, b"\xff\xdd\x00\x05\0\0\0" + SCAN),
        MINIMAL.replace(QUANTIZATION, QUANTIZATION.replace(b"\x43\x00", b"\x43\x04")),
        MINIMAL.replace(DC, DC.replace(b"\x14\x00", b"\x14\x04")),
        MINIMAL.replace(DC, DC.replace(b"\x14\x00", b"\x15\x00") + b"\0"),
        MINIMAL.replace(b"\x00\x11\x08", b"\x00\x12\x08"),
    ],
)
def test_a_file_that_is_not_a_jpeg_has_no_header(data: bytes) -> None:
    assert read_jpeg_header(data) is None


@pytest.mark.parametrize(
    "filler", [b"\xff\x00", b"\xff", b"\xff\xe0\x00\x02", b"\x00", b"\xff\xd0", DC, b"\xff\xc4\xff\xff" + bytes(65_533)]
)
@pytest.mark.parametrize("is_in_scan", [False, True])
def test_a_large_file_of_anything_is_read_in_no_time(filler: bytes, is_in_scan: bool) -> None:
    """Three million bytes: too many for a step in Python for each, or for a pattern that tries each twice."""
    at = MINIMAL.index(SCAN) + (len(SCAN) if is_in_scan else 0)
    data = MINIMAL[:at] + filler * (3_000_000 // len(filler)) + MINIMAL[at:]
    read_jpeg_header(data)
    read_odd_jpeg_header(data)
    plain(data)
    read_jpeg_header(data[:-8])


@given(st.binary(max_size=200), st.integers(0, len(MINIMAL)))
def test_any_bytes_are_parsed_without_error(noise: bytes, at: int) -> None:
    read_jpeg_header(noise)
    read_jpeg_header(b"\xff\xd8\xff" + noise)
    read_jpeg_header(MINIMAL[:at] + noise + MINIMAL[at:])
