"""ffcv's decoder operation for our transforms: keyed draws -> views -> pixels -> operations, and no bad sample passes.

The epoch comes in through ffcv's `storage_state` (its last element), which every iterator has of its own: nothing is
recompiled between epochs, and an abandoned iterator cannot see the next epoch. A batch is cut into chunks for a thread
pool; a sample's pixels depend on its key only, so neither threads nor chunks show in the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.reader import BetonReader
from resnet_dist.config.recipe_data import CenterCrop, OnBadSample
from resnet_dist.data.augment import draw_operations
from resnet_dist.data.crops import Transform, crop, num_draws
from resnet_dist.data.ffcv_names import AllocationQuery, Operation, State
from resnet_dist.data.kernels import OK, Decoder, StoredImages, open_kernel
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from resnet_dist.data.operations import Operator
from resnet_dist.data.order import replacement_ids
from resnet_dist.errors import Fault

_log = logging.getLogger(__name__)

_MIN_CHUNK_BYTES = 1 << 18
"""Decoded bytes of a chunk, about 1 ms of work: handing it to the pool takes 0.05 ms, which 32 px images must share."""
_CHUNKS_PER_THREAD = 4
"""Images differ in decoding time by half, so a thread that is done early takes another chunk."""


class KeyedCropDecoder(Operation):
    """Stored images to uint8 [N, size, size, 3], RGB.

    A sample that cannot be decoded is a `Fault` that names it; with on_bad_sample "skip" another takes its place
    (`order.replacement_ids`), shown under the draws of the one it stands for.
    """

    def __init__(
        self,
        reader: BetonReader,
        transform: Transform,
        decoder: Decoder,
        seed: int,
        pool: Executor,
        num_threads: int,
        on_bad_sample: OnBadSample = "error",
    ) -> None:
        super().__init__()
        self._reader = reader
        self._transform = transform
        self._seed = seed
        self._pool = pool
        self._num_threads = num_threads
        self._on_bad_sample = on_bad_sample
        self._num_draws = num_draws(transform)
        self._augment = () if isinstance(transform, CenterCrop) else transform.augment
        self._operator = Operator() if self._augment else None
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
        """Fills and returns `images`; the id of a replaced sample is replaced in `sample_ids` too."""
        file, epoch = storage_state
        statuses = self._show(file, epoch, sample_ids, sample_ids, images)
        for place in np.flatnonzero(statuses != OK).tolist():
            self._replace(file, epoch, sample_ids[place : place + 1], images[place : place + 1], int(statuses[place]))
        return images

    def _show(
        self,
        file: NDArray[np.uint8],
        epoch: int,
        sample_ids: NDArray[np.int64],
        draws_of: NDArray[np.int64],
        images: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """Decodes samples under the draws of the samples `draws_of`; returns the statuses."""
        stored = self._stored_images(sample_ids)
        keys = sample_keys(Stream.AUGMENTATION, self._seed, epoch, draws_of)
        views, flips = crop(self._transform, stored.heights, stored.widths, uniform(keys, self._num_draws))
        operations = draw_operations(
            self._augment, self._transform.size, sample_keys(Stream.PIXELS, self._seed, epoch, draws_of)
        )
        statuses = np.empty(len(sample_ids), np.int64)

        def decode(part: slice) -> None:
            self._kernel.decode(file, stored.part(part), views[part], flips[part], images[part], statuses[part])
            if self._operator is not None:
                self._operator.apply(operations[part], images[part])

        for done in [self._pool.submit(decode, part) for part in self._chunks(len(sample_ids))]:
            done.result()
        return statuses

    def _replace(
        self, file: NDArray[np.uint8], epoch: int, sample_id: NDArray[np.int64], image: NDArray[np.uint8], status: int
    ) -> None:
        """`sample_id` [1] and `image` [1, size, size, 3] become another sample's."""
        bad = sample_id.copy()
        told = f"sample {bad[0]} of {self._reader.path} cannot be decoded: {self._reason(file, epoch, bad, status)}"
        if self._on_bad_sample == "error":
            raise Fault(f"{told}; check with `data-prep verify`, or set data.on_bad_sample: skip")
        others = replacement_ids(len(self._reader), self._seed, epoch, int(bad[0]))
        for other in others:
            sample_id[0] = other
            if self._show(file, epoch, sample_id, bad, image)[0] == OK:
                _log.warning("%s; sample %d takes its place in epoch %d", told, other, epoch)
                return
        raise Fault(f"{told}, nor can {len(others)} that might take its place; check with `data-prep verify`")

    def _reason(self, file: NDArray[np.uint8], epoch: int, sample_id: NDArray[np.int64], status: int) -> str:
        stored = self._stored_images(sample_id)
        draws = uniform(sample_keys(Stream.AUGMENTATION, self._seed, epoch, sample_id), self._num_draws)
        views, _ = crop(self._transform, stored.heights, stored.widths, draws)
        return self._kernel.explain(file, stored, views, self._transform.size, status)

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
