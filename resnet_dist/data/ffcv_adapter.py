"""The one adapter on `ffcv.Loader`, for `data.decoder: ffcv`: its reader, memory map, graph, JIT pipeline and buffers.

What is replaced, and why (ffcv 1.0.2): its iterator waits for ever when its thread raises or dies, and its thread when
the consumer leaves at the end of an epoch, so batches are asked for one by one from `EpochThread`; its orders pad or
repeat samples; its memory manager makes Python objects for every sample, and turns numba's one type of uint8 arrays
read-only for the whole process; its `Compiler` compiles what needs no compiling, and sets torch's threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.data.decoders import KeyedDecoder
from resnet_dist.data.epoch_thread import Show
from resnet_dist.data.ffcv_names import (
    AllocationQuery,
    Compiler,
    EpochIterator,
    Loader,
    MemoryContext,
    MemoryManager,
    Operation,
    PipelineSpec,
    State,
    TraversalOrder,
    loader_module,
)


class GivenIds(TraversalOrder):
    """No order: every batch is asked for by its sample ids."""

    def __init__(self) -> None:  # ffcv's own __init__ needs the loader, which does not exist yet
        pass

    def __call__(self, loader: Loader) -> GivenIds:
        return self

    def sample_order(self, epoch: int) -> NDArray[np.int64]:
        return np.empty(0, np.int64)


class MappedFile(MemoryManager, MemoryContext):
    """The beton as one read-only memory map; nothing else to keep, since the decoder has the index of the images."""

    state_type = None
    state: tuple[Any, ...] = ()

    def __init__(self, reader: Any) -> None:  # ffcv's own __init__ takes 3 s and 658 MB at 1.28 million samples
        self.state = (np.asarray(np.memmap(reader.file_name, np.uint8, mode="r")),)

    def schedule_epoch(self, batches: Any) -> MappedFile:
        return self

    def compile_reader(self) -> None:  # the decoder reads the map itself
        return None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class DecodeOperation(Operation):
    """ffcv's decoder operation around ours.

    The epoch is the last element of `storage_state`, which every iterator has of its own: nothing is recompiled, and an
    abandoned iterator cannot see the next epoch.
    """

    def __init__(self, decoder: KeyedDecoder) -> None:
        super().__init__()
        self._decoder = decoder

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self._decoder.size, self._decoder.size, 3), np.dtype(np.uint8)
        return replace(previous_state, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        def decode(
            sample_ids: NDArray[np.int64], images: NDArray[np.uint8], metadata: Any, storage_state: tuple[Any, ...]
        ) -> NDArray[np.uint8]:
            file, epoch = storage_state
            self._decoder.decode(file, epoch, sample_ids, images)
            return images

        return decode


class ImageLoader(Loader):
    """ffcv's loader on the image field only; `epoch` begins an epoch."""

    def __init__(self, beton: Path, decoder: KeyedDecoder, batch_size: int) -> None:
        with _our_parts_in_ffcv():
            super().__init__(
                str(beton),
                batch_size,
                num_workers=1,  # ffcv's own threads: the kernel has its own
                os_cache=True,
                order=GivenIds(),
                seed=0,  # unused; None would draw from numpy's global generator
                drop_last=False,
                pipelines={"image": PipelineSpec("image", DecodeOperation(decoder)), "label": None},
                batches_ahead=0,
            )

    def epoch(self, epoch: int) -> Show:
        pipeline, numbers = _Pipeline(self, epoch), count()

        def show(sample_ids: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
            (shown,) = pipeline.run_pipeline(next(numbers), sample_ids, 0, None)
            np.copyto(images, shown)

        return show


class _Pipeline(EpochIterator):
    """ffcv's pipeline and buffers for an epoch, run by whoever calls it and not as the thread it could be."""

    storage_state: tuple[Any, ...]

    def __init__(self, loader: ImageLoader, epoch: int) -> None:
        super().__init__(loader, np.empty(0, np.int64))
        self.storage_state = (*self.storage_state, epoch)

    def start(self) -> None:
        """Called by ffcv's __init__."""


@contextmanager
def _our_parts_in_ffcv() -> Iterator[None]:
    """While Loader.__init__ runs: our memory manager in the place of ffcv's, no compiling, torch's threads kept."""
    manager, enabled, intra_op_threads = loader_module.OSCacheManager, Compiler.is_enabled, torch.get_num_threads()
    loader_module.OSCacheManager = MappedFile
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        loader_module.OSCacheManager = manager
        Compiler.set_enabled(enabled)
        torch.set_num_threads(intra_op_threads)
