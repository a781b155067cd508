"""Batches of a beton in a given order: `BetonLoader` is all that training sees of ffcv, decoding and threads.

One loader serves all epochs of a process. What a batch holds depends on (beton, transform, decoder, seed, epoch, sample
ids) only: not on threads, batch size, worker count or where an epoch was resumed.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.beton.manifest import Manifest
from data_prep.beton.reader import BetonReader
from resnet_dist.data.batch import Batch
from resnet_dist.data.crops import Transform, require_sides
from resnet_dist.data.decoders import KeyedCropDecoder
from resnet_dist.data.ffcv_adapter import EpochThread, ImageLoader
from resnet_dist.data.kernels import Decoder
from resnet_dist.errors import UserError


class BetonLoader:
    """Decodes samples of one beton under one transform, `batch_size` at a time, on `num_threads` threads.

    A batch's tensors are the consumer's own: nothing writes to them later. `wait_limit_s` is the longest wait for one
    batch. UserError when beton and manifest or transform do not belong together, or `decoder` was not built.
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
        wait_limit_s: float = 300.0,
    ) -> None:
        reader = _open(beton, manifest)
        require_sides(beton, manifest, transform)
        self._labels = reader.labels
        self._device = device
        self._wait_limit_s = wait_limit_s
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="beton-decode")
        operation = KeyedCropDecoder(reader, transform, decoder, seed, self._pool, num_threads)
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
        thread = self._loader.start(epoch, sample_ids, self._wait_limit_s)
        try:
            while (item := thread.next_batch()) is not None:
                slot, ids, images = item
                labels = torch.from_numpy(self._labels[ids]).to(self._device)
                yield Batch(self._own_copy(thread, slot, images), labels, ids)
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


def _open(beton: Path, manifest: Manifest) -> BetonReader:
    """Sizes first: a mapped file that is shorter than its pointers kills the process with SIGBUS."""
    if not beton.is_file():
        raise UserError(f"{beton}: does not exist")
    if (actual_bytes := beton.stat().st_size) != manifest.beton_bytes:
        raise UserError(f"{beton}: has {actual_bytes} bytes, its manifest says {manifest.beton_bytes}")
    reader = BetonReader(beton)
    if len(reader) != manifest.num_samples:
        raise UserError(f"{beton}: has {len(reader)} samples, its manifest says {manifest.num_samples}")
    return reader
