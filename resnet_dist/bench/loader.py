"""`resnet-dist bench loader`, `batches`, `opening` and `endurance`: our loader beside its peers, and alone."""

from __future__ import annotations

import gc
import importlib.util
import io
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data_prep.beton import layout, manifest
from data_prep.beton.ranges import payload_of, write_beton
from data_prep.beton.reader import BetonReader
from resnet_dist.bench.paired import Subject, markdown, median_ratio, require_peers, rotated
from resnet_dist.bench.peers import BATCHES, BATCHES_IN_MEMORY, NATIVE, PASSES, STOCK, Task, anonymous_bytes, our_loader
from resnet_dist.config.recipe import MAX_SIZE
from resnet_dist.data.order import epoch_permutation
from resnet_dist.errors import UserError

SETTINGS = ((False, 224), (False, 160), (False, 128), (True, 224))
"""(evaluates, size in px)"""


def write_files(beton: Path, folder: Path) -> int:
    """A beton's JPEGs as files, in a folder per label, for the peers; returns how many. UserError for raw pixels."""
    reader = BetonReader(beton)
    if (reader.modes != layout.MODE_JPEG).any():
        raise UserError(f"{beton}: holds raw pixels too; the peers read JPEG files only")
    for k in range(len(reader)):
        path = folder / f"{reader.label(k):04d}" / f"{k:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(reader.image_bytes(k))
    return len(reader)


# Passes over all images, each peer in its own process; only one runs at a time


@dataclass(frozen=True)
class Result:
    """One peer under one setting."""

    start_s: float
    """From the import to the end of the first pass."""
    memory_bytes: int
    """That belongs to no file, after the first pass; imports included."""
    images_per_cpu_s: tuple[float, ...]
    """One per round: images per second of CPU time, summed over the peer's threads and processes."""
    images_per_s: tuple[float, ...]
    """One per round, by the clock, on all threads: includes what else the machine did."""


def read_setting(text: str) -> tuple[bool, int]:
    """`train-224`, `eval-224`. UserError for anything else."""
    kind, _, size = text.partition("-")
    if kind not in ("train", "eval") or not size.isdecimal() or not 1 <= int(size) <= MAX_SIZE:
        raise UserError(f"{text}: a setting is train-SIZE or eval-SIZE, for example train-224")
    return kind == "eval", int(size)


def bench_loader(
    beton: Path,
    *,
    num_threads: int,
    rounds: int,
    peers: Sequence[str] = tuple(PASSES),
    settings: Sequence[tuple[bool, int]] = SETTINGS,
) -> str:
    """A Markdown table per setting. UserError if the beton does not hold JPEGs only."""
    require_peers(peers, list(PASSES))
    present = [peer for peer in peers if peer != "DALI" or importlib.util.find_spec("nvidia.dali") is not None]
    with tempfile.TemporaryDirectory() as folder:
        write_files(beton, Path(folder))
        tables = []
        for evaluates, size in settings:
            tasks = [Task(peer, str(beton), folder, evaluates, size, num_threads) for peer in present]
            tables.append(passes_table(tasks[0], measure_passes(tasks, rounds)))
    missing = [f"{peer}: not installed" for peer in peers if peer not in present]
    return "\n\n".join([*tables, *missing])


def measure_passes(tasks: Sequence[Task], rounds: int) -> dict[str, Result]:
    """By peer."""
    with ExitStack() as stack:
        subjects = {
            task.peer: stack.enter_context(
                Subject(task.peer, "resnet_dist.bench.peers", "passes", json.dumps(task._asdict()))
            )
            for task in tasks
        }
        starts = {peer: subject.answer() for peer, subject in subjects.items()}
        passes: dict[str, list[dict[str, Any]]] = {peer: [] for peer in subjects}
        for number in range(rounds):
            for peer in rotated(list(subjects), number):
                passes[peer].append(subjects[peer].ask())
    return {
        peer: Result(
            start["start_s"],
            start["memory_bytes"],
            tuple(p["num_images"] / p["cpu_s"] for p in passes[peer]),
            tuple(p["num_images"] / p["wall_s"] for p in passes[peer]),
        )
        for peer, start in starts.items()
    }


def passes_table(task: Task, results: dict[str, Result]) -> str:
    kind = "evaluation: resize, centre crop" if task.evaluates else "training: random resized crop, flip"
    head = ["", "images/s per core", f"relative to {STOCK}", f"{NATIVE} is faster by"]
    head += ["images/s by the clock", "start-up, s", "memory, MB"]
    rows = []
    for peer, result in results.items():
        ratios = [
            median_ratio(one.images_per_cpu_s, other.images_per_cpu_s) if one and other else "-"
            for one, other in ((result, results.get(STOCK)), (results.get(NATIVE), result))
        ]
        row = [peer, f"{median(result.images_per_cpu_s):.0f}", *ratios, f"{median(result.images_per_s):.0f}"]
        rows.append([*row, f"{result.start_s:.1f}", f"{result.memory_bytes / 1e6:.0f}"])
    return f"### {kind}, {task.size} px, {task.num_threads} threads\n\n{markdown(head, rows)}"


# Single batches on one thread


def bench_batches(beton: Path, *, size: int, num_batches: int, rounds: int, peers: Sequence[str]) -> str:
    """A Markdown table: CPU time of training batches. UserError if the beton does not hold JPEGs only.

    For machines that are never idle. Each peer makes the same few batches of 16 again and again in one thread of this
    process, in turns, with the same crops each time. The least CPU time of every batch counts: that is when it shared
    its core and cache least. Queues between threads and processes are left out, which favours torchvision: its
    DataLoader pays for them.
    """
    import torch

    require_peers(peers, list(BATCHES))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            num_samples = write_files(beton, Path(folder))
            tasks = [Task(peer, str(beton), folder, False, size, num_threads=1, batch_size=16) for peer in peers]
            makers = {task.peer: BATCHES[task.peer](task) for task in tasks}
            ids = np.arange(num_batches * 16).reshape(num_batches, 16) * 7 % num_samples
            least_s = {peer: np.full(num_batches, np.inf) for peer in peers}
            for number in range(rounds):
                for batch in range(num_batches):
                    for peer in rotated(peers, number):
                        began_s = time.process_time()
                        makers[peer](batch, ids[batch])
                        least_s[peer][batch] = min(least_s[peer][batch], time.process_time() - began_s)
    finally:
        torch.set_num_threads(num_threads)
    ms = {peer: 1e3 * float(seconds.mean()) / 16 for peer, seconds in least_s.items()}
    rows = [[peer, f"{ms[peer]:.3f}", f"{ms[peer] / ms[peers[0]]:.2f}"] for peer in peers]
    table = markdown(["", "ms of CPU time an image", f"relative to {peers[0]}"], rows)
    return f"### training: random resized crop, flip, {size} px\n\n{table}"


# A start in the middle of an epoch of ImageNet's number of samples


def bench_opening(num_samples: int, peers: Sequence[str] = tuple(BATCHES_IN_MEMORY), keep: Path | None = None) -> str:
    """A Markdown table of start-up, resume and memory: times in seconds by the clock and, in brackets, of CPU.

    Every peer opens a made-up beton in its own process and returns three batches from the middle of an epoch, as
    after a restart. The beton is written to the folder `keep`, if given, or read from there if an earlier call left it.
    """
    require_peers(peers, list(BATCHES_IN_MEMORY))
    with tempfile.TemporaryDirectory() as temporary:
        beton = (keep or Path(temporary)) / f"{num_samples}.beton"
        if not beton.exists():
            write_tiny_samples(beton, num_samples)
        tasks = [Task(peer, str(beton), batch_size=256) for peer in peers]
        rows = [_opening_row(task.peer, measure_opening(task)) for task in tasks]
    head = ["", "imports, s", "opening, s", "an epoch's order, s", "first batch, s"]
    head += ["memory of imports, MB", "besides them and batches, MB"]
    what = f"{num_samples:,} samples, batches of {tasks[0].batch_size} at {tasks[0].size} px, "
    return f"{what}{tasks[0].num_threads} threads\n\n{markdown(head, rows)}"


def measure_opening(task: Task) -> dict[str, Any]:
    with Subject(task.peer, "resnet_dist.bench.peers", "opening", json.dumps(task._asdict())) as subject:
        return subject.answer()


def _opening_row(peer: str, found: dict[str, Any]) -> list[str]:
    times = [f"{found[name][0]:.1f} ({found[name][1]:.1f})" for name in ("imports", "opening", "order", "first_batch")]
    return [peer, *times, *(f"{found[name] / 1e6:.0f}" for name in ("imports_bytes", "held_bytes"))]


def write_tiny_samples(path: Path, num_samples: int) -> Path:
    """A beton and its manifest: all samples are one JPEG of 32 x 32 px."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 120, 200)).save(buffer, "JPEG")
    rows = np.zeros(num_samples, layout.STORED_ROW)
    rows["mode"], rows["width"], rows["height"] = layout.MODE_JPEG, 32, 32
    rows["label"], rows["size"] = np.arange(num_samples) % 1000, len(buffer.getvalue())
    plan = layout.lay_out(rows, layout.MIN_PAGE_BYTES)
    digest = write_beton(path, plan, payload_of(lambda k: buffer.getvalue()), temporary=path.with_suffix(".tmp"))
    described = manifest.describe_beton(
        plan,
        digest,
        class_names=tuple(map(str, range(1000))),
        num_untouched=num_samples,
        settings={},
        source={"name": "bench"},
        versions={},
    )
    manifest.write_manifest(path, described)
    return path


# What our loader holds after every epoch: none of it may grow


def bench_endurance(beton: Path, *, num_epochs: int, num_threads: int, size: int) -> str:
    """A Markdown table of memory that belongs to no file, threads and file handles, from the first epoch to the last.

    Every other epoch is left half-way, as at a stop.
    """
    loader = our_loader(Task(NATIVE, str(beton), size=size, num_threads=num_threads), "native")
    num_samples = len(loader.page_of_sample)
    shown = sorted({1, 2, num_epochs // 4, num_epochs // 2, 3 * num_epochs // 4, num_epochs})
    rows = []
    for epoch in range(1, num_epochs + 1):
        batches = loader.epoch(epoch, epoch_permutation(num_samples, 0, epoch))
        for number, _ in enumerate(batches):
            if epoch % 2 and number * 128 >= num_samples:
                break
        batches.close()
        if epoch in shown:
            gc.collect()
            threads, handles = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))  # noqa: PTH208
            rows.append([str(epoch), f"{anonymous_bytes() / 1e6:.1f}", str(threads), str(handles)])
    loader.close()
    return markdown(["after epoch", "memory, MB", "threads", "file handles"], rows)
