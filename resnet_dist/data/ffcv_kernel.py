"""The kernel around libffcv, stock ffcv's decoder, for `data.decoder: ffcv`.

It knows whole pixels only, and no window of a resized image: a view becomes the box that shows the same to half a px.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data import pixel_kernel
from resnet_dist.data.crops import Boxes, Sides, Views
from resnet_dist.data.ffcv_names import ctypes_imdecode, ctypes_resize, lib
from resnet_dist.data.kernels import StoredImages
from resnet_dist.data.operations import Operations, Operator
from resnet_dist.data.pixel_kernel import LibraryAddresses

_MIN_CHUNK_BYTES = 1 << 18
"""Decoded bytes of a chunk, about 1 ms of work: handing it to the pool takes 0.05 ms, which 32 px images must share."""
_CHUNKS_PER_THREAD = 4
"""Images differ in decoding time by half, so a thread that is done early takes another chunk."""

_REASONS = {
    pixel_kernel.JPEG_SIZE_DIFFERS: "the JPEG's size is not the one the beton says",
    pixel_kernel.RAW_SIZE_DIFFERS: "the raw pixels do not have the size the beton says",
    pixel_kernel.MODE_UNKNOWN: "its storage mode is unknown",
}


class FfcvKernel:
    """`resnet_dist.data.kernels.Kernel`."""

    def __init__(self, num_threads: int, max_image_bytes: int) -> None:
        self._num_threads = num_threads
        self._max_image_bytes = max_image_bytes
        self._min_chunk = -(-_MIN_CHUNK_BYTES // max(max_image_bytes, 1))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="beton-decode")
        self._operator: Operator | None = None
        self._library = LibraryAddresses(_address(ctypes_imdecode), _address(ctypes_resize))
        self._last_jpeg_error = ctypes.CFUNCTYPE(ctypes.c_char_p)(("tjGetErrorStr", lib))

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
        boxes = whole_pixel_boxes(views, images.shape[1])
        operator = self._open_operator() if operations.shape[1] else None

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
            if operator is not None:
                operator.apply(operations[part], images[part])

        for done in [self._pool.submit(decode, part) for part in self._chunks(len(statuses))]:
            done.result()

    def explain(self, file: NDArray[np.uint8], stored: StoredImages, views: Views, size: int, status: int) -> str:
        if status in _REASONS:
            return _REASONS[status]
        # libjpeg-turbo keeps the words of a thread's last call, so the image is decoded once more, in this thread.
        (offset,), (num_bytes,), (height,), (width,) = stored.offsets, stored.sizes, stored.heights, stored.widths
        pixels = np.empty((height, width, 3), np.uint8)
        source, destination = file.ctypes.data + int(offset), pixels.ctypes.data
        sides = (int(height), int(width))
        ctypes_imdecode(source, int(num_bytes), *sides, destination, *sides, 0, 0, 1, 1, False, False)
        return f"its JPEG is broken: {(self._last_jpeg_error() or b'').decode('ascii', errors='replace')}"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open_operator(self) -> Operator:
        self._operator = self._operator or Operator()
        return self._operator

    def _chunks(self, num_images: int) -> list[slice]:
        length = max(self._min_chunk, -(-num_images // (_CHUNKS_PER_THREAD * self._num_threads)))
        return [slice(start, min(start + length, num_images)) for start in range(0, num_images, length)]


def whole_pixel_boxes(views: Views, size: int) -> Boxes:
    """The boxes of the stored images that the windows of `size` px show, to the nearest px (a half up)."""
    top, left, height, width, resized_height, resized_width, window_top, window_left = views.T
    tops, heights = _stretch(top, height, resized_height, window_top, size)
    lefts, widths = _stretch(left, width, resized_width, window_left, size)
    return np.stack([tops, lefts, heights, widths], axis=1)


def _stretch(start: Sides, length: Sides, resized: Sides, window: Sides, size: int) -> tuple[Sides, Sides]:
    shown = np.maximum((2 * size * length + resized) // (2 * resized), 1)
    first = (2 * window * length + resized) // (2 * resized)
    inside = np.minimum(first, length - shown)  # both may have been rounded up
    return start + np.where(resized == length, first, inside), shown


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
