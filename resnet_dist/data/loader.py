"""Batches of a beton in a given order: `BetonLoader` is all that training sees of ffcv, decoding and threads.

One loader serves all epochs of a process. What a batch holds depends on (beton, transform, decoder, seed, epoch, sample
ids) only: not on threads, batch size, worker count or where an epoch was resumed.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.beton.digest import CHUNK_BYTES, chunk_digest
from data_prep.beton.manifest import Manifest
from data_prep.beton.reader import BetonReader
from resnet_dist.config.recipe_data import OnBadSample
from resnet_dist.data.batch import Batch
from resnet_dist.data.crops import Transform, require_sides
from resnet_dist.data.decoders import KeyedCropDecoder
from resnet_dist.data.ffcv_adapter import EpochThread, ImageLoader
from resnet_dist.data.kernels import Decoder
from resnet_dist.data.read_ahead import ReadAhead, first_uses
from resnet_dist.errors import UserError

_BATCHES_READ_AHEAD = 16
"""Samples of 16 batches of 64 lie in about 13 pages of 8 MiB: a second of reading for a disk of 100 MB/s."""


class BetonLoader:
    """Decodes samples of one beton under one transform, `batch_size` at a time, on `num_threads` threads.

    A batch's tensors are the consumer's own: nothing writes to them later. With `reads_ahead` the pages of the file are
    asked for before they are due, which pays where samples come in `order.page_permutation`. `wait_limit_s` is the
    longest wait for one batch. UserError when beton and manifest or transform do not belong together, or `decoder` was
    not built.
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
    ) -> None:
        reader = open_reader(beton, manifest)
        require_sides(beton, manifest, transform)
        self._labels = reader.labels
        self.page_of_sample: NDArray[np.int64] = reader.pointers // reader.page_bytes
        """[num_samples]: in which page of the beton a sample lies."""
        self._page_bytes = reader.page_bytes
        self._beton = beton
        self._batch_size = batch_size
        self._reads_ahead = reads_ahead
        self._device = device
        self._wait_limit_s = wait_limit_s
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="beton-decode")
        operation = KeyedCropDecoder(reader, transform, decoder, seed, self._pool, num_threads, on_bad_sample)
        self._loader = ImageLoader(beton, operation, batch_size)

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Batches of `batch_size` in the order of `sample_ids` [any length]; the last may be short.

        Raises Fault for a sample that does not decode or a batch that does not come; whatever ends the iteration, also
        leaving it early, ends its thread.
        """
        if sample_ids.ndim != 1 or not np.issubdtype(sample_ids.dtype, np.integer):
            raise ValueError(f"sample_ids must be a 1-D integer array, got {sample_ids.dtype} {sample_ids.shape}")
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < len(self._labels):
            raise ValueError(f"sample_ids {sample_ids.min()}..{sample_ids.max()} of {len(self._labels)} samples")
        return self._batches(epoch, sample_ids.astype(np.int64))

    def close(self) -> None:
        """Ends the decoding threads, without waiting. An epoch still being iterated fails at its next batch."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        uses = first_uses(self.page_of_sample, sample_ids) if self._reads_ahead else []
        with ReadAhead(self._beton, self._page_bytes, uses, _BATCHES_READ_AHEAD * self._batch_size) as hints:
            yield from self._decoded(epoch, sample_ids, hints)

    def _decoded(self, epoch: int, sample_ids: NDArray[np.int64], hints: ReadAhead) -> Generator[Batch, None, None]:
        thread = self._loader.start(epoch, sample_ids, self._wait_limit_s)
        try:
            for place in count(0, self._batch_size):
                hints.reached(place)
                if (item := thread.next_batch()) is None:
                    return
                labels = torch.from_numpy(self._labels[item.sample_ids]).to(self._device)
                images = self._own_copy(thread, item.slot, item.images)
                yield Batch(images, labels, item.sample_ids, item.num_replaced)
        finally:
            thread.close()

    def _own_copy(self, thread: EpochThread, slot: int, images: NDArray[np.uint8]) -> torch.Tensor:
        """Out of ffcv's ring of buffers, which is written to again some batches later."""
        if self._device.type != "cuda":
            # numpy's copy: torch's starts OpenMP threads, which spin for a while when they are done.
            return torch.from_numpy(images.copy()).to(self._device)
        ring = torch.from_numpy(images)
        # Untested: no GPU at hand. ffcv pins the ring where CUDA is there; the thread waits for the event before it
        # writes to the slot again.
        copy = ring.to(self._device, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        thread.copied[slot] = event
        return copy


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
            if chunk_digest(file.read(CHUNK_BYTES)) != manifest.chunks[chunk]:
                raise UserError(
                    f"{beton}: bytes from {chunk * CHUNK_BYTES} on do not have the digest that its manifest tells: "
                    "ask `data-prep verify` what changed, and copy or convert it again"
                )
