"""The decode kernel around libffcv, stock ffcv's decoder, for `data.decoder: ffcv`.

libffcv decodes with libjpeg-turbo's fast integer DCT and resizes with OpenCV's INTER_AREA (how far its pixels are from
Pillow's: README.md). It supports whole pixels only, and no window of a resized image: a view becomes the box that shows
the same to half a px. What libjpeg-turbo warns about (a premature end, junk between markers) counts as
broken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from resnet_dist.data.augment import Operations, apply_operations
from resnet_dist.data.crops import Boxes, Sides, Views
from resnet_dist.data.kernel import StoredImages

_intra_op_threads = torch.get_num_threads()
from ffcv.libffcv import ctypes_imdecode, ctypes_resize, lib  # noqa: E402

torch.set_num_threads(_intra_op_threads)  # importing ffcv sets it to 1, which would change the sums of CPU kernels

OK, JPEG_BROKEN, JPEG_SIZE_DIFFERS, RAW_SIZE_DIFFERS, MODE_UNKNOWN = range(5)
"""Statuses of an image."""

_MODE_JPEG, _MODE_RAW = 0, 1  # as ffcv's RGBImageField numbers them

_MIN_CHUNK_BYTES = 1 << 18
"""Decoded bytes of a chunk, about 1 ms of work: handing it to the pool takes 0.05 ms, which 32 px images must share."""
_CHUNKS_PER_THREAD = 4
"""Decoding times vary by half, so a thread that is done early takes another chunk."""

_REASONS = {
    JPEG_SIZE_DIFFERS: "the JPEG's size is not the one the beton says",
    RAW_SIZE_DIFFERS: "the raw pixels do not have the size the beton says",
    MODE_UNKNOWN: "its storage mode is unknown",
}


class FfcvKernel:
    """`resnet_dist.data.decoder.Kernel`."""

    def __init__(self, num_threads: int, max_image_bytes: int) -> None:
        self._num_threads = num_threads
        self._max_image_bytes = max_image_bytes
        self._min_chunk = -(-_MIN_CHUNK_BYTES // max(max_image_bytes, 1))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="beton-decode")
        self._library = LibraryAddresses(_address(ctypes_imdecode), _address(ctypes_resize))
        self._last_jpeg_error = ctypes.CFUNCTYPE(ctypes.c_char_p)(("tjGetErrorStr", lib))

    def decode(
        self,
        file: NDArray[np.uint8],
        stored: StoredImages,
        views: Views,
        operations: Operations,
        images: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        statuses = np.empty(len(images), np.int64)
        boxes, mirrored = whole_pixel_boxes(views, images.shape[1]), views["mirrored"] != 0

        def decode(part: slice) -> None:
            decode_crop_resize(
                self._library,
                file,
                stored[part],
                boxes[part],
                mirrored[part],
                self._max_image_bytes,
                images[part],
                statuses[part],
            )
            if operations.shape[1]:
                apply_operations(operations[part], images[part])

        for done in [self._pool.submit(decode, part) for part in self._chunks(len(statuses))]:
            done.result()
        return statuses

    def explain(self, file: NDArray[np.uint8], stored: StoredImages, views: Views, size: int, status: int) -> str:
        if status in _REASONS:
            return _REASONS[status]
        # libjpeg-turbo keeps the message of a thread's last call, so the image is decoded again in this thread.
        offset, num_bytes, height, width, _ = stored[0].tolist()
        pixels = np.empty((height, width, 3), np.uint8)
        source, destination, sides = file.ctypes.data + offset, pixels.ctypes.data, (height, width)
        ctypes_imdecode(source, num_bytes, *sides, destination, *sides, 0, 0, 1, 1, False, False)
        return f"its JPEG is broken: {(self._last_jpeg_error() or b'').decode('ascii', errors='replace')}"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _chunks(self, num_images: int) -> list[slice]:
        length = max(self._min_chunk, -(-num_images // (_CHUNKS_PER_THREAD * self._num_threads)))
        return [slice(start, min(start + length, num_images)) for start in range(0, num_images, length)]


def whole_pixel_boxes(views: Views, size: int) -> Boxes:
    """The boxes of the stored images that the windows of `size` px show, to the nearest px (halves are rounded up)."""
    v = views
    tops, heights = _stretch(v["box_top"], v["box_height"], v["resized_height"], v["window_top"], size)
    lefts, widths = _stretch(v["box_left"], v["box_width"], v["resized_width"], v["window_left"], size)
    return np.stack([tops, lefts, heights, widths], axis=1)


def _stretch(start: Sides, length: Sides, resized: Sides, window: Sides, size: int) -> tuple[Sides, Sides]:
    shown = np.maximum((2 * size * length + resized) // (2 * resized), 1)
    first = (2 * window * length + resized) // (2 * resized)
    inside = np.minimum(first, length - shown)  # both may have been rounded up
    return start + np.where(resized == length, first, inside), shown


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


# Stored bytes and boxes to pixels, compiled by numba. The machine code is kept on disk: compilation takes seconds once
# per machine, loading takes milliseconds in every later process. All that it inlines is in this file: numba's cache
# watches no other.

_Function = TypeVar("_Function", bound=Callable[..., Any])


class LibraryAddresses(NamedTuple):
    """Addresses of libffcv's functions in this process. Passed as data: numba cannot cache code with pointers."""

    imdecode: int
    resize: int


def _compiled(function: _Function) -> _Function:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor any cache folder is writable: compile in every process
        return njit(nogil=True)(function)


@intrinsic
def _imdecode(typing_context, address, source, size, height, width, destination):  # type: ignore[no-untyped-def]
    """`imdecode` of libffcv on the whole image, unscaled: 0, or -1 on an error or a warning of libjpeg-turbo."""
    signature = types.int32(*[types.int64] * 6)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        c_type = ir.FunctionType(i32, [i64, i64, i32, i32, i64, *[i32] * 6, i8, i8])
        function = builder.inttoptr(values[0], c_type.as_pointer())
        h, w = builder.trunc(values[3], i32), builder.trunc(values[4], i32)
        no_crop = [h, w, i32(0), i32(0), i32(1), i32(1), i8(0), i8(0)]  # y, x, numerator, denominator, crop, flip
        return builder.call(function, [values[1], values[2], h, w, values[5], *no_crop])

    return signature, codegen


@intrinsic
def _resize(typing_context, address, source, height, width, box, destination, size):  # type: ignore[no-untyped-def]
    """`resize` of libffcv: `box` (top, bottom, left, right) of the source to `size` x `size`."""
    signature = types.void(*[types.int64] * 4, types.UniTuple(types.int64, 4), types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        i64 = ir.IntType(64)
        function = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [i64] * 11).as_pointer())
        box = [builder.extract_value(values[4], k) for k in range(4)]
        builder.call(function, [i64(0), *values[1:4], *box, values[5], values[6], values[6]])
        return context.get_dummy_value()

    return signature, codegen


@_compiled
def jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width in the JPEG's frame header; (0, 0) where no frame header can be reached."""
    at = 2
    while at + 9 <= data.size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # TEM, RSTn: no length
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:  # SOFn, not DHT, JPG, DAC
            return (int(data[at + 5]) << 8) + int(data[at + 6]), (int(data[at + 7]) << 8) + int(data[at + 8])
        else:
            at += 2 + (int(data[at + 2]) << 8) + int(data[at + 3])
    return 0, 0


@_compiled
def _decode(library, data, mode, height, width, pixels):  # type: ignore[no-untyped-def]
    """Fills `pixels` (height * width * 3 bytes) from `data`; returns the status."""
    if mode == _MODE_RAW:
        if data.size != pixels.size:
            return RAW_SIZE_DIFFERS
        pixels[:] = data
        return OK
    if mode != _MODE_JPEG:
        return MODE_UNKNOWN
    frame_height, frame_width = jpeg_size(data)
    if frame_height == 0 or frame_width == 0:
        return JPEG_BROKEN
    # libffcv would scale a JPEG of another size into the buffer, return 0, and leave the rest of the buffer as it was.
    if frame_height != height or frame_width != width:
        return JPEG_SIZE_DIFFERS
    if _imdecode(library.imdecode, data.ctypes.data, data.size, height, width, pixels.ctypes.data) != 0:
        return JPEG_BROKEN
    return OK


@_compiled
def _copy_with_zeros_outside(image, top, left, output):  # type: ignore[no-untyped-def]
    size = output.shape[0]
    output[:] = 0
    first_row, last_row = max(0, -top), min(size, image.shape[0] - top)
    first_column, last_column = max(0, -left), min(size, image.shape[1] - left)
    for row in range(first_row, last_row):
        for column in range(first_column, last_column):
            for channel in range(3):
                output[row, column, channel] = image[top + row, left + column, channel]


@_compiled
def _mirror(image):  # type: ignore[no-untyped-def]
    width = image.shape[1]
    for row in range(image.shape[0]):
        for left in range(width // 2):
            right = width - 1 - left
            for channel in range(3):
                kept = image[row, left, channel]
                image[row, left, channel] = image[row, right, channel]
                image[row, right, channel] = kept


@_compiled
def decode_crop_resize(  # type: ignore[no-untyped-def]
    library, file, stored, boxes, mirrored, max_image_bytes, images, statuses
):
    """Decodes N images and writes box, resized and mirrored, of each.

    Args:
        library: LibraryAddresses.
        file: uint8 [file bytes].
        stored: STORED_IMAGE [N].
        boxes: int64 [N, 4] (top, left, height, width), within the image unless height and width are the output's.
        mirrored: bool [N].
        max_image_bytes: the largest height * width * 3.
        images: uint8 [N, size, size, 3], written; undefined where the status is not OK.
        statuses: int64 [N], written.
    """
    # One image's memory per call, so per thread; ffcv keeps one per sample of every batch in flight, which is 960 MB at
    # 500 px and batch 256.
    scratch = np.empty(max_image_bytes, np.uint8)
    size = images.shape[1]
    for k in range(len(images)):
        image = stored[k]
        height, width = image["height"], image["width"]
        data = file[image["offset"] : image["offset"] + image["bytes"]]
        pixels = scratch[: height * width * 3]
        statuses[k] = _decode(library, data, image["mode"], height, width, pixels)
        if statuses[k] != OK:
            continue
        top, left, box_height, box_width = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        if box_height == size and box_width == size:
            _copy_with_zeros_outside(pixels.reshape(height, width, 3), top, left, images[k])
        else:
            box = (top, top + box_height, left, left + box_width)
            _resize(library.resize, scratch.ctypes.data, height, width, box, images[k].ctypes.data, size)
        if mirrored[k]:
            _mirror(images[k])
