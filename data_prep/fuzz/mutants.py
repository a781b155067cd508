"""Damaged copies of JPEGs."""

from __future__ import annotations

import random

KINDS = (
    "one bit",
    "some bits",
    "a byte",
    "a run of zeros",
    "cut short",
    "a piece missing",
    "a piece twice",
    "header",
    "a segment missing",
    "a segment twice",
    "bytes before a segment",
    "another's end",
)


def mutate(data: bytes, kind: str, draw: random.Random, other: bytes | None = None) -> bytes:
    """One damage of that kind, at a random place behind the first marker. `other`: whose end takes the place of its."""
    damaged = bytearray(data)
    at = draw.randrange(2, len(damaged))
    length = draw.choice((1, 2, 3, 8, 64, 1000))
    if kind == "one bit":
        damaged[at] ^= 1 << draw.randrange(8)
    elif kind == "some bits":
        for _ in range(draw.randrange(2, 9)):
            damaged[draw.randrange(2, len(damaged))] ^= 1 << draw.randrange(8)
    elif kind == "a byte":
        damaged[at] = draw.choice((0, 255, 0xD9, draw.randrange(256)))
    elif kind == "a run of zeros":
        damaged[at : at + length] = bytes(len(damaged[at : at + length]))
    elif kind == "cut short":
        del damaged[at:]
        damaged += draw.choice((b"", b"\xff\xd9"))
    elif kind == "a piece missing":
        del damaged[at : at + length]
    elif kind == "a piece twice":
        damaged[at:at] = damaged[at : at + length]
    elif kind == "header":
        end = min(data.find(b"\xff\xda") + 14, len(data) - 1)
        damaged[draw.randrange(2, max(3, end))] = draw.randrange(256)
    elif kind == "another's end":
        end_of = data if other is None else other
        damaged[at:] = end_of[draw.randrange(2, len(end_of)) :]
    else:
        _change_segment(damaged, kind, draw)
    return bytes(damaged)


def _change_segment(damaged: bytearray, kind: str, draw: random.Random) -> None:
    segments, at = [], 2
    while at + 4 <= len(damaged) and damaged[at] == 0xFF:
        end = at + 2 + (damaged[at + 2] << 8 | damaged[at + 3])
        segments.append((at, end))
        if damaged[at + 1] == 0xDA:
            break
        at = end
    at, end = draw.choice(segments or [(2, 2)])
    if kind == "a segment missing":
        del damaged[at:end]
    elif kind == "a segment twice":
        damaged[at:at] = damaged[at:end]
    else:
        damaged[at:at] = draw.choice((b"\0", b"\0\0\0", b"\xff", b"\xff\0", b"abc", b"\xff\xd0", b"\x12\xff\xff"))
