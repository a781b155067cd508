"""`python -m resnet_dist.fuzz FOLDER --seconds N`: damaged copies of the JPEGs in a folder, and of synthetic ones.

For each it compares the verdicts and pixels of the check in C, libjpeg-turbo, `verify` and training's decoders, under
several crops. Exit code 1 when any two disagree; such files are kept in `--save`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np

from resnet_dist.fuzz.jpegs import KINDS, made_kinds, mutate
from resnet_dist.fuzz.verdicts import Judge


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m resnet_dist.fuzz", description=__doc__)
    parser.add_argument("folder", type=Path, help="of JPEGs, at any depth")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damage", choices=KINDS, action="append", help="only this one; can be repeated")
    parser.add_argument("--save", type=Path, help="folder for files about which decoders disagree")
    arguments = parser.parse_args()
    files = [path.read_bytes() for path in sorted(arguments.folder.rglob("*")) if path.is_file()]
    made = list(made_kinds(arguments.seed).values())
    draw, places = random.Random(arguments.seed), np.random.default_rng(arguments.seed)
    judge = Judge(before=made[0])
    counts: Counter[tuple[str, str]] = Counter()
    number, end = 0, time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        kind = draw.choice(arguments.damage or KINDS)
        data, other = (draw.choice(draw.choice((files, made)) if files else made) for _ in range(2))
        damaged = mutate(data, kind, draw, other)
        verdict = judge.verdict(damaged, places)
        counts[kind, "files"] += 1
        counts[kind, "sound"] += verdict.is_sound
        counts[kind, "kept"] += verdict.is_kept
        if verdict.disagreement is not None:
            counts[kind, "differ"] += 1
            print(f"{number}: {kind}: {verdict.disagreement}", flush=True)
            if arguments.save is not None:
                arguments.save.mkdir(parents=True, exist_ok=True)
                (arguments.save / f"{number}.jpg").write_bytes(damaged)
        number += 1
    print("| damage | files | libjpeg-turbo reads without a warning | stored as they are | decoders differ |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        if counts[kind, "files"]:
            print(
                f"| {kind} | " + " | ".join(f"{counts[kind, c]:,}" for c in ("files", "sound", "kept", "differ")) + " |"
            )
    return 1 if any(counts[kind, "differ"] for kind in KINDS) else 0


if __name__ == "__main__":
    raise SystemExit(main())
