"""`python -m data_prep.bench_planning --work DIR`: all but reading and writing, of as many files as ImageNet has.

Makes the empty files (in 1,000 folders, named as ImageNet's), lists them as `image-folder` does, plans, sends the
source to a worker, lays out a beton with sizes drawn from 20 to 200 kB, and cuts it into ranges.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np

from data_prep.beton.layout import STORED_ROW, lay_out
from data_prep.beton.ranges import cut, num_ranges
from data_prep.converter.plan import make_plan
from data_prep.converter.settings import ConvertSettings
from data_prep.sources import open_source
from data_prep.sources.splits import SplitRequest

IMAGENET_SAMPLES, NUM_CLASSES = 1_281_167, 1_000
PAGE_BYTES = 8 << 20


def make_files(root: Path, count: int) -> None:
    for label in range(NUM_CLASSES):
        folder = root / f"c{label:08d}"
        folder.mkdir(parents=True)
        for number in range(label, count, NUM_CLASSES):
            os.close(os.open(f"{folder}/c{label:08d}_{number}.JPEG", os.O_CREAT | os.O_WRONLY, 0o644))


def time_planning(root: Path) -> dict[str, tuple[float, float]]:
    """Seconds of each step: by the clock, and of CPU."""
    times = [_now()]
    source = open_source("image-folder", str(root), SplitRequest(None, explicit=False))
    times.append(_now())
    make_plan(len(source), source.describe(), ConvertSettings(), {})
    times.append(_now())
    pickle.loads(pickle.dumps(source, pickle.HIGHEST_PROTOCOL))
    times.append(_now())
    rows = np.zeros(len(source), dtype=STORED_ROW)
    rows["size"] = np.random.default_rng(0).integers(20_000, 200_000, len(source))
    beton = lay_out(rows, PAGE_BYTES)
    times.append(_now())
    for number in range(num_ranges(beton)):
        cut(beton, number)
    times.append(_now())
    steps = ("listing", "plan", "pickled and back", "layout", "cut into ranges")
    taken = np.diff(np.array(times), axis=0)
    return {step: (wall_s, cpu_s) for step, (wall_s, cpu_s) in zip(steps, taken.tolist(), strict=True)}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.bench_planning", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--files", type=int, default=IMAGENET_SAMPLES)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    try:
        make_files(arguments.work, arguments.files)
        times = time_planning(arguments.work)
    finally:
        shutil.rmtree(arguments.work)
    print(f"| {arguments.files:,} files, names and inodes in memory | s | CPU s |\n|---|---|---|")
    in_all = tuple(sum(values) for values in zip(*times.values(), strict=True))
    for name, (wall_s, cpu_s) in [*times.items(), ("in all", in_all)]:
        print(f"| {name} | {wall_s:.2f} | {cpu_s:.2f} |")


if __name__ == "__main__":
    main()
