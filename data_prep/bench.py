"""`python -m data_prep.bench IMAGES --work DIR`: conversion against stock ffcv's DatasetWriter and `cp -r`, paired.

All read the same tree with the same number of processes, in another random order each round, and are timed until their
bytes are on the disk (ours fsyncs, `sync -f` follows the others). Ours includes the listing. Imports and the start of
Ray and of ffcv's process are left out. Only ratios carry over to other machines; on a busy machine only those of CPU
times.

`--planning` times listing, planning, sending the source to a worker, laying out a beton with sizes drawn from 20 to
200 kB, and cutting it into ranges, for as many empty files as ImageNet has.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.beton.files import BETON
from data_prep.beton.layout import DEFAULT_PAGE_BYTES, STORED_ROW, lay_out
from data_prep.beton.ranges import cut, num_ranges
from data_prep.converter.context import Pool, Progress, ThisProcess
from data_prep.converter.convert import convert
from data_prep.converter.plan import make_plan
from data_prep.converter.settings import ConvertSettings
from data_prep.pixels import LIMITS
from data_prep.runtime.stop import StopFlag
from data_prep.sources import open_source
from data_prep.sources.splits import SplitRequest

NUM_CLASSES = 10
IMAGENET_SAMPLES, IMAGENET_CLASSES = 1_281_167, 1_000
MAX_SIDE_PX = 500
QUALITY = 90

STOCK = """
import multiprocessing, resource, subprocess, sys, time
from pathlib import Path
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

tree, output, workers, max_side = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) or None
files = [(f, label) for label, d in enumerate(sorted(Path(tree).iterdir())) for f in sorted(d.iterdir())]

class Tree:
    def __len__(self):
        return len(files)
    def __getitem__(self, index):
        return Image.open(files[index][0]).convert("RGB"), files[index][1]

image = RGBImageField(write_mode="jpg", max_resolution=max_side, jpeg_quality=%d)
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
start, cpu_start = time.perf_counter(), cpu()
DatasetWriter(output, {"image": image, "label": IntField()}, num_workers=workers).from_indexed_dataset(Tree())
for worker in multiprocessing.active_children():
    worker.join()
subprocess.run(["sync", "-f", output], check=True)
print(time.perf_counter() - start, cpu() - cpu_start)
"""


def make_tree(images: Path, tree: Path, num_files: int) -> int:
    """Copies of the images in `NUM_CLASSES` folders. Returns their bytes."""
    files = sorted(path for path in images.rglob("*") if path.is_file())
    total_bytes = 0
    for number in range(num_files):
        folder = tree / f"class-{number % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        data = files[number % len(files)].read_bytes()
        (folder / f"{number:06d}.JPEG").write_bytes(data)
        total_bytes += len(data)
    return total_bytes


class Taken(NamedTuple):
    wall_s: float
    cpu_s: float
    """CPU time of all processes. NaN for ours on Ray, whose workers are not this process's children."""


def time_ours(tree: Path, output: Path, pool: Pool, settings: ConvertSettings) -> Taken:
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    source = open_source("image-folder", str(tree), SplitRequest(None, explicit=False))
    convert(source, output, settings=settings, workers=pool)
    cpu_s = time.process_time() - cpu_start_s
    return Taken(time.perf_counter() - start_s, cpu_s if isinstance(pool, ThisProcess) else float("nan"))


def time_stock(tree: Path, output: Path, workers: int, max_side: int) -> Taken:
    command = [sys.executable, "-c", STOCK % QUALITY, str(tree), str(output), str(workers), str(max_side)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    wall_s, cpu_s = printed.split()[-2:]
    return Taken(float(wall_s), float(cpu_s))


def time_copy(tree: Path, output: Path) -> Taken:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start_s = time.perf_counter()
    subprocess.run(["cp", "-r", str(tree), str(output)], check=True)
    subprocess.run(["sync", "-f", str(output)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Taken(time.perf_counter() - start_s, sum(after[:2]) - sum(before[:2]))


def forget(tree: Path) -> None:
    """Drops the files' bytes from the page cache; names and inodes stay."""
    os.sync()
    for path in tree.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def peak_memory(tree: Path, output: Path, *options: str) -> float:
    """Peak memory of a conversion in a process of its own, MiB; the largest of all calls so far."""
    command = [sys.executable, "-m", "data_prep", "convert", "--source", "image-folder", "--input", str(tree)]
    subprocess.run([*command, "--output", str(output), "--workers", "0", *options], check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def make_large(tree: Path) -> None:
    """One image as large as is decoded at all, stored as PNG so that it is encoded again."""
    from PIL import Image

    side = int(LIMITS.pixels**0.5)
    (tree / "large").mkdir(parents=True)
    row = np.arange(side, dtype=np.uint8)
    Image.fromarray(np.broadcast_to(row[None, :, None], (side, side, 3)).copy()).save(
        tree / "large" / "a.png", compress_level=1
    )


def make_empty_files(root: Path, count: int) -> None:
    for label in range(IMAGENET_CLASSES):
        folder = root / f"c{label:08d}"
        folder.mkdir(parents=True)
        for number in range(label, count, IMAGENET_CLASSES):
            os.close(os.open(f"{folder}/c{label:08d}_{number}.JPEG", os.O_CREAT | os.O_WRONLY, 0o644))


def time_planning(root: Path) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each step."""
    times = [_now()]
    source = open_source("image-folder", str(root), SplitRequest(None, explicit=False))
    times.append(_now())
    make_plan(len(source), source.description, ConvertSettings(), {})
    times.append(_now())
    pickle.loads(pickle.dumps(source, pickle.HIGHEST_PROTOCOL))
    times.append(_now())
    rows = np.zeros(len(source), dtype=STORED_ROW)
    rows["size"] = np.random.default_rng(0).integers(20_000, 200_000, len(source))
    beton = lay_out(rows, DEFAULT_PAGE_BYTES)
    times.append(_now())
    for number in range(num_ranges(beton)):
        cut(beton, number)
    times.append(_now())
    steps = ("listing", "plan", "pickled and back", "layout", "cut into ranges")
    taken = np.diff(np.array(times), axis=0)
    return {step: (wall_s, cpu_s) for step, (wall_s, cpu_s) in zip(steps, taken.tolist(), strict=True)}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def bench_planning(arguments: argparse.Namespace) -> None:
    make_empty_files(arguments.work, arguments.files)
    times = time_planning(arguments.work)
    print(f"| {arguments.files:,} files, names and inodes in memory | s | CPU s |\n|---|---|---|")
    in_all = tuple(sum(values) for values in zip(*times.values(), strict=True))
    for name, (wall_s, cpu_s) in [*times.items(), ("in all", in_all)]:
        print(f"| {name} | {wall_s:.2f} | {cpu_s:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.bench", description=__doc__)
    parser.add_argument("images", type=Path, nargs="?", help="a folder of JPEGs; copied until there are --files")
    parser.add_argument("--planning", action="store_true", help="all but reading and writing, without images")
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure; made and removed")
    parser.add_argument("--files", type=int, help=f"default: 3000; with --planning {IMAGENET_SAMPLES}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows of the table; cp -r and stock must be in")
    parser.add_argument("--cold", action="store_true", help="take the files out of the page cache before each")
    arguments = parser.parse_args()
    if arguments.images is None and not arguments.planning:
        parser.error("give a folder of JPEGs, or --planning")
    arguments.files = arguments.files or (IMAGENET_SAMPLES if arguments.planning else 3000)
    arguments.work.mkdir(parents=True)
    try:
        bench_planning(arguments) if arguments.planning else run(arguments)
    finally:
        shutil.rmtree(arguments.work)


def run(arguments: argparse.Namespace) -> None:
    import ray

    from data_prep.converter.ray_pool import RayPool

    tree, workers = arguments.work / "tree", arguments.workers
    total_bytes = make_tree(arguments.images, tree, arguments.files)
    make_large(arguments.work / "large")
    memory = {
        "original": peak_memory(tree, arguments.work / "a.beton"),
        "jpeg": peak_memory(tree, arguments.work / "b.beton", "--encode", "jpeg"),
        "one image of 36 million px": peak_memory(arguments.work / "large", arguments.work / "c.beton"),
    }
    shutil.rmtree(arguments.work / "large")
    for path in arguments.work.glob("*.*"):
        path.unlink()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=max(workers, 1), include_dashboard=False, log_to_driver=False)
    pools: dict[int, Pool] = {n: RayPool(n, None, Progress(), StopFlag()) for n in {1, workers}}
    pools[0] = ThisProcess(StopFlag())

    def ours(settings: Mapping[str, object], num_workers: int = workers) -> Callable[[Path], Taken]:
        values = {"quality": QUALITY, "subsampling": "4:2:0", **settings}
        chosen = ConvertSettings(**values)  # type: ignore[arg-type]
        return lambda output: time_ours(tree, output.with_suffix(BETON), pools[num_workers], chosen)

    contestants: dict[str, Callable[[Path], Taken]] = {
        "cp -r": lambda output: time_copy(tree, output),
        "stock jpg": lambda output: time_stock(tree, output, workers, 0),
        f"stock jpg, {MAX_SIDE_PX} px": lambda output: time_stock(tree, output, workers, MAX_SIDE_PX),
    }
    variants: dict[str, dict[str, object]] = {
        "original, --check headers": {"check": "headers"},
        "original": {},
        f"original, {MAX_SIDE_PX} px, --check headers": {"max_side": MAX_SIDE_PX, "check": "headers"},
        f"original, {MAX_SIDE_PX} px": {"max_side": MAX_SIDE_PX},
        f"jpeg, {MAX_SIDE_PX} px": {"encode": "jpeg", "max_side": MAX_SIDE_PX},
    }
    for name, settings in variants.items():
        contestants[name] = ours(settings)
        contestants[f"{name}, no Ray, 1 process"] = ours(settings, 0)
    contestants[f"jpeg, {MAX_SIDE_PX} px, 1 worker"] = ours(variants[f"jpeg, {MAX_SIDE_PX} px"], 1)
    if arguments.only:
        contestants = {name: run for name, run in contestants.items() if name in arguments.only}
    ours({})(arguments.work / "warm-up")
    taken: dict[str, list[Taken]] = defaultdict(list)
    order = random.Random(0)
    for number in range(arguments.rounds):
        names = list(contestants)
        order.shuffle(names)
        for name in names:
            output = arguments.work / "out" / "result"
            output.parent.mkdir()
            if arguments.cold:
                forget(tree)
            taken[name].append(contestants[name](output))
            shutil.rmtree(output.parent)
            print(f"round {number + 1}: {name}: {taken[name][-1].wall_s:.2f} s", file=sys.stderr, flush=True)
    ray.shutdown()
    state = "cold" if arguments.cold else "warm"
    print(
        f"{arguments.files:,} files, {total_bytes / 1e6:,.0f} MB, {workers} processes, {state}, "
        f"{arguments.rounds} rounds; load of the machine at the end {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    )
    medians = {
        name: Taken(*(statistics.median(values) for values in zip(*runs, strict=True))) for name, runs in taken.items()
    }
    print(as_table({name: medians[name] for name in contestants}, arguments.files))
    print("; ".join(f"peak memory, {name}: {mib:.0f} MiB" for name, mib in memory.items()))


def as_table(medians: dict[str, Taken], num_files: int) -> str:
    """Speeds are relative: to the stock writer of the same `MAX_SIDE_PX`, and to `cp -r`."""
    lines = [
        "| | s | images/s | CPU ms/image | speed to stock | CPU to stock | speed to cp -r |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (wall_s, cpu_s) in medians.items():
        peer = medians[f"stock jpg, {MAX_SIDE_PX} px" if f"{MAX_SIDE_PX} px" in name else "stock jpg"]
        cells = [
            f"{wall_s:.2f}",
            f"{num_files / wall_s:,.0f}",
            f"{cpu_s / num_files * 1e3:.2f}",
            f"{peer.wall_s / wall_s:.1f}x",
            f"{peer.cpu_s / cpu_s:.1f}x",
            f"{medians['cp -r'].wall_s / wall_s:.2f}x",
        ]
        lines.append(f"| {name} | " + " | ".join(cells).replace("nanx", "").replace("nan", "") + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
