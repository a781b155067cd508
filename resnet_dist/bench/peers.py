"""A beton's JPEGs as files, as the peers read them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.beton.layout import MODE_JPEG
from data_prep.beton.reader import BetonReader
from resnet_dist.errors import UserError


def write_files(beton: Path, folder: Path) -> int:
    """A folder per label, in the order of the samples within it; returns how many. UserError for raw pixels."""
    reader = BetonReader(beton)
    if (reader.modes != MODE_JPEG).any():
        raise UserError(f"{beton}: holds raw pixels too; the peers read JPEG files only")
    for k in range(len(reader)):
        path = folder / f"{reader.label(k):04d}" / f"{k:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(reader.image_bytes(k))
    return len(reader)


# The loaders that are compared, each in a process of its own: `python -m resnet_dist.bench.peers '{...}'`.


BATCH_SIZE = 64


class Task(NamedTuple):
    peer: str
    beton: str
    files: str
    """The same images as files, in a folder per label."""
    evaluates: bool
    """A centre crop after resizing to 8/7; otherwise a random resized crop, half of them mirrored."""
    size: int
    """px"""
    num_threads: int


Pass = Callable[[int], int]
"""Decodes every image once, for the epoch given; returns how many there were."""


def native(task: Task) -> Pass:
    return _ours(task, "native")


def native_free(task: Task) -> Pass:
    """The native kernel on draws of a running generator in place of keyed ones: what the keys cost."""
    import numpy as np

    from resnet_dist.data import decoder

    generator = np.random.default_rng(0)
    vars(decoder)["sample_keys"] = lambda *args: args[-1]
    vars(decoder)["uniform"] = lambda keys, num: generator.random((len(keys), num))
    return _ours(task, "native")


def ours_ffcv(task: Task) -> Pass:
    return _ours(task, "ffcv")


def _ours(task: Task, decoder: Any) -> Pass:
    import numpy as np
    import torch

    from data_prep.beton.manifest import load_manifest
    from resnet_dist.config.recipe import CenterCrop, RandomResizedCrop
    from resnet_dist.data.loader import BetonLoader

    beton = Path(task.beton)
    manifest = load_manifest(beton)
    transform: CenterCrop | RandomResizedCrop = RandomResizedCrop(kind="random_resized_crop", size=task.size)
    if task.evaluates:
        transform = CenterCrop(kind="center_crop", size=task.size, resize=task.size * 8 // 7)
    loader = BetonLoader(
        beton,
        manifest,
        transform,
        decoder=decoder,
        batch_size=BATCH_SIZE,
        seed=0,
        num_threads=task.num_threads,
        device=torch.device("cpu"),
    )
    ids = np.arange(manifest.num_samples)
    return lambda epoch: sum(len(batch.images) for batch in loader.epoch(epoch, ids))


def stock_ffcv(task: Task) -> Pass:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    sides = (task.size, task.size)
    image = [CenterCropRGBImageDecoder(sides, ratio=7 / 8), ToTensor()]
    if not task.evaluates:
        image = [RandomResizedCropRGBImageDecoder(sides), RandomHorizontalFlip(), ToTensor()]
    loader = Loader(
        task.beton,
        BATCH_SIZE,
        num_workers=task.num_threads,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    return lambda epoch: sum(len(images) for images, _ in loader)


def torchvision(task: Task) -> Pass:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        PILToTensor,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
    )

    steps: list[Any] = [RandomResizedCrop(task.size), RandomHorizontalFlip(), PILToTensor()]
    if task.evaluates:
        steps = [Resize(task.size * 8 // 7), CenterCrop(task.size), PILToTensor()]
    images = ImageFolder(task.files, Compose(steps))
    loader: Any = DataLoader(images, BATCH_SIZE, num_workers=task.num_threads, persistent_workers=True)
    return lambda epoch: sum(len(batch) for batch, _ in loader)


def dali(task: Task) -> Pass:
    fn, types = import_module("nvidia.dali.fn"), import_module("nvidia.dali.types")  # often not installed
    paths = sorted(str(path) for path in Path(task.files).glob("*/*"))

    @import_module("nvidia.dali").pipeline_def(batch_size=BATCH_SIZE, num_threads=task.num_threads, device_id=None)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(files=paths, labels=[0] * len(paths), name="reader")
        linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
        if task.evaluates:
            whole = fn.decoders.image(encoded, device="cpu")
            shorter = fn.resize(whole, resize_shorter=task.size * 8 // 7, **linear)
            return fn.crop(shorter, crop=(task.size, task.size)), labels
        part = fn.decoders.image_random_crop(encoded, device="cpu", random_area=[0.08, 1.0])
        images = fn.resize(part, resize_x=task.size, resize_y=task.size, **linear)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    built = pipeline()
    built.build()
    num_batches = -(-len(paths) // BATCH_SIZE)

    def one_pass(epoch: int) -> int:
        return sum(len(built.run()[0]) for _ in range(num_batches))

    return one_pass


PEERS: dict[str, Callable[[Task], Pass]] = {
    "native": native,
    "native, free draws": native_free,
    "ours on libffcv": ours_ffcv,
    "stock FFCV": stock_ffcv,
    "torchvision": torchvision,
    "DALI": dali,
}


def main() -> None:
    started = time.perf_counter()
    task = Task(**json.loads(sys.argv[1]))
    one_pass = PEERS[task.peer](task)
    one_pass(0)
    report = {"start_s": time.perf_counter() - started, "memory_bytes": anonymous_bytes()}
    print(json.dumps(report), flush=True)
    for epoch, _ in enumerate(sys.stdin, start=1):
        began, began_cpu = time.perf_counter(), cpu_seconds()
        num_images = one_pass(epoch)
        wall_s, cpu_s = time.perf_counter() - began, cpu_seconds() - began_cpu
        print(json.dumps({"num_images": num_images, "wall_s": wall_s, "cpu_s": cpu_s}), flush=True)


def cpu_seconds() -> float:
    """Of this process and its children; theirs in ticks of 10 ms."""
    ticks = 0
    for pid in _children():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def anonymous_bytes() -> int:
    """Memory of this process and its children that belongs to no file."""
    total = 0
    for pid in (os.getpid(), *_children()):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return 1024 * total


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text(encoding="ascii").split()]


if __name__ == "__main__":
    main()
