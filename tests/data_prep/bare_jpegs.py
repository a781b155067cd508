"""Gray JPEGs of a few bytes that take much to decode."""

from __future__ import annotations

import struct


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def packed_zeros(num_bits: int) -> bytes:
    return bytes(num_bits // 8) + (bytes([(1 << -num_bits % 8) - 1]) if num_bits % 8 else b"")


ONES = segment(0xDB, b"\0" + b"\x01" * 64)
SHORT_DC, SHORT_AC = (segment(0xC4, kind + b"\x01" + bytes(15) + b"\x00") for kind in (b"\x00", b"\x10"))
"""Tables of one code of one bit: no difference, and nothing but zeros."""


def progressive(side: int, num_scans: int) -> bytes:
    """A gray square whose file is tiny, with `num_scans` scans of which all but the first say nothing."""
    data = packed_zeros((-(-side // 8)) ** 2)
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    dc, ac = (segment(0xDA, b"\x01\x01\x00" + selection) for selection in (b"\x00\x00\x00", b"\x01\x3f\x00"))
    rest = (SHORT_AC + ac + data) * (num_scans - 1)
    return b"\xff\xd8" + ONES + frame + SHORT_DC + dc + data + rest + b"\xff\xd9"


def in_scans(height: int, width: int, num_scans: int = 3) -> bytes:
    """A baseline file with a scan for each component, of which a decoder holds all coefficients; then some again."""
    frame = segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + b"\x01\x11\0\x02\x11\0\x03\x11\0")
    data = packed_zeros(2 * -(-width // 8) * -(-height // 8))
    scans = b"".join(segment(0xDA, bytes([1, k % 3 + 1, 0, 0, 63, 0])) + data for k in range(num_scans))
    return b"\xff\xd8" + ONES + frame + SHORT_DC + SHORT_AC + scans + b"\xff\xd9"
