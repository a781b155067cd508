"""Sample ids in, what training sees of them out: keyed draws -> views -> pixels -> operations; no bad sample passes.

Whole batches at a time: the draws in numpy, the pixels in a kernel with threads of its own. A sample's pixels depend on
its key only, so neither threads nor batches show in the result.
"""

from __future__ import annotations

import logging
from shlex import quote
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.reader import BetonReader
from data_prep.native import open_library
from resnet_dist.config.recipe import CenterCrop, OnBadSample
from resnet_dist.data.augment import Operations, draw_operations
from resnet_dist.data.crops import Transform, Views, crop, num_draws
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from resnet_dist.data.order import replacement_ids
from resnet_dist.errors import Fault

_log = logging.getLogger(__name__)


class KeyedDecoder:
    """Stored images to uint8 [N, size, size, 3], RGB.

    Copy k of a sample, its id + k * number of samples, has draws of its own.
    A sample that cannot be decoded is a `Fault` that names it; with on_bad_sample "skip" another takes its place
    (`order.replacement_ids`), shown under the draws of the one it stands for. UserError when `decoder`, or what the
    transform needs besides, was not built.
    """

    def __init__(
        self,
        reader: BetonReader,
        transform: Transform,
        decoder: Decoder,
        seed: int,
        num_threads: int,
        on_bad_sample: OnBadSample = "error",
    ) -> None:
        self.size = transform.size
        self._reader = reader
        self._transform = transform
        self._seed = seed
        self._on_bad_sample = on_bad_sample
        self._num_draws = num_draws(transform)
        self._augment = () if isinstance(transform, CenterCrop) else transform.augment
        if self._augment:
            open_library("data.train.augment needs it")
        pixels = reader.heights.astype(np.int64) * reader.widths
        self._kernel = open_kernel(decoder, num_threads, 3 * int(pixels.max(initial=1)))

    def decode(
        self, file: NDArray[np.uint8], epoch: int, sample_ids: NDArray[np.int64], images: NDArray[np.uint8]
    ) -> None:
        """Fills `images` from the mapped `file`; the id of a replaced sample is replaced in `sample_ids` too."""
        statuses = self._show(file, epoch, sample_ids, sample_ids, images)
        for place in np.flatnonzero(statuses != OK).tolist():
            self._replace(file, epoch, sample_ids[place : place + 1], images[place : place + 1], int(statuses[place]))

    def close(self) -> None:
        """Ends the kernel's threads, without waiting."""
        self._kernel.close()

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
        self._kernel.decode(file, stored, views, flips, operations, images, statuses)
        return statuses

    def _replace(
        self, file: NDArray[np.uint8], epoch: int, sample_id: NDArray[np.int64], image: NDArray[np.uint8], status: int
    ) -> None:
        """`sample_id` [1] and `image` [1, size, size, 3] become another sample's."""
        bad = sample_id.copy()
        number, reason = bad[0] % len(self._reader), self._reason(file, epoch, bad, status)
        told = f"sample {number} of {self._reader.path} cannot be decoded: {reason}"
        lists_all = f"`data-prep verify {quote(str(self._reader.path))} --decode all` lists all such samples"
        leaves_out = "converting again with --on-error quarantine leaves them out, on the record"
        if self._on_bad_sample == "error" and isinstance(self._transform, CenterCrop):
            raise Fault(f"{told}. An evaluation counts every sample, so none is skipped: {lists_all}, {leaves_out}")
        if self._on_bad_sample == "error":
            raise Fault(f"{told}; {lists_all}, {leaves_out}; or set data.on_bad_sample: skip")
        others = replacement_ids(len(self._reader), self._seed, epoch, int(bad[0]))
        for other in others:
            sample_id[0] = other
            if self._show(file, epoch, sample_id, bad, image)[0] == OK:
                _log.warning("%s; sample %d takes its place in epoch %d", told, other, epoch)
                return
        raise Fault(f"{told}, nor can {len(others)} that might take its place; {lists_all}")

    def _reason(self, file: NDArray[np.uint8], epoch: int, sample_id: NDArray[np.int64], status: int) -> str:
        stored = self._stored_images(sample_id)
        draws = uniform(sample_keys(Stream.AUGMENTATION, self._seed, epoch, sample_id), self._num_draws)
        views, _ = crop(self._transform, stored.heights, stored.widths, draws)
        return self._kernel.explain(file, stored, views, self._transform.size, status)

    def _stored_images(self, sample_ids: NDArray[np.int64]) -> StoredImages:
        reader, sample_ids = self._reader, sample_ids % len(self._reader)
        return StoredImages(
            reader.pointers[sample_ids],
            reader.sizes[sample_ids],
            reader.modes[sample_ids],
            reader.heights[sample_ids].astype(np.int64),
            reader.widths[sample_ids].astype(np.int64),
        )


# What the hot loop is given and gives. Two do it: `native_kernel.py`, and `ffcv_kernel.py` around libffcv.


Decoder = Literal["native", "ffcv"]

OK = 0
"""The status of an image that was decoded; the others are each kernel's own."""


class StoredImages(NamedTuple):
    """N images as they lie in the file: five arrays [N]."""

    offsets: NDArray[np.int64]
    """Of the first byte, from the start of the file."""
    sizes: NDArray[np.int64]
    """Bytes."""
    modes: NDArray[np.uint8]
    heights: NDArray[np.int64]
    """px"""
    widths: NDArray[np.int64]
    """px"""


class Kernel(Protocol):
    def decode(
        self,
        file: NDArray[np.uint8],
        stored: StoredImages,
        views: Views,
        flips: NDArray[np.bool_],
        operations: Operations,
        images: NDArray[np.uint8],
        statuses: NDArray[np.int64],
    ) -> None:
        """Writes what `views` shows of N images, mirrored where `flips` says so, and applies their `operations` to it.

        file: uint8 [bytes of the beton]; operations: [N, K]; images: uint8 [N, size, size, 3], RGB; statuses: [N].
        Pixels of an image whose status is not OK are undefined. Calls of several threads come one after the other.
        """

    def explain(self, file: NDArray[np.uint8], stored: StoredImages, views: Views, size: int, status: int) -> str:
        """Why the one image given, shown as `size` x `size` px, ended with `status`."""

    def close(self) -> None:
        """Ends the threads, each after what it works on; does not wait for them."""


# The kernel that a recipe's decoder means.


def open_kernel(decoder: Decoder, num_threads: int, max_image_bytes: int) -> Kernel:
    """`max_image_bytes`: of the largest image, decoded. UserError if the native kernel was not built."""
    kernel: Any  # imported here: numba and ffcv take seconds, and the native kernel may be missing
    if decoder == "native":
        from resnet_dist.data.native_kernel import NativeKernel

        kernel = NativeKernel(num_threads)
    else:
        from resnet_dist.data.ffcv_kernel import FfcvKernel

        kernel = FfcvKernel(num_threads, max_image_bytes)
    return kernel
