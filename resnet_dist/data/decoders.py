"""ffcv's decoder operation for our three transforms: keyed draws -> crop boxes -> pixels, and no bad sample passes.

The epoch comes in through ffcv's `storage_state` (its last element), which every iterator has of its own: nothing is
recompiled between epochs, and an abandoned iterator cannot see the next epoch. A batch is cut into chunks for a thread
pool; a sample's pixels depend on its key only, so neither threads nor chunks show in the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.reader import BetonReader
from resnet_dist.data import pixel_kernel
from resnet_dist.data.crops import Transform, crop, num_draws
from resnet_dist.data.ffcv_names import AllocationQuery, Operation, State, ctypes_imdecode, ctypes_resize, lib
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from resnet_dist.data.pixel_kernel import LibraryAddresses, StoredImages
from resnet_dist.errors import Fault

_MIN_CHUNK_BYTES = 1 << 18
"""Decoded bytes of a chunk, about 1 ms of work: handing it to the pool takes 0.05 ms, which 32 px images must share."""
_CHUNKS_PER_THREAD = 4
"""Images differ in decoding time by half, so a thread that is done early takes another chunk."""

_REASONS = {
    pixel_kernel.JPEG_SIZE_DIFFERS: "the JPEG's size is not the one the beton says",
    pixel_kernel.RAW_SIZE_DIFFERS: "the raw pixels do not have the size the beton says",
    pixel_kernel.MODE_UNKNOWN: "its storage mode is unknown",
}


class KeyedCropDecoder(Operation):
    """Stored images to uint8 [N, size, size, 3], RGB; `Fault` names the first sample of a batch that fails."""

    def __init__(self, reader: BetonReader, transform: Transform, seed: int, pool: Executor, num_threads: int) -> None:
        super().__init__()
        self._reader = reader
        self._transform = transform
        self._seed = seed
        self._pool = pool
        self._num_threads = num_threads
        self._num_draws = num_draws(transform)
        self._library = LibraryAddresses(_address(ctypes_imdecode), _address(ctypes_resize))
        self._last_jpeg_error = ctypes.CFUNCTYPE(ctypes.c_char_p)(("tjGetErrorStr", lib))
        pixels = reader.heights.astype(np.int64) * reader.widths
        self._max_image_bytes = 3 * int(pixels.max(initial=1))

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
        boxes, flips = crop(self._transform, stored.heights, stored.widths, uniform(keys, self._num_draws))
        statuses = np.empty(len(sample_ids), np.int64)

        def decode(part: slice) -> None:
            pixel_kernel.decode_crop_resize(
                self._library,
                file,
                stored.part(part),
                boxes[part],
                flips[part],
                self._max_image_bytes,
                images[part],
                statuses[part],
            )

        for done in [self._pool.submit(decode, part) for part in self._chunks(len(sample_ids))]:
            done.result()
        for bad in np.flatnonzero(statuses)[:1]:
            raise Fault(self._explain(int(sample_ids[bad]), int(statuses[bad])))
        return images

    def _chunks(self, num_images: int) -> list[slice]:
        smallest = -(-_MIN_CHUNK_BYTES // self._max_image_bytes)
        length = max(smallest, -(-num_images // (_CHUNKS_PER_THREAD * self._num_threads)))
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

    def _explain(self, sample_id: int, status: int) -> str:
        reason = _REASONS.get(status) or f"its JPEG is broken: {self._jpeg_error(sample_id)}"
        return f"sample {sample_id} of {self._reader.path} cannot be decoded: {reason}; check with `data-prep verify`"

    def _jpeg_error(self, sample_id: int) -> str:
        """libjpeg-turbo's words. It keeps those of a thread's last call, so the image is decoded once more, here."""
        data = np.frombuffer(self._reader.image_bytes(sample_id), np.uint8)
        height, width = self._reader.height(sample_id), self._reader.width(sample_id)
        pixels = np.empty((height, width, 3), np.uint8)
        source, destination = data.ctypes.data, pixels.ctypes.data
        ctypes_imdecode(source, data.size, height, width, destination, height, width, 0, 0, 1, 1, False, False)
        return (self._last_jpeg_error() or b"").decode("ascii", errors="replace")


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
