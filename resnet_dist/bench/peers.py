"""The loaders that are compared, each in its own process: `python -m resnet_dist.bench.peers passes '{...}'`.

Imports are inside the functions, so that each peer pays only for its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from resnet_dist.bench.paired import print_result

NATIVE, ON_LIBFFCV, STOCK = "native", "ours on libffcv", "stock FFCV"


class Task(NamedTuple):
    peer: str
    beton: str
    files: str = ""
    """The same images as files, in a folder per label."""
    evaluates: bool = False
    """A centre crop after resizing to 8/7; otherwise a random resized crop, half of them mirrored."""
    size: int = 224
    """px"""
    num_threads: int = 2
    batch_size: int = 64


# How each is opened


def our_loader(task: Task, decoder: Any) -> Any:
    """A BetonLoader."""
    from resnet_dist.config.recipe import CenterCrop, RandomResizedCrop
    from resnet_dist.data.decoder import ImageSettings
    from resnet_dist.data.loader import BetonLoader

    transform: CenterCrop | RandomResizedCrop = RandomResizedCrop(kind="random_resized_crop", size=task.size)
    if task.evaluates:
        transform = CenterCrop(kind="center_crop", size=task.size, resize=task.size * 8 // 7)
    settings = ImageSettings(transform, decoder)
    return BetonLoader(Path(task.beton), settings, batch_size=task.batch_size, num_threads=task.num_threads)


def stock_loader(task: Task, order: str = "SEQUENTIAL") -> Any:
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    sides = (task.size, task.size)
    image = [CenterCropRGBImageDecoder(sides, ratio=7 / 8), ToTensor()]
    if not task.evaluates:
        image = [RandomResizedCropRGBImageDecoder(sides), RandomHorizontalFlip(), ToTensor()]
    return Loader(
        task.beton,
        task.batch_size,
        num_workers=task.num_threads,
        os_cache=True,
        order=OrderOption[order],
        drop_last=False,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )


def image_folder(task: Task) -> Any:
    """torchvision's data set."""
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
    return ImageFolder(task.files, Compose(steps))


def dali_pipeline(task: Task, paths: list[str]) -> Any:
    fn, types = import_module("nvidia.dali.fn"), import_module("nvidia.dali.types")  # often not installed

    @import_module("nvidia.dali").pipeline_def(batch_size=task.batch_size, num_threads=task.num_threads, device_id=None)
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
    return built


# Passes over all images: `bench loader`

Pass = Callable[[int], int]
"""Decodes every image once, for the epoch given; returns how many there were."""


def our_passes(task: Task) -> Pass:
    import numpy as np

    loader = our_loader(task, "ffcv" if task.peer == ON_LIBFFCV else "native")
    ids = np.arange(len(loader.page_of_sample))
    return lambda epoch: sum(len(batch.images) for batch in loader.epoch(epoch, ids))


def stock_passes(task: Task) -> Pass:
    loader = stock_loader(task)
    return lambda epoch: sum(len(images) for images, _ in loader)


def torchvision_passes(task: Task) -> Pass:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(image_folder(task), task.batch_size, num_workers=task.num_threads, persistent_workers=True)
    return lambda epoch: sum(len(batch) for batch, _ in loader)


def dali_passes(task: Task) -> Pass:
    paths = sorted(str(path) for path in Path(task.files).glob("*/*"))
    pipeline, num_batches = dali_pipeline(task, paths), -(-len(paths) // task.batch_size)
    return lambda epoch: sum(len(pipeline.run()[0]) for _ in range(num_batches))


PASSES: dict[str, Callable[[Task], Pass]] = {
    NATIVE: our_passes,
    ON_LIBFFCV: our_passes,
    STOCK: stock_passes,
    "torchvision": torchvision_passes,
    "DALI": dali_passes,
}


def measure_passes(task: Task) -> None:
    """Opens the loader, prints what that took, then runs a pass for every line on stdin."""
    started = time.perf_counter()
    one_pass = PASSES[task.peer](task)
    one_pass(0)
    print_result({"start_s": time.perf_counter() - started, "memory_bytes": anonymous_bytes()})
    for epoch, _ in enumerate(sys.stdin, start=1):
        began, began_cpu = time.perf_counter(), cpu_seconds()
        num_images = one_pass(epoch)
        wall_s, cpu_s = time.perf_counter() - began, cpu_seconds() - began_cpu
        print_result({"num_images": num_images, "wall_s": wall_s, "cpu_s": cpu_s})


# Single batches on one thread: `bench batches`

MakeBatch = Callable[[int, Any], object]
"""Makes batch number k, of some sample ids; with the same crops whenever it is made."""


def our_batches(task: Task) -> MakeBatch:
    import numpy as np
    import torch

    from data_prep.beton.manifest import load_manifest
    from resnet_dist.config.recipe import RandomResizedCrop
    from resnet_dist.data.batch import HostBuffers
    from resnet_dist.data.decoder import ImageSettings, KeyedDecoder
    from resnet_dist.data.loader import open_reader

    beton, crop = Path(task.beton), RandomResizedCrop(kind="random_resized_crop", size=task.size)
    file = np.asarray(np.memmap(beton, np.uint8, mode="r"))
    reader = open_reader(beton, load_manifest(beton))
    decoder = KeyedDecoder(reader, file, ImageSettings(crop), num_threads=1, size=task.size)
    buffers = HostBuffers(task.size, torch.device("cpu"))

    def make(number: int, ids: Any) -> object:
        images = buffers.take(len(ids))
        decoder.decode(0, ids, ids, images.numpy())
        return images

    return make


def stock_batches(task: Task) -> MakeBatch:
    import numpy as np
    from ffcv.loader.epoch_iterator import EpochIterator
    from numba import njit

    class Pipeline(EpochIterator):
        def start(self) -> None:
            """It is run here and not as a thread."""

    @njit  # numba's own generator, which ffcv draws from
    def seed(number: int) -> None:
        np.random.seed(number)

    loader = stock_loader(task)
    pipeline = Pipeline(loader, loader.next_traversal_order())
    pipeline.storage_state = pipeline.memory_context.state

    def make(number: int, ids: Any) -> object:
        seed(number)
        return pipeline.run_pipeline(0, ids.astype(np.uint64), 0, None)

    make(0, np.arange(task.batch_size))  # compiles
    return make


def torchvision_batches(task: Task) -> MakeBatch:
    import torch
    from torch.utils.data import default_collate

    images = image_folder(task)

    def make(number: int, ids: Any) -> object:
        torch.manual_seed(number)
        return default_collate([images[int(k)] for k in ids])

    return make


BATCHES: dict[str, Callable[[Task], MakeBatch]] = {
    NATIVE: our_batches,
    STOCK: stock_batches,
    "torchvision": torchvision_batches,
}


# A start in the middle of an epoch: `bench opening`

BATCHES_IN_MEMORY = {NATIVE: 7, ON_LIBFFCV: 7, STOCK: 10}
"""Batches in memory when three are held: ours has three in the queue and one that waits for space there; stock has a
ring of five, once for the crops and once for their flips."""


class StageTimes:
    """Times of the stages of a start, by the clock and of CPU."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._began = time.perf_counter(), time.process_time()

    def stage(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.found[name] = [now[0] - self._began[0], now[1] - self._began[1]]
        if name == "imports":
            self.found["imports_bytes"] = anonymous_bytes()
        self._began = time.perf_counter(), time.process_time()


def open_ours(task: Task, watch: StageTimes) -> Callable[[], Any]:
    decoder = "ffcv" if task.peer == ON_LIBFFCV else "native"
    import torch  # noqa: F401

    import resnet_dist.data.loader
    from resnet_dist.data.order import train_order

    if decoder == "ffcv":
        import resnet_dist.data.ffcv_kernel  # noqa: F401
    watch.stage("imports")
    loader = our_loader(task, decoder)
    watch.stage("opening")
    num_samples = len(loader.page_of_sample)
    order = train_order(
        num_samples,
        seed=0,
        epoch=40,
        global_batch_size=task.batch_size,
        micro_batch_size=task.batch_size,
        rank=0,
        world_size=1,
        start_step=num_samples // task.batch_size // 2,
    )
    watch.stage("order")
    batches = loader.epoch(40, order.reshape(-1))
    return lambda: next(batches).images


def open_stock(task: Task, watch: StageTimes) -> Callable[[], Any]:
    import ffcv.loader
    import ffcv.transforms  # noqa: F401

    watch.stage("imports")
    loader = stock_loader(task, "RANDOM")
    watch.stage("opening")
    batches = iter(loader)  # draws the order; begins at the epoch's first batch, since it cannot resume
    watch.stage("order")
    return lambda: next(batches)[0]


def measure_opening(task: Task) -> None:
    """Prints the times of the start and the memory held after three batches."""
    watch = StageTimes()
    show = (open_stock if task.peer == STOCK else open_ours)(task, watch)
    shown = [show()]
    watch.stage("first_batch")
    shown += [show(), show()]
    time.sleep(5.0)  # so that every buffer of the loader is filled
    batches = BATCHES_IN_MEMORY[task.peer] * task.batch_size * task.size * task.size * 3
    watch.found["held_bytes"] = anonymous_bytes() - watch.found["imports_bytes"] - batches
    print_result(watch.found)
    os._exit(0)  # stock's thread waits for a consumer forever


# What a process has used


def cpu_seconds() -> float:
    """CPU time of this process and its children; theirs in ticks of 10 ms."""
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
    measure = {"passes": measure_passes, "opening": measure_opening}[sys.argv[1]]
    measure(Task(**json.loads(sys.argv[2])))
