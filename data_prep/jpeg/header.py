"""Reads a JPEG's markers, to tell which files the stock ffcv decoder reads correctly. No pixel is decoded.

ffcv ignores its decoder's return code and then trains on an earlier image's pixels, so only what is known to decode is
passed on untouched. Markers: ITU-T T.81, table B.1.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
RST0, RST7, TEM = 0xD0, 0xD7, 0x01
SOF_BASELINE, SOF_EXTENDED, SOF_PROGRESSIVE = 0xC0, 0xC1, 0xC2
MAX_DECODED_SIDE_PX = 65_500
"""libjpeg's JPEG_MAX_DIMENSION: it refuses the rest of what the format could be."""
END = bytes([0xFF, EOI])
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

LUMA_SAMPLING = frozenset({(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)})
"""Sampling factors of the first of three components that libturbojpeg knows by name (chroma 1x1)."""


class JpegHeader(NamedTuple):
    height: int
    width: int
    frame: int
    """The start-of-frame marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, ..."""
    precision: int
    """Bits per value."""
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) factors of each component."""
    has_end: bool
    """An end-of-image marker follows the scan. Without one the file was cut short."""


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def read_jpeg_header(data: bytes, tail: bytes = b"") -> JpegHeader | None:
    """None when `data` is not a JPEG, or its markers cannot be followed to the first scan.

    `data` may be a file's first bytes only, and `tail` its last: what is told of the file by them holds for the whole
    of it, but for a header that is not in `data`, and for an end that is in neither.
    """
    if not is_jpeg(data):
        return None
    frame: tuple[int, int] | None = None  # the marker, and where its segment begins
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (SOI, EOI, TEM) or RST0 <= marker <= RST7:
            return None
        length = data[at + 2] << 8 | data[at + 3]
        end = at + 2 + length
        if length < 2 or end > len(data):
            return None
        if marker in START_OF_FRAME:
            if frame is not None or not _is_frame(data, at + 4, length - 2):
                return None
            frame = marker, at + 4
        if marker == SOS:
            # Within a scan 0xFF is always stuffed, so an 0xFFD9 behind it is an end of image.
            return frame and _read_frame(data, *frame, has_end=END in tail or data.rfind(END, end) >= 0)
        at = end
    return None


def is_read_by_ffcv(header: JpegHeader) -> bool:
    """Whether the stock decoder (libjpeg-turbo through ffcv 1.0.2) gives this file's pixels as RGB."""
    return (
        header.frame in (SOF_BASELINE, SOF_EXTENDED, SOF_PROGRESSIVE)
        and header.precision == 8
        and 0 < header.height <= MAX_DECODED_SIDE_PX
        and 0 < header.width <= MAX_DECODED_SIDE_PX
        and header.has_end
        and _is_known_sampling(header.sampling)
    )


def _is_known_sampling(sampling: tuple[tuple[int, int], ...]) -> bool:
    if len(sampling) == 1:
        return True
    return len(sampling) == 3 and sampling[0] in LUMA_SAMPLING and sampling[1] == sampling[2] == (1, 1)


def _is_frame(data: bytes, start: int, num_bytes: int) -> bool:
    return num_bytes >= 6 and num_bytes == 6 + 3 * data[start + 5]


def _read_frame(data: bytes, marker: int, start: int, *, has_end: bool) -> JpegHeader:
    precision, height, width, num_components = struct.unpack_from(">BHHB", data, start)
    factors = data[start + 7 : start + 6 + 3 * num_components : 3]
    return JpegHeader(height, width, marker, precision, tuple((f >> 4, f & 15) for f in factors), has_end)
