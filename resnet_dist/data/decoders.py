"""ffcv's decoder operation for our three transforms: keyed draws -> views -> pixels, and no bad sample passes.

The epoch comes in through ffcv's `storage_state` (its last element), which every iterator has of its own: nothing is
recompiled between epochs, and an abandoned iterator cannot see the next epoch. A batch is cut into chunks for a thread
pool; a sample's pixels depend on its key only, so neither threads nor chunks show in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.reader import BetonReader
from resnet_dist.data.crops import Transform, crop, num_draws
from resnet_dist.data.ffcv_names import AllocationQuery, Operation, State
from resnet_dist.data.kernels import OK, Decoder, StoredImages, open_kernel
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from resnet_dist.errors import Fault

_MIN_CHUNK_BYTES = 1 << 18
"""Decoded bytes of a chunk, about 1 ms of work: handing it to the pool takes 0.05 ms, which 32 px images must share."""
_CHUNKS_PER_THREAD = 4
"""Images differ in decoding time by half, so a thread that is done early takes another chunk."""


class KeyedCropDecoder(Operation):
    """Stored images to uint8 [N, size, size, 3], RGB; `Fault` names the first sample of a batch that fails."""

    def __init__(
        self,
        reader: BetonReader,
        transform: Transform,
        decoder: Decoder,
        seed: int,
        pool: Executor,
        num_threads: int,
    ) -> None:
        super().__init__()
        self._reader = reader
        self._transform = transform
        self._seed = seed
        self._pool = pool
        self._num_threads = num_threads
        self._num_draws = num_draws(transform)
        pixels = reader.heights.astype(np.int64) * reader.widths
        max_image_bytes = 3 * int(pixels.max(initial=1))
        self._min_chunk = -(-_MIN_CHUNK_BYTES // max_image_bytes)
        self._kernel = open_kernel(decoder, max_image_bytes)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self._transform.size, self._transform.size, 3), np.dtype(np.uint8)
        return replace(previous_state, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        return self._decode_batch

    def _decode_batch(
        self, sample_ids: NDArray[np.int64], images: NDArray[np.uint8], metadata: Any, storage_state: tuple[Any, ...]
    ) -> NDArray[np.uint8]:
        file, epoch = storage_state
        stored = self._stored_images(sample_ids)
        keys = sample_keys(Stream.AUGMENTATION, self._seed, epoch, sample_ids)
        views, flips = crop(self._transform, stored.heights, stored.widths, uniform(keys, self._num_draws))
        statuses = np.empty(len(sample_ids), np.int64)

        def decode(part: slice) -> None:
            self._kernel.decode(file, stored.part(part), views[part], flips[part], images[part], statuses[part])

        for done in [self._pool.submit(decode, part) for part in self._chunks(len(sample_ids))]:
            done.result()
        for bad in np.flatnonzero(statuses != OK)[:1]:
            part = slice(bad, bad + 1)
            reason = self._kernel.explain(file, stored.part(part), views[part], images.shape[1], int(statuses[bad]))
            raise Fault(
                f"sample {sample_ids[bad]} of {self._reader.path} cannot be decoded: {reason}; "
                "check with `data-prep verify`"
            )
        return images

    def _chunks(self, num_images: int) -> list[slice]:
        length = max(self._min_chunk, -(-num_images // (_CHUNKS_PER_THREAD * self._num_threads)))
        return [slice(start, min(start + length, num_images)) for start in range(0, num_images, length)]

    def _stored_images(self, sample_ids: NDArray[np.int64]) -> StoredImages:
        reader = self._reader
        return StoredImages(
            reader.pointers[sample_ids],
            reader.sizes[sample_ids],
            reader.modes[sample_ids],
            reader.heights[sample_ids].astype(np.int64),
            reader.widths[sample_ids].astype(np.int64),
        )
