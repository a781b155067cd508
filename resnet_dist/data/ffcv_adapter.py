"""The one adapter on `ffcv.Loader`: its reader, memory map, graph and ring of buffers, under a thread that cannot hang.

What is replaced, and why (ffcv 1.0.2): its iterator waits for ever when its thread raises or dies; its thread waits for
ever when the consumer leaves at the end of an epoch; its orders pad or repeat samples and `__iter__` cuts an epoch to
the length of the loader's first; its memory manager makes Python objects for every sample, and turns numba's one type
of uint8 arrays read-only for the whole process; its `Compiler` compiles what needs no compiling, and sets torch's
threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Full
from threading import current_thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.data.ffcv_names import (
    Compiler,
    EpochIterator,
    Loader,
    MemoryContext,
    MemoryManager,
    Operation,
    PipelineSpec,
    TraversalOrder,
    loader_module,
)
from resnet_dist.errors import Fault

_POLL_S = 0.5
"""How soon a waiting side sees that the other has gone."""
_JOIN_LIMIT_S = 5.0
_BATCHES_AHEAD = 3


class GivenOrder(TraversalOrder):
    """The sample ids of the next epoch as given: no padding, no duplicates, no shuffling of ffcv's own."""

    def __init__(self) -> None:  # ffcv's own __init__ needs the loader, which does not exist yet
        self.sample_ids = np.empty(0, np.int64)

    def __call__(self, loader: Loader) -> GivenOrder:
        return self

    def sample_order(self, epoch: int) -> NDArray[np.int64]:
        return self.sample_ids


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


class ImageLoader(Loader):
    """ffcv's loader on the image field only; `start` begins an epoch."""

    def __init__(self, beton: Path, decoder: Operation, batch_size: int) -> None:
        self._order = GivenOrder()
        with _our_parts_in_ffcv():
            super().__init__(
                str(beton),
                batch_size,
                num_workers=1,  # ffcv's own threads: the decoder has its pool
                os_cache=True,
                order=self._order,
                seed=0,  # unused; None would draw from numpy's global generator
                drop_last=False,
                pipelines={"image": PipelineSpec("image", decoder), "label": None},
                batches_ahead=_BATCHES_AHEAD,
            )

    def start(self, epoch: int, sample_ids: NDArray[np.int64], wait_limit_s: float) -> EpochThread:
        self._order.sample_ids = sample_ids
        return EpochThread(self, self.next_traversal_order(), epoch, wait_limit_s)


class Decoded(NamedTuple):
    slot: int
    """Of the ring of buffers."""
    sample_ids: NDArray[np.int64]
    num_replaced: int
    images: NDArray[np.uint8]


class EpochThread(EpochIterator):
    """Decodes the batches of one epoch ahead of the consumer; `next_batch` hands them out in order."""

    storage_state: tuple[Any, ...]

    def __init__(self, loader: ImageLoader, order: NDArray[np.int64], epoch: int, wait_limit_s: float) -> None:
        self._epoch = epoch
        self._wait_limit_s = wait_limit_s
        self.copied: dict[int, torch.cuda.Event] = {}
        """By slot of the ring: when the consumer's copy of it will be done."""
        super().__init__(loader, order)

    def start(self) -> None:
        self.storage_state = (*self.storage_state, self._epoch)
        super().start()

    def run(self) -> None:
        try:
            for number, sample_ids in enumerate(self.iter_ixes):
                slot = number % (self.loader.batches_ahead + 2)
                if slot in self.copied:
                    self.copied.pop(slot).synchronize()
                shown = sample_ids.copy()  # the decoder writes to it where it replaces a sample
                (images,) = self.run_pipeline(number, shown, slot, None)
                if not self._offer(Decoded(slot, shown, int((shown != sample_ids).sum()), images)):
                    return
            self._offer(None)
        except BaseException as error:  # noqa: BLE001 the consumer raises it
            self._offer(error)

    def next_batch(self) -> Decoded | None:
        """None at the end; the images hold until the next call. Raises what `run` raised."""
        deadline = time.monotonic() + self._wait_limit_s
        while True:
            alive = self.is_alive()  # before the look into the queue: a thread may put its last word and end
            try:
                item = self.output_queue.get(timeout=_POLL_S if alive else 0)
            except Empty:
                if not alive:
                    raise Fault(f"the loader thread of {self.loader.fname} died without a word") from None
                if time.monotonic() > deadline:
                    raise Fault(
                        f"{self.loader.fname}: no batch within {self._wait_limit_s:g} s; is the storage alive?"
                    ) from None
                continue
            if isinstance(item, BaseException):
                raise item
            decoded: Decoded | None = item
            return decoded

    def close(self) -> None:
        """Ends the thread after the batch it is decoding, and waits for it (5 s at most)."""
        super().close()
        while True:  # a thread that waits for room in the queue goes on at once
            try:
                self.output_queue.get_nowait()
            except Empty:
                break
        if self.is_alive() and self is not current_thread():
            self.join(_JOIN_LIMIT_S)

    def _offer(self, item: Any) -> bool:
        """Puts `item` when there is room; False when the consumer has gone."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False


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
