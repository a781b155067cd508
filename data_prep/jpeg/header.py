"""Reads a JPEG's markers, to tell which files the stock ffcv decoder reads correctly. No pixel is decoded.

ffcv ignores its decoder's return code and then trains on an earlier image's pixels, so only what is known to decode is
passed on untouched. Markers: ITU-T T.81, table B.1.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.pixels import LIMITS

SOI, EOI, SOS, DQT, DHT, DAC, DNL, DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xCC, 0xDC, 0xDD
APP0, APP14, APP15, COM = 0xE0, 0xEE, 0xEF, 0xFE
RST0, RST7, TEM = 0xD0, 0xD7, 0x01
SOF_BASELINE, SOF_EXTENDED, SOF_PROGRESSIVE, SOF_ARITHMETIC, SOF_ARITHMETIC_PROGRESSIVE = 0xC0, 0xC1, 0xC2, 0xC9, 0xCA
END = bytes([0xFF, EOI])
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, DAC}
PROGRESSIVE = frozenset({SOF_PROGRESSIVE, SOF_ARITHMETIC_PROGRESSIVE})
ARITHMETIC = frozenset({SOF_ARITHMETIC, SOF_ARITHMETIC_PROGRESSIVE})
LIBJPEG_FRAMES = frozenset({SOF_BASELINE, SOF_EXTENDED, SOF_PROGRESSIVE}) | ARITHMETIC
WITHOUT_LENGTH = frozenset({SOI, EOI, TEM, *range(RST0, RST7 + 1)})
STEPPED_OVER = frozenset({DAC, DNL, COM, *range(APP0, APP15 + 1)})
"""Segments that are skipped here; by libjpeg too, except the application segments and arithmetic coding it knows."""

LUMA_SAMPLING = frozenset({(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)})
"""Sampling factors of the first of three components that libturbojpeg knows by name (chroma 1x1)."""

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""In a scan's data 0xFF is followed by 0, or by a restart code."""
MOST_SEGMENTS = 50_000
"""A segment has up to 65,535 bytes, and a sample at most 256 MiB."""
JFIF, JFIF_BYTES, ADOBE, ADOBE_BYTES = b"JFIF\0", 14, b"Adobe", 12
ALL_OF_A_BLOCK = (0, 63, 0)
"""The selection of coefficients at the end of a sequential scan's header: there is nothing to select."""
MOST_BITS_LEFT = 13
"""Bits of each coefficient that a progressive file's first scan may leave to the later ones."""
MOST_TABLES = 64
"""In one segment; there can be eight of Huffman codes and four of quantization."""
_BLOCK_BYTES = 128
"""Bytes of the coefficients of 8 x 8 values."""


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
    in_one_scan: bool
    """All components are in the first scan, and whole: it is decoded row by row."""
    has_tables: bool
    """The file contains the tables for decoding it; for a progressive file, those of the first scan.

    Where one is missing, a decoder uses an earlier image's, or the standard's, or refuses the file.
    """
    is_plain: bool
    """libjpeg warns of nothing before the first scan's data: see `plain`."""


_Segment = tuple[int, int, bool, int, int, int]
"""(marker, start, is_clean, length_at, body, end): `start` is the end of the segment before it, or of that one's scan;
`is_clean`: between `start` and the marker there is nothing but fill bytes of 255.

A plain tuple for speed: these are made for every image.
"""


def is_jpeg(data: bytes) -> bool:
    return data[:2] == b"\xff\xd8"


def read_jpeg_header(data: bytes, tail: bytes = b"") -> JpegHeader | None:
    """None when `data` is not a JPEG, or its markers cannot be followed to the first scan without skipping bytes.

    `data` may be only a file's first bytes, and `tail` its last. The result is then that of the complete file, except
    for a header that is not in `data`, and an end or tables of later scans that are in neither.
    """
    return _read(data, tail, is_strict=True) if is_jpeg(data) else None


def read_odd_jpeg_header(data: bytes) -> JpegHeader | None:
    """As `read_jpeg_header`, of a whole file; bytes between segments are skipped, as libjpeg does."""
    return _read(data, b"", is_strict=False) if is_jpeg(data) else None


def is_read_by_ffcv(header: JpegHeader) -> bool:
    """Whether the stock decoder (libjpeg-turbo through ffcv 1.0.2) gives this file's pixels as RGB, if it is sound.

    And training's own, within its limit on memory. The stock decoder keeps the tables of earlier images; everything
    else is forgotten at the next image's first marker.
    """
    return (
        header.frame in (SOF_BASELINE, SOF_EXTENDED, SOF_PROGRESSIVE)
        and header.precision == 8
        and 0 < header.height <= LIMITS.side
        and 0 < header.width <= LIMITS.side
        and header.has_end
        and header.has_tables
        and header.is_plain
        and coefficient_bytes(header) <= LIMITS.coefficient_bytes
        and _is_known_sampling(header.sampling)
    )


def coefficient_bytes(header: JpegHeader) -> int:
    """Bytes of coefficients that a decoder holds at once, besides some rows."""
    if header.in_one_scan or not header.sampling:
        return 0
    most_across, most_down = (max(1, *factors) for factors in zip(*header.sampling, strict=True))
    blocks = 0
    for across, down in header.sampling:
        columns = _round_up(-(-header.width * across // (8 * most_across)), max(across, 1))
        blocks += columns * _round_up(-(-header.height * down // (8 * most_down)), max(down, 1))
    return _BLOCK_BYTES * blocks


def why_too_large(data: bytes, header: JpegHeader) -> str | None:
    """Why a decoder of the file `data` would need too much memory or too many passes; None: it would not."""
    held = coefficient_bytes(header)
    if held > LIMITS.coefficient_bytes:
        return (
            f"{header.width} x {header.height} px in several scans are {held >> 20:,} MiB of coefficients at once, "
            f"more than {LIMITS.coefficient_bytes >> 20}"
        )
    scans = 0 if header.in_one_scan else data.count(bytes([0xFF, SOS]))
    if scans * header.width * header.height > LIMITS.scan_pixels:
        return f"{scans} scans of {header.width} x {header.height} px"
    return None


def plain(data: bytes) -> bytes:
    """The same picture without anything that libjpeg warns about and no pixel depends on.

    Bytes between segments; a version of JFIF that it does not know; Adobe's code of a colour transform that it does not
    know, for the one that it takes instead; a spectral selection in a scan that has none. A scan's data stay as they
    are, and so does all from the first segment on that is incomplete.
    """
    segments = list(_segments(data))
    num_components = next((data[segment[4] + 5] for segment in segments if _is_frame(data, segment)), 0)
    parts, behind, is_sequential = [data[:2]], 2, False
    for marker, start, _, length_at, body, end in segments:
        content = bytearray(data[body:end])
        if marker in START_OF_FRAME:
            is_sequential = marker in LIBJPEG_FRAMES - PROGRESSIVE
        elif marker == APP0 and len(content) >= JFIF_BYTES and content.startswith(JFIF):
            content[5] = 1
        elif marker == APP14 and len(content) >= ADOBE_BYTES and content.startswith(ADOBE):
            content[11] = _known_transform(content[11], num_components)
        elif marker == SOS and is_sequential and len(content) >= 6:
            content[-3:] = bytes(ALL_OF_A_BLOCK)
        parts += [data[behind:start], bytes([0xFF, marker]), data[length_at:body], bytes(content)]
        behind = end
    return b"".join(parts) + data[behind:]


def _known_transform(transform: int, num_components: int) -> int:
    known, otherwise = {3: ((0, 1), 1), 4: ((0, 2), 2)}.get(num_components, ((transform,), transform))
    return transform if transform in known else otherwise


def _is_known_sampling(sampling: tuple[tuple[int, int], ...]) -> bool:
    if len(sampling) == 1:
        return 1 <= sampling[0][0] <= 4 and 1 <= sampling[0][1] <= 4
    return len(sampling) == 3 and sampling[0] in LUMA_SAMPLING and sampling[1] == sampling[2] == (1, 1)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _read(data: bytes, tail: bytes, *, is_strict: bool) -> JpegHeader | None:
    frame: _Segment | None = None
    header: JpegHeader | None = None
    tables: set[tuple[int, int]] = set()
    applications: list[_Segment] = []
    is_clean = True
    for segment in _segments(data):
        marker = segment[0]
        is_clean = is_clean and segment[2]
        if header is not None:
            if marker == EOI:
                return header
        elif marker in WITHOUT_LENGTH:
            if is_strict or marker in (SOI, EOI):
                return None
        elif is_strict and not is_clean:
            return None
        if marker in (DQT, DHT):
            if not _define(data, segment, tables):
                return None
        elif marker in (APP0, APP14):
            applications.append(segment)
        elif marker in START_OF_FRAME:
            if frame is not None or not _is_frame(data, segment):
                return None
            frame = segment
        elif marker == SOS:
            if frame is None:
                return None
            has_tables = _has_tables(data, frame, segment, tables)
            is_plain = is_clean and _is_plain(data, frame, segment, applications)
            if header is None:
                has_end = END in tail or data.rfind(END, segment[5]) >= 0
                header = _header(data, frame, segment, has_end, has_tables, is_plain)
            else:  # the first scan has shown how the file is decoded
                header = header._replace(has_tables=has_tables, is_plain=header.is_plain and is_plain)
            if not has_tables or header.in_one_scan or header.frame in PROGRESSIVE:
                return header
        elif marker == DRI:
            if segment[5] - segment[4] != 2:
                return None
        elif marker not in STEPPED_OVER and marker not in WITHOUT_LENGTH:
            return None  # libjpeg does not know the marker, or warns about it
    return header and header._replace(has_tables=False)  # not all scans of it are in `data`


def _segments(data: bytes) -> Iterator[_Segment]:
    """A JPEG's segments as libjpeg finds them, up to the end of the image, to one that is incomplete, or too many."""
    at, size = 2, len(data)
    for _ in range(MOST_SEGMENTS):
        start = at
        found = _MARKER.search(data, at)
        if found is None:
            return
        is_clean = found.start() == start or not data[start : found.start()].strip(b"\xff")
        marker, at = data[found.end() - 1], found.end()
        body = end = at
        if marker not in WITHOUT_LENGTH:
            if at + 2 > size:
                return
            body, end = at + 2, at + (data[at] << 8 | data[at + 1])
            if end < body or end > size:
                return
        yield marker, start, is_clean, at, body, end
        if marker == EOI:
            return
        at = end
        if marker == SOS:
            behind = _BEHIND_SCAN.search(data, end)
            if behind is None:
                return
            at = behind.start()


def _has_tables(data: bytes, frame: _Segment, scan: _Segment, defined: set[tuple[int, int]]) -> bool:
    """Whether the scan's tables are among those that were defined before it."""
    (*_, frame_at, frame_end), (*_, at, end) = frame, scan
    if end - at < 4 or end - at != 4 + 2 * data[at]:
        return False
    is_progressive, is_arithmetic = frame[0] in PROGRESSIVE, frame[0] in ARITHMETIC
    has_dc = not is_progressive or (data[end - 3] == 0 and data[end - 1] >> 4 == 0)
    has_ac = not is_progressive or data[end - 3] > 0
    components = data[frame_at + 6 : frame_end]
    places = [components[::3].find(data[k : k + 1]) for k in range(at + 1, end - 3, 2)]
    if -1 in places or len(set(places)) < len(places):
        return False
    for place, numbers in zip(places, data[at + 2 : end - 3 : 2], strict=True):
        if (DQT, components[3 * place + 2]) not in defined:
            return False
        if is_arithmetic:
            continue
        if (has_dc and (DHT, numbers >> 4) not in defined) or (has_ac and (DHT, 0x10 | numbers & 15) not in defined):
            return False
    return True


def _define(data: bytes, segment: _Segment, defined: set[tuple[int, int]]) -> bool:
    """Adds (marker, number) of each table to `defined`; a Huffman table's number is class << 4 | id, class 1 being AC.

    False for a segment that libjpeg refuses. It refuses an invalid table only where a scan uses it.
    """
    marker, *_, at, end = segment
    for _ in range(MOST_TABLES):
        if at >= end:
            return at == end
        first = data[at]
        if first & 15 > 3 or (marker == DHT and first >> 4 > 1):
            return False
        if marker == DQT:
            defined.add((marker, first & 15))
            at += 129 if first >> 4 else 65
            continue
        counts = data[at + 1 : at + 17]
        symbols = data[at + 17 : at + 17 + sum(counts)]
        at += 17 + sum(counts)
        if at > end or len(symbols) > 256:
            return False
        is_code = _is_code(counts) and (first >= 0x10 or max(symbols, default=0) <= 15)
        (defined.add if is_code else defined.discard)((marker, first))
    return False


def _is_code(counts: bytes) -> bool:
    """Whether so many codes of 1, 2, ... bits can be distinct, with none all ones."""
    code, longest = 0, max((bits for bits, count in enumerate(counts, 1) if count), default=0)
    for bits, count in enumerate(counts[:longest], 1):
        code += count
        if count and code >= 1 << bits:
            return False
        code <<= 1
    return True


def _is_plain(data: bytes, frame: _Segment, scan: _Segment, applications: list[_Segment]) -> bool:
    has_jfif, transform = False, 0
    for marker, *_, at, end in applications:
        if marker == APP0 and end - at >= JFIF_BYTES and data.startswith(JFIF, at):
            has_jfif = True
            if data[at + 5] != 1:
                return False
        elif marker == APP14 and end - at >= ADOBE_BYTES and data.startswith(ADOBE, at):
            transform = data[at + 11]
    num_components = data[frame[4] + 5]
    if not (has_jfif and num_components == 3) and transform != _known_transform(transform, num_components):
        return False
    return _is_plain_selection(data, frame, scan)


def _is_plain_selection(data: bytes, frame: _Segment, scan: _Segment) -> bool:
    """Whether the scan selects the only coefficients that it can: a progressive file's first scan, or any sequential
    one."""
    first, last, approximation = data[scan[5] - 3 : scan[5]]
    if frame[0] in PROGRESSIVE:
        return first == last == 0 and approximation <= MOST_BITS_LEFT
    return (first, last, approximation) == ALL_OF_A_BLOCK


def _is_frame(data: bytes, segment: _Segment) -> bool:
    marker, *_, at, end = segment
    return marker in START_OF_FRAME and end - at >= 6 and end - at == 6 + 3 * data[at + 5]


def _header(
    data: bytes, frame: _Segment, scan: _Segment, has_end: bool, has_tables: bool, is_plain: bool
) -> JpegHeader:
    marker, *_, at, end = frame
    precision, height, width = struct.unpack_from(">BHH", data, at)
    sampling = tuple((factors >> 4, factors & 15) for factors in data[at + 7 : end : 3])
    in_one_scan = marker not in PROGRESSIVE and data[scan[4] : scan[4] + 1] == data[at + 5 : at + 6]
    return JpegHeader(height, width, marker, precision, sampling, has_end, in_one_scan, has_tables, is_plain)
