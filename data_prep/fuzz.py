"""Damaged copies of JPEGs, and what the two checks say of them.

`python -m data_prep.fuzz FOLDER --count N` counts over real files.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

from data_prep.jpeg import native_check, turbojpeg

KINDS = ("one bit", "some bits", "a byte", "a run of zeros", "cut short", "a piece missing", "a piece twice", "header")


def mutate(data: bytes, kind: str, draw: random.Random) -> bytes:
    """One damage of that kind, at a random place behind the first marker."""
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
    else:
        end = min(data.find(b"\xff\xda") + 14, len(data) - 1)
        damaged[draw.randrange(2, max(3, end))] = draw.randrange(256)
    return bytes(damaged)


def is_read_without_a_warning(data: bytes) -> bool:
    try:
        turbojpeg.check(data)
    except (turbojpeg.Damaged, turbojpeg.Unreadable):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.fuzz", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.folder.rglob("*") if path.is_file())
    draw = random.Random(arguments.seed)
    counts: Counter[tuple[str, bool, bool]] = Counter()
    for number in range(arguments.count):
        kind = KINDS[number % len(KINDS)]
        data = mutate(files[draw.randrange(len(files))].read_bytes(), kind, draw)
        counts[kind, native_check.are_sound([data])[0], is_read_without_a_warning(data)] += 1
    print("| damage | files | libjpeg-turbo refuses | and the native check calls sound | only libjpeg-turbo accepts |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        of_kind = {key[1:]: count for key, count in counts.items() if key[0] == kind}
        refused = sum(count for (_, is_fine), count in of_kind.items() if not is_fine)
        cells = (sum(of_kind.values()), refused, of_kind.get((True, False), 0), of_kind.get((False, True), 0))
        print(f"| {kind} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
