"""Small sound JPEGs of kinds that few encoders write, made from coefficients; and damaged copies of any JPEG."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

Factors = tuple[int, int]
Block = list[int]
"""64 coefficients, in the order in which they are coded."""

SIXTEEN_ZEROS, END_OF_BLOCK = 0xF0, 0x00


class Scan(NamedTuple):
    components: tuple[int, ...]
    first: int = 0
    last: int = 63


def made_kinds(seed: int = 0) -> Mapping[str, bytes]:
    """One sound JPEG of each kind, by name."""
    draw = random.Random(seed)
    gray, three = Scan((0,)), Scan((0, 1, 2))
    by_component = [Scan((0,)), Scan((1,)), Scan((2,))]
    in_bands = [Scan((0, 1, 2), 0, 0), *(Scan((k,), *band) for k in range(3) for band in ((1, 5), (6, 63)))]
    usual = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:4:0": (1, 2), "4:2:0": (2, 2), "4:1:1": (4, 1)}
    odd = {
        "4:1:0": ((4, 2), (1, 1), (1, 1)),
        "3x1": ((3, 1), (1, 1), (1, 1)),
        "1x4": ((1, 4), (1, 1), (1, 1)),
        "chroma finer": ((1, 1), (2, 2), (2, 2)),
        "chroma unequal": ((2, 2), (2, 1), (1, 2)),
        "all twice": ((2, 2), (2, 1), (2, 1)),
    }
    kinds = {"gray": _jpeg(draw, [(1, 1)], [gray]), "gray 2x2": _jpeg(draw, [(2, 2)], [gray])}
    kinds["gray 2x2 progressive"] = _jpeg(draw, [(2, 2)], [Scan((0,), 0, 0), Scan((0,), 1, 63)], is_progressive=True)
    for name, luma in usual.items():
        factors = [luma, (1, 1), (1, 1)]
        kinds |= {
            name: _jpeg(draw, factors, [three]),
            f"{name}, restarts": _jpeg(draw, factors, [three], restart_interval=3),
            f"{name}, a scan for each": _jpeg(draw, factors, by_component),
            f"{name}, one and three": _jpeg(draw, factors, [Scan((1,)), three]),
            f"{name}, two and one": _jpeg(draw, factors, [Scan((0, 2)), Scan((1,))], restart_interval=5),
            f"{name}, progressive": _jpeg(draw, factors, in_bands, is_progressive=True),
            f"{name}, progressive and incomplete": _jpeg(draw, factors, in_bands[:3], is_progressive=True),
            f"{name}, only DC": _jpeg(draw, factors, in_bands[:1], is_progressive=True),
            f"{name}, a component missing": _jpeg(draw, factors, by_component[:2]),
        }
    # libjpeg takes another path while much of the file is left
    kinds |= {f"{name}, much behind": kinds[name] + bytes(8192) for name in ("gray", "4:4:4", "4:2:0")}
    runs_over = _jpeg(draw, [(2, 2), (1, 1), (1, 1)], [three], runs_over=True)
    kinds |= {"runs past the last coefficient": runs_over, "the same, much behind": runs_over + bytes(8192)}
    for name, sampling in odd.items():
        kinds[name] = _jpeg(draw, sampling, [three])
        kinds[f"{name}, progressive"] = _jpeg(draw, sampling, in_bands, is_progressive=True)
    return kinds


def _jpeg(
    draw: random.Random,
    sampling: Sequence[Factors],
    scans: Sequence[Scan],
    *,
    is_progressive: bool = False,
    restart_interval: int = 0,
    runs_over: bool = False,
) -> bytes:
    height, width = draw.randrange(33, 90), draw.randrange(33, 90)
    most = tuple(max(factors[side] for factors in sampling) for side in (0, 1))
    components = []
    for across, down in sampling:
        columns = -(-width // (8 * most[0])) * across
        rows = -(-height // (8 * most[1])) * down
        components.append([[_block(draw) for _ in range(columns)] for _ in range(rows)])
    frame = struct.pack(">BHHB", 8, height, width, len(sampling))
    frame += b"".join(bytes([k + 1, across << 4 | down, 0]) for k, (across, down) in enumerate(sampling))
    parts = [
        b"\xff\xd8",
        _segment(0xDB, b"\0" + bytes(3 + k // 3 for k in range(64))),
        _segment(0xC2 if is_progressive else 0xC0, frame),
        _segment(0xC4, bytes([0x00, *[0] * 3, len(DC_SYMBOLS), *[0] * 12, *DC_SYMBOLS])),
        _segment(0xC4, bytes([0x10, *[0] * 7, len(AC_SYMBOLS), *[0] * 8, *AC_SYMBOLS])),
    ]
    if restart_interval:
        parts.append(_segment(0xDD, struct.pack(">H", restart_interval)))
    for scan in scans:
        header = bytes([len(scan.components)]) + b"".join(bytes([k + 1, 0]) for k in scan.components)
        parts.append(_segment(0xDA, header + bytes([scan.first, scan.last, 0])))
        parts.append(_coded(components, sampling, most, (height, width), scan, restart_interval, runs_over))
    return b"".join(parts) + b"\xff\xd9"


def _block(draw: random.Random) -> Block:
    block = [draw.randrange(-60, 60)] + [0] * 63
    for _ in range(draw.choice((0, 1, 3, 8, 63))):
        size = draw.choice((1, 1, 1, 2, 3, 5))
        block[draw.randrange(1, 64)] = draw.randrange(-(1 << size) + 1, 1 << size)
    return block


DC_SYMBOLS = tuple(range(12))
AC_SYMBOLS = (END_OF_BLOCK, SIXTEEN_ZEROS, *(run << 4 | size for run in range(16) for size in range(1, 11)))
"""Codes of 4 and of 8 bits, so that some are unused: a changed bit may lead to an invalid one."""


def _coded(
    components: Sequence[list[list[Block]]],
    sampling: Sequence[Factors],
    most: tuple[int, ...],
    sides: tuple[int, int],
    scan: Scan,
    restart_interval: int,
    runs_over: bool,
) -> bytes:
    parts, bits, last_dc = [], "", dict.fromkeys(scan.components, 0)
    for number, mcu in enumerate(_mcus(components, sampling, most, sides, scan)):
        if restart_interval and number and number % restart_interval == 0:
            parts += [_packed(bits), bytes([0xFF, 0xD0 | (number // restart_interval - 1) % 8])]
            bits, last_dc = "", dict.fromkeys(scan.components, 0)
        for component, block in mcu:
            if scan.first == 0:
                difference = block[0] - last_dc[component]
                last_dc[component] = block[0]
                bits += f"{DC_SYMBOLS.index(_size(difference)):04b}" + _value(difference)
            if scan.last > 0:
                bits += _coded_ac(block, max(scan.first, 1), scan.last, runs_over)
    return b"".join(parts) + _packed(bits)


def _coded_ac(block: Block, first: int, last: int, runs_over: bool) -> str:
    """`runs_over`: codes the zeros at the end as a run that is too long, followed by a value."""
    bits, run = "", 0
    for value in block[first : last + 1]:
        if value == 0:
            run += 1
            continue
        bits += f"{AC_SYMBOLS.index(SIXTEEN_ZEROS):08b}" * (run // 16)
        bits += f"{AC_SYMBOLS.index((run % 16) << 4 | _size(value)):08b}" + _value(value)
        run = 0
    if run and runs_over:
        return bits + f"{AC_SYMBOLS.index(15 << 4 | 2):08b}11" * -(-run // 16)
    return bits + (f"{AC_SYMBOLS.index(END_OF_BLOCK):08b}" if run else "")


def _mcus(
    components: Sequence[list[list[Block]]],
    sampling: Sequence[Factors],
    most: tuple[int, ...],
    sides: tuple[int, int],
    scan: Scan,
) -> Iterator[list[tuple[int, Block]]]:
    """The blocks that are coded together. A scan of one component leaves out those that are only padding."""
    height, width = sides
    if len(scan.components) == 1:
        (k,) = scan.components
        across, down = sampling[k]
        for row in range(-(-height * down // (8 * most[1]))):
            for column in range(-(-width * across // (8 * most[0]))):
                yield [(k, components[k][row][column])]
        return
    for row in range(-(-height // (8 * most[1]))):
        for column in range(-(-width // (8 * most[0]))):
            yield [
                (k, components[k][row * down + y][column * across + x])
                for k in scan.components
                for across, down in [sampling[k]]
                for y in range(down)
                for x in range(across)
            ]


def _size(value: int) -> int:
    return abs(value).bit_length()


def _value(value: int) -> str:
    size = _size(value)
    return f"{value if value > 0 else value + (1 << size) - 1:0{size}b}" if size else ""


def _packed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


# --- damaged copies ---------------------------------------------------------------------------------------------------


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
    """Damages a JPEG in that way, at a random position after the first marker. `other`: for `another's end`."""
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
