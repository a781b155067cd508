"""`resnet-dist bench batches`: CPU time of making batches, for machines that are never quiet.

Each peer makes the same few batches again and again in one thread of one process, in turns, with the same crops each
time; of every batch the least CPU time counts, when it shared its core and cache with others least. Queues between
threads and processes are left out: torchvision is spared what its DataLoader pays for them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.bench.peers import write_files
from resnet_dist.errors import UserError

BATCH_SIZE = 16
MakeBatch = Callable[[int, NDArray[np.int64]], object]
"""Makes batch number k, of some sample ids."""


def bench_batches(beton: Path, *, size: int, num_batches: int, rounds: int, peers: Sequence[str]) -> str:
    """A Markdown table; training crops. UserError if the beton does not hold JPEGs only, or there is no such peer."""
    if unknown := set(peers) - set(PEERS):
        raise UserError(f"there is no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        per_image = _least_ms(beton, size, num_batches, rounds, peers)
    finally:
        torch.set_num_threads(num_threads)
    lines = [f"### training: random resized crop, flip, {size} px", "", "| | ms of CPU time an image | relative to "]
    lines[2] += f"{peers[0]} |\n|---|---|---|"
    lines += [f"| {peer} | {ms:.3f} | {ms / per_image[0]:.2f} |" for peer, ms in zip(peers, per_image, strict=True)]
    return "\n".join(lines)


def _least_ms(beton: Path, size: int, num_batches: int, rounds: int, peers: Sequence[str]) -> NDArray[np.float64]:
    """Of every peer, ms an image."""
    with tempfile.TemporaryDirectory() as folder:
        num_samples = write_files(beton, Path(folder))
        makers = [PEERS[peer](beton, Path(folder), size) for peer in peers]
        ids = np.arange(num_batches * BATCH_SIZE).reshape(num_batches, BATCH_SIZE) * 7 % num_samples
        least = np.full((len(makers), num_batches), np.inf)
        for number in range(rounds):
            for batch in range(num_batches):
                for k in np.roll(np.arange(len(makers)), number):
                    began = time.process_time()
                    makers[k](batch, ids[batch])
                    least[k, batch] = min(least[k, batch], time.process_time() - began)
    return least.mean(axis=1) / BATCH_SIZE * 1e3


def native(beton: Path, files: Path, size: int) -> MakeBatch:
    from data_prep.beton.manifest import load_manifest
    from resnet_dist.config.recipe import RandomResizedCrop
    from resnet_dist.data.batch import HostBuffers
    from resnet_dist.data.decoder import KeyedDecoder
    from resnet_dist.data.loader import open_reader

    crop = RandomResizedCrop(kind="random_resized_crop", size=size)
    mapped = np.asarray(np.memmap(beton, np.uint8, mode="r"))
    decoder = KeyedDecoder(open_reader(beton, load_manifest(beton)), mapped, crop, "native", 0, num_threads=1)
    buffers = HostBuffers(size, torch.device("cpu"))

    def make(batch: int, ids: NDArray[np.int64]) -> object:
        images = buffers.take(len(ids))
        decoder.decode(0, ids.copy(), images.numpy())
        return images

    return make


def native_free(beton: Path, files: Path, size: int) -> MakeBatch:
    """On draws of a running generator, seeded alike before every batch."""
    from resnet_dist.data import decoder

    keyed_make, names = native(beton, files, size), vars(decoder)
    keyed = {name: names[name] for name in ("sample_keys", "uniform")}

    def make(batch: int, ids: NDArray[np.int64]) -> object:
        generator = np.random.default_rng(batch)
        names["sample_keys"] = lambda *args: args[-1]
        names["uniform"] = lambda keys, num: generator.random((len(keys), num))
        try:
            return keyed_make(batch, ids)
        finally:
            names.update(keyed)

    return make


def stock_ffcv(beton: Path, files: Path, size: int) -> MakeBatch:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from numba import njit

    image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), ToTensor()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    loader = Loader(
        str(beton), BATCH_SIZE, num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL, pipelines=pipelines
    )

    class Pipeline(EpochIterator):
        def start(self) -> None:
            """It is run here and not as a thread."""

    pipeline, seed = Pipeline(loader, loader.next_traversal_order()), njit(_seed)
    pipeline.storage_state = pipeline.memory_context.state

    def make(batch: int, ids: NDArray[np.int64]) -> object:
        seed(batch)
        return pipeline.run_pipeline(0, ids.astype(np.uint64), 0, None)

    make(0, np.arange(BATCH_SIZE))  # compiles
    return make


def _seed(number: int) -> None:
    np.random.seed(number)  # numba's own generator, which ffcv draws from


def torchvision(beton: Path, files: Path, size: int) -> MakeBatch:
    from torch.utils.data import default_collate
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

    images = ImageFolder(str(files), Compose([RandomResizedCrop(size), RandomHorizontalFlip(), PILToTensor()]))

    def make(batch: int, ids: NDArray[np.int64]) -> object:
        torch.manual_seed(batch)
        return default_collate([images[int(k)] for k in ids])

    return make


PEERS: dict[str, Callable[[Path, Path, int], Any]] = {
    "native": native,
    "native, free draws": native_free,
    "stock FFCV": stock_ffcv,
    "torchvision": torchvision,
}
