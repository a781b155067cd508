"""Batches of a beton in a given order: `BetonLoader` is all that training sees of decoding, threads and ffcv.

One loader serves all epochs of a process. What a batch holds depends on (beton, transform, decoder, seed, epoch, sample
ids) only: not on threads, batch size, worker count or where an epoch was resumed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty, Full, Queue
from shlex import quote
from threading import Event, Thread, current_thread
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.beton.digest import CHUNK_BYTES, chunk_digest
from data_prep.beton.manifest import Manifest
from data_prep.beton.reader import BetonReader
from resnet_dist.config.recipe import OnBadSample
from resnet_dist.data.batch import Batch, BatchPlaces, Placed, batch_places
from resnet_dist.data.crops import Transform, require_sides
from resnet_dist.data.decoder import Decoder, KeyedDecoder
from resnet_dist.errors import Fault, UserError

_BATCHES_READ_AHEAD = 16
"""Samples of 16 batches of 64 lie in about 13 pages of 8 MiB: a second of reading for a disk of 100 MB/s."""


class BetonLoader:
    """Decodes samples of one beton under one transform, `batch_size` at a time, on `num_threads` threads.

    A batch's tensors are the consumer's own: nothing writes to them later. With `reads_ahead` the pages of the file are
    asked for before they are due, which pays where samples come in `order.page_permutation`. `wait_limit_s` is the
    longest wait for one batch. `size_at` gives the images' size in an epoch, px, in the place of the transform's. With
    `num_copies` there are that many times as many ids (see `order.train_order`). UserError when beton and manifest or
    transform do not belong together, or `decoder` was not built.
    """

    def __init__(
        self,
        beton: Path,
        manifest: Manifest,
        transform: Transform,
        *,
        decoder: Decoder,
        batch_size: int,
        seed: int,
        num_threads: int,
        device: torch.device,
        on_bad_sample: OnBadSample = "error",
        reads_ahead: bool = False,
        wait_limit_s: float = 300.0,
        size_at: Callable[[int], int] | None = None,
        num_copies: int = 1,
    ) -> None:
        reader = open_reader(beton, manifest)
        require_sides(beton, manifest, transform)
        self._labels = reader.labels
        self._num_ids = num_copies * len(reader.labels)
        self._file = np.asarray(np.memmap(beton, np.uint8, mode="r"))
        self.page_of_sample: NDArray[np.int64] = reader.pointers // reader.page_bytes
        """[num_samples]: in which page of the beton a sample lies."""
        self._page_bytes = reader.page_bytes
        self._beton = beton
        self._batch_size = batch_size
        self._reads_ahead = reads_ahead
        self._device = device
        self._wait_limit_s = wait_limit_s
        self._size_at = size_at or (lambda _: transform.size)
        self._decoders: dict[int, KeyedDecoder] = {}

        def open_decoder(size: int) -> KeyedDecoder:
            sized = transform.model_copy(update={"size": size})
            return KeyedDecoder(reader, sized, decoder, seed, num_threads, on_bad_sample)

        self._open_decoder = open_decoder
        self._decoder_at(0)  # what cannot be opened is told now

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Batches of `batch_size` in the order of `sample_ids` [any length]; the last may be short.

        id + k * number of samples is copy k of a sample, augmented by draws of its own.

        Raises Fault for a sample that does not decode or a batch that does not come; whatever ends the iteration, also
        leaving it early, ends its thread.
        """
        if sample_ids.ndim != 1 or not np.issubdtype(sample_ids.dtype, np.integer):
            raise ValueError(f"sample_ids must be a 1-D integer array, got {sample_ids.dtype} {sample_ids.shape}")
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < self._num_ids:
            raise ValueError(f"sample_ids {sample_ids.min()}..{sample_ids.max()} of {self._num_ids} samples")
        return self._batches(epoch, sample_ids.astype(np.int64))

    def close(self) -> None:
        """Ends the decoding threads, without waiting."""
        for decoder in self._decoders.values():
            decoder.close()

    def _decoder_at(self, epoch: int) -> KeyedDecoder:
        """Of the epoch's size: a thread that is still ending another epoch has its own."""
        size = self._size_at(epoch)
        if size not in self._decoders:
            self._decoders[size] = self._open_decoder(size)
        return self._decoders[size]

    def _batches(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        uses = first_uses(self.page_of_sample, sample_ids % len(self._labels)) if self._reads_ahead else []
        with ReadAhead(self._beton, self._page_bytes, uses, _BATCHES_READ_AHEAD * self._batch_size) as hints:
            yield from self._decoded(epoch, sample_ids, hints)

    def _decoded(self, epoch: int, sample_ids: NDArray[np.int64], hints: ReadAhead) -> Generator[Batch, None, None]:
        decoder = self._decoder_at(epoch)
        thread = EpochThread(
            str(self._beton),
            partial(decoder.decode, self._file, epoch),
            batch_places(decoder.size, self._device, self._batch_size),
            self._labels,
            sample_ids,
            self._batch_size,
            self._wait_limit_s,
        )
        try:
            for place in count(0, self._batch_size):
                hints.reached(place)
                if (batch := thread.next_batch()) is None:
                    return
                yield batch
        finally:
            thread.close()


def open_reader(beton: Path, manifest: Manifest) -> BetonReader:
    """Sizes first: a mapped file that is shorter than its pointers kills the process with SIGBUS.

    Then the digests of what is no image: headers and tables. The images' are `data-prep verify`'s business: 140 GB take
    minutes to read.
    """
    if not beton.is_file():
        raise UserError(f"{beton}: does not exist")
    if (actual_bytes := beton.stat().st_size) != manifest.beton_bytes:
        raise UserError(f"{beton}: has {actual_bytes} bytes, its manifest says {manifest.beton_bytes}")
    reader = BetonReader(beton)
    if len(reader) != manifest.num_samples:
        raise UserError(f"{beton}: has {len(reader)} samples, its manifest says {manifest.num_samples}")
    _require_digests(beton, manifest, reader)
    return reader


def _require_digests(beton: Path, manifest: Manifest, reader: BetonReader) -> None:
    if manifest.chunk_bytes != CHUNK_BYTES or not len(reader):
        return
    first_image, last_image = int(reader.pointers.min()), int((reader.pointers + reader.sizes).max())
    last_chunk = (manifest.beton_bytes - 1) // CHUNK_BYTES
    chunks = {*range(first_image // CHUNK_BYTES + 1), *range(last_image // CHUNK_BYTES, last_chunk + 1)}
    with beton.open("rb") as file:
        for chunk in sorted(chunks):
            file.seek(chunk * CHUNK_BYTES)
            if chunk_digest(file.read(CHUNK_BYTES), manifest.algorithm) != manifest.chunks[chunk]:
                raise UserError(
                    f"{beton}: bytes from {chunk * CHUNK_BYTES} on do not have the digest that its manifest tells: "
                    f"`data-prep verify {quote(str(beton))}` tells what changed; copy or convert it again"
                )


# The thread that decodes an epoch's batches ahead of training; neither side can wait for ever for the other.


Show = Callable[[NDArray[np.int64], NDArray[np.uint8]], None]
"""Fills images [N, size, size, 3] with what samples of the ids [N] show; where one is replaced, so is its id."""

_POLL_S = 0.5
"""How soon a waiting side sees that the other has gone."""
_JOIN_LIMIT_S = 5.0
_BATCHES_AHEAD = 3


class EpochThread(Thread):
    """Batches of `sample_ids` in their order; `next_batch` hands them out."""

    def __init__(
        self,
        name: str,
        show: Show,
        places: BatchPlaces,
        labels: NDArray[np.int64],
        sample_ids: NDArray[np.int64],
        batch_size: int,
        wait_limit_s: float,
    ) -> None:
        """`name`: of the data, for errors; `labels`: of all samples of the data; ids count modulo their number."""
        super().__init__(name="beton-epoch", daemon=True)
        self._data = name
        self._show = show
        self._places = places
        self._labels = labels
        self._sample_ids = sample_ids
        self._batch_size = batch_size
        self._wait_limit_s = wait_limit_s
        self._queue: Queue[Placed | BaseException | None] = Queue(_BATCHES_AHEAD)
        self._is_unwanted = Event()
        self.start()

    def run(self) -> None:
        try:
            for start in range(0, len(self._sample_ids), self._batch_size):
                if not self._offer(self._decoded(self._sample_ids[start : start + self._batch_size])):
                    return
            self._offer(None)
        except BaseException as error:  # noqa: BLE001 the consumer raises it
            self._offer(error)

    def next_batch(self) -> Batch | None:
        """None at the end. Raises what `run` raised."""
        deadline = time.monotonic() + self._wait_limit_s
        while True:
            alive = self.is_alive()  # before the look into the queue: a thread may put its last word and end
            try:
                item = self._queue.get(timeout=_POLL_S if alive else 0)
            except Empty:
                if not alive:
                    raise Fault(f"the loader thread of {self._data} died without a word") from None
                if time.monotonic() > deadline:
                    raise Fault(
                        f"{self._data}: no batch within {self._wait_limit_s:g} s; is the storage alive?"
                    ) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item.received() if item else None

    def close(self) -> None:
        """Ends the thread after the batch it is decoding, and waits for it (5 s at most)."""
        self._is_unwanted.set()
        while True:  # a thread that waits for room in the queue goes on at once
            try:
                self._queue.get_nowait()
            except Empty:
                break
        if self.is_alive() and self is not current_thread():
            self.join(_JOIN_LIMIT_S)

    def _decoded(self, sample_ids: NDArray[np.int64]) -> Placed:
        place = self._places.take(len(sample_ids))
        shown = sample_ids.copy()
        self._show(shown, place.numpy())
        num_replaced, shown = int((shown != sample_ids).sum()), shown % len(self._labels)
        return self._places.send(place, self._labels[shown], shown, num_replaced)

    def _offer(self, item: Placed | BaseException | None) -> bool:
        """Puts `item` when there is room; False when the consumer has gone."""
        while not self._is_unwanted.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False


# For `data.shuffle: page`: asks the kernel for a beton's pages before their samples are due, each as one long read.


def first_uses(page_of_sample: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(place in `sample_ids` where a page is first needed, page), ascending."""
    pages, places = np.unique(page_of_sample[sample_ids], return_index=True)
    return sorted(zip(places.tolist(), pages.tolist(), strict=True))


class ReadAhead:
    """Hints for one epoch. Opens the file; `with` closes it."""

    def __init__(self, beton: Path, page_bytes: int, uses: list[tuple[int, int]], ahead: int) -> None:
        """`ahead`: how many samples before its first use a page is asked for."""
        self._uses = uses
        self._next = 0
        self._page_bytes = page_bytes
        self._ahead = ahead
        self._file = os.open(beton, os.O_RDONLY)

    def reached(self, place: int) -> None:
        """Sample number `place` of the order is due. Does not wait for the disk."""
        while self._next < len(self._uses) and self._uses[self._next][0] < place + self._ahead:
            page = self._uses[self._next][1]
            os.posix_fadvise(self._file, page * self._page_bytes, self._page_bytes, os.POSIX_FADV_WILLNEED)
            self._next += 1

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.close(self._file)
