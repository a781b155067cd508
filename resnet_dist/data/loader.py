"""Batches of a beton in a given order. Training sees nothing else of decoding and threads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import accumulate, cycle, pairwise
from pathlib import Path
from queue import Empty, Full, Queue
from shlex import quote
from threading import Event, Thread, current_thread

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.beton.digest import CHUNK_BYTES, chunk_digest
from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.beton.reader import BetonReader
from resnet_dist.data.batch import Batch, CudaBuffers, HostBuffers, ReceiveBatch, batch_buffers
from resnet_dist.data.crops import require_sides
from resnet_dist.data.decoder import ImageSettings, KeyedDecoder
from resnet_dist.data.order import sample_of
from resnet_dist.errors import Fault, UserError

Numbers = Callable[[int], NDArray[np.int64]]
"""From the index of a batch in its epoch to what `Batch.numbers` holds: int64, any length."""

_CPU = torch.device("cpu")


class BetonLoader:
    """Batches of one beton's images. One loader serves all epochs of a process.

    What a batch holds depends on (beton, settings, epoch, sample ids) only: not on threads, batch size, worker count or
    where an epoch was resumed.

    Args:
        beton: with its manifest beside it; UserError when they do not belong together, or do not suit the transform.
        settings: `decoder.train_images(recipe)` or `decoder.eval_images(recipe)`. UserError when its decoder was not
            built.
        batch_size: samples of a batch, where `epoch` is not given other sizes.
        num_threads: threads that decode, besides one that prepares batches.
        device: where the batches' tensors are.
        reads_ahead: whether pages of the file are asked for before they are due, which pays where samples come in the
            order of `order.page_permutation`.
        wait_limit_s: the longest wait for one batch.
    """

    def __init__(
        self,
        beton: Path,
        settings: ImageSettings,
        *,
        batch_size: int,
        num_threads: int = 1,
        device: torch.device = _CPU,
        reads_ahead: bool = False,
        wait_limit_s: float = 300.0,
    ) -> None:
        manifest = load_manifest(beton)
        self.manifest = manifest
        self._reader = open_reader(beton, manifest)
        require_sides(beton, manifest, settings.transform)
        self._file = np.asarray(np.memmap(beton, np.uint8, mode="r"))
        self.num_samples = len(self._reader)
        self.page_of_sample: NDArray[np.int64] = self._reader.pointers // self._reader.page_bytes
        """[num_samples]: in which page of the beton a sample is."""
        self.labels = self._reader.labels
        self._settings = settings
        self._num_threads = num_threads
        self._batch_size = batch_size
        self._reads_ahead = reads_ahead
        self._device = device
        self._wait_limit_s = wait_limit_s
        self._decoders: dict[int, KeyedDecoder] = {}
        self._decoder_at(0)  # raises now if it cannot be opened

    def epoch(
        self,
        epoch: int,
        sample_ids: NDArray[np.int64],
        *,
        sizes: Sequence[int] | None = None,
        numbers: Numbers | None = None,
    ) -> Generator[Batch, None, None]:
        """Batches in the order of `sample_ids` [any length]; the last may be short.

        Args:
            sample_ids: as `order.train_order` gives them. Each copy of a sample is augmented by draws of its own.
            sizes: samples of each batch, from the first again after the last. None: all of `batch_size`.
            numbers: gives the k-th of these batches (from 0) its `Batch.numbers`. It is called on the loader's thread.

        Raises:
            Fault: a sample cannot be decoded, or a batch does not come in time.
            Whatever `numbers` raises.

        Whatever ends the iteration, also leaving it early, ends its thread.
        """
        if sample_ids.ndim != 1 or not np.issubdtype(sample_ids.dtype, np.integer):
            raise ValueError(f"sample_ids must be a 1-D integer array, got {sample_ids.dtype} {sample_ids.shape}")
        copies = self._settings.num_copies
        num_ids = self.num_samples * copies if copies is not None else np.iinfo(np.int64).max
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < num_ids:
            raise ValueError(f"sample_ids {sample_ids.min()}..{sample_ids.max()} of {num_ids} samples")
        if sizes is None:
            sizes = [self._batch_size]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be positive, got {list(sizes)}")
        return self._batches(epoch, sample_ids.astype(np.int64), sizes, numbers or (lambda _: np.empty(0, np.int64)))

    def close(self) -> None:
        """Ends the decoding threads, without waiting."""
        for decoder in self._decoders.values():
            decoder.close()

    def _batches(
        self, epoch: int, sample_ids: NDArray[np.int64], sizes: Sequence[int], numbers: Numbers
    ) -> Generator[Batch, None, None]:
        """On the consumer's thread."""
        decoder = self._decoder_at(epoch)
        # Made on this thread, where CUDA's current device is the worker's; in a new thread it would be device 0.
        buffers = batch_buffers(decoder.size, self._device, max(sizes))
        decoded = self._decoded(decoder, buffers, epoch, sample_ids, sizes, numbers)
        with closing(EpochThread(str(self._reader.path), decoded, self._wait_limit_s)) as thread:
            while (receive := thread.next_batch()) is not None:
                yield receive()

    def _decoded(
        self,
        decoder: KeyedDecoder,
        buffers: HostBuffers | CudaBuffers,
        epoch: int,
        sample_ids: NDArray[np.int64],
        sizes: Sequence[int],
        numbers: Numbers,
    ) -> Generator[ReceiveBatch, None, None]:
        """On the epoch's thread: the epoch's batches, on their way to the device."""
        samples = sample_of(sample_ids, self.num_samples)
        page_ids = self.page_of_sample[samples] if self._reads_ahead else samples[:0]
        with closing(ReadAhead(self._reader, page_ids)) as hints:
            for k, (start, end) in enumerate(pairwise(accumulate(cycle(sizes), initial=0))):
                if start >= len(samples):
                    return
                hints.ask_for(end + _SAMPLES_READ_AHEAD)
                batch = slice(start, end)
                images = buffers.take(len(samples[batch]))
                shown = decoder.decode(epoch, samples[batch], sample_ids[batch], images.numpy())
                yield buffers.send(
                    Batch(
                        images,
                        torch.from_numpy(self._reader.labels[shown]),
                        shown,
                        num_replaced=int((shown != samples[batch]).sum()),
                        numbers=torch.tensor(numbers(k)),  # a copy: it belongs to the consumer
                    )
                )

    def _decoder_at(self, epoch: int) -> KeyedDecoder:
        """One for each size: a thread that is still ending another epoch has its own."""
        settings = self._settings
        size = settings.transform.size if settings.size_at is None else settings.size_at(epoch)
        if size not in self._decoders:
            self._decoders[size] = KeyedDecoder(self._reader, self._file, settings, self._num_threads, size)
        return self._decoders[size]


_SAMPLES_READ_AHEAD = 1024
"""They are in about 13 pages of 8 MiB: a second of reading for a disk of 100 MB/s."""
_BATCHES_AHEAD = 3
_POLL_S = 0.5
"""Time until a waiting side notices that the other is gone."""
_JOIN_LIMIT_S = 5.0


class EpochThread(Thread):
    """Prepares an epoch's batches ahead of training. Neither side can wait for the other forever."""

    def __init__(self, name: str, batches: Generator[ReceiveBatch, None, None], wait_limit_s: float) -> None:
        """`name`: of the data, for errors; `batches`: run and closed by this thread; `wait_limit_s`: for one batch."""
        super().__init__(name="beton-epoch", daemon=True)
        self._data = name
        self._batches = batches
        self._wait_limit_s = wait_limit_s
        self._queue: Queue[ReceiveBatch | BaseException | None] = Queue(_BATCHES_AHEAD)
        self._is_unwanted = Event()
        self.start()

    def run(self) -> None:
        try:
            with closing(self._batches):
                for batch in self._batches:
                    if not self._offer(batch):
                        return
            self._offer(None)
        except BaseException as error:  # noqa: BLE001 the consumer raises it
            self._offer(error)

    def next_batch(self) -> ReceiveBatch | None:
        """None at the end. Raises what the thread raised; Fault if no batch comes."""
        deadline = time.monotonic() + self._wait_limit_s
        while True:
            alive = self.is_alive()  # read before the queue: a thread may put its last item and end
            try:
                item = self._queue.get(timeout=_POLL_S if alive else 0)
            except Empty:
                if not alive:
                    raise Fault(f"the loader thread of {self._data} ended without an error message") from None
                if time.monotonic() > deadline:
                    raise Fault(
                        f"{self._data}: no batch within {self._wait_limit_s:g} s; is the storage alive?"
                    ) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def close(self) -> None:
        """Ends the thread after the batch it is decoding, and waits for it (5 s at most)."""
        self._is_unwanted.set()
        while True:  # a thread that waits for space in the queue continues at once
            try:
                self._queue.get_nowait()
            except Empty:
                break
        if self.is_alive() and self is not current_thread():
            self.join(_JOIN_LIMIT_S)

    def _offer(self, item: ReceiveBatch | BaseException | None) -> bool:
        """Puts `item` when there is space; False when the consumer has gone."""
        while not self._is_unwanted.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False


class ReadAhead:
    """For `data.shuffle: page`: asks the system for a beton's pages before they are due, each as one long read."""

    def __init__(self, reader: BetonReader, page_ids: NDArray[np.int64]) -> None:
        """`page_ids`: of the epoch's samples, in their order; none, to ask for nothing."""
        needed, first_uses = np.unique(page_ids, return_index=True)
        self._uses = sorted(zip(first_uses.tolist(), needed.tolist(), strict=True), reverse=True)
        self._page_bytes = reader.page_bytes
        self._file = os.open(reader.path, os.O_RDONLY)

    def ask_for(self, end: int) -> None:
        """The pages of the epoch's first `end` samples, once each. Does not wait for the disk."""
        while self._uses and self._uses[-1][0] < end:
            page = self._uses.pop()[1]
            os.posix_fadvise(self._file, page * self._page_bytes, self._page_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self._file)


def open_reader(beton: Path, manifest: Manifest) -> BetonReader:
    """Opens a beton. UserError when it is not the one that the manifest describes.

    The size is checked first: a mapped file that is shorter than its pointers kills the process with SIGBUS. Then the
    digests of headers and tables. The images' digests are checked by `data-prep verify`: 140 GB take minutes to read.
    """
    if not beton.is_file():
        raise UserError(f"{beton}: does not exist")
    if (actual_bytes := beton.stat().st_size) != manifest.beton_bytes:
        raise UserError(f"{beton}: has {actual_bytes} bytes, its manifest says {manifest.beton_bytes}")
    reader = BetonReader(beton)
    if len(reader) != manifest.num_samples:
        raise UserError(f"{beton}: has {len(reader)} samples, its manifest says {manifest.num_samples}")
    if manifest.chunk_bytes != CHUNK_BYTES or not len(reader):
        return reader
    first_image, last_image = int(reader.pointers.min()), int((reader.pointers + reader.sizes).max())
    last_chunk = (manifest.beton_bytes - 1) // CHUNK_BYTES
    chunks = {*range(first_image // CHUNK_BYTES + 1), *range(last_image // CHUNK_BYTES, last_chunk + 1)}
    with beton.open("rb") as file:
        for chunk in sorted(chunks):
            file.seek(chunk * CHUNK_BYTES)
            if chunk_digest(file.read(CHUNK_BYTES), manifest.algorithm) != manifest.chunks[chunk]:
                raise UserError(
                    f"{beton}: bytes from {chunk * CHUNK_BYTES} on do not have the digest in its manifest: "
                    f"`data-prep verify {quote(str(beton))}` says what changed; copy or convert it again"
                )
    return reader
