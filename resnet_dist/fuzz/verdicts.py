"""Do conversion, `verify` and training agree about a JPEG, and give the same pixels?"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.jpeg import turbojpeg
from data_prep.jpeg.check import are_sound, why_unfit
from data_prep.jpeg.header import is_read_by_ffcv, read_jpeg_header, read_odd_jpeg_header
from resnet_dist.data.augment import OPERATION
from resnet_dist.data.crops import VIEW, Views
from resnet_dist.data.kernel import OK, STORED_IMAGE
from resnet_dist.data.native_kernel import NativeKernel

SIZE = 24
"""px of what is shown."""
Pixels = NDArray[np.uint8]


class JpegVerdict(NamedTuple):
    is_sound: bool
    """libjpeg-turbo reads all of it without a warning."""
    is_kept: bool
    """Conversion stores it unchanged."""
    disagreement: str | None
    """Which two decoders disagree, and about what; None if all agree."""


class Judge:
    """Compares all decoders on a JPEG. `before`: the JPEG that a decoder read last, whose tables it may still have."""

    def __init__(self, before: bytes) -> None:
        self._ours, self._libjpegs = NativeKernel(own_huffman=True), NativeKernel(own_huffman=False)
        self._stock = _KeptDecoder(before)

    def verdict(self, data: bytes, draw: np.random.Generator) -> JpegVerdict:
        is_sound = is_read_without_a_warning(data)
        header = read_jpeg_header(data)
        is_kept = is_sound and header is not None and is_read_by_ffcv(header)
        return JpegVerdict(is_sound, is_kept, self._disagreement(data, is_sound, is_kept, draw))

    def _disagreement(self, data: bytes, is_sound: bool, is_kept: bool, draw: np.random.Generator) -> str | None:
        if are_sound([data])[0] and not is_sound:
            return "the check in C calls it sound, libjpeg-turbo does not"
        header = read_odd_jpeg_header(data)
        height, width = (1, 1) if header is None else (max(header.height, 1), max(header.width, 1))
        if (why_unfit(data, height, width) is None) != is_kept:
            return "convert and verify differ"
        if max(height, width) > 65_500:
            return None
        views = some_views(height, width, draw)
        ours, our_statuses = show(self._ours, data, height, width, views)
        theirs, their_statuses = show(self._libjpegs, data, height, width, views)
        if not np.array_equal(our_statuses, their_statuses):
            return f"the entropy decoders: statuses {our_statuses.tolist()} and libjpeg's {their_statuses.tolist()}"
        if not np.array_equal(ours[our_statuses == OK], theirs[our_statuses == OK]):
            return "the entropy decoders: pixels"
        if not is_kept:
            return None
        if our_statuses.any():
            return f"convert keeps it, training refuses it: statuses {our_statuses.tolist()}"
        whole = turbojpeg.decode_rgb(data, 1)
        for view, shown in zip(views[:-2], ours, strict=False):
            top, left = view["window_top"], view["window_left"]
            if not np.array_equal(shown, whole[top : top + SIZE, left : left + SIZE]):
                return f"the part at {top}, {left} is not that of the full image"
        return (
            None if np.array_equal(self.behind_another(data, height, width), whole) else "a decoder that read another"
        )

    def behind_another(self, data: bytes, height: int, width: int) -> Pixels:
        """The whole picture by the decoder that read `before`."""
        return self._stock.decode(data, height, width)


def some_views(height: int, width: int, draw: np.random.Generator) -> Views:
    """Parts of the image at their own size, if it is large enough; then a part and the full image, resized."""
    views: list[tuple[int, ...]] = []
    if min(height, width) >= SIZE:
        places = [(0, 0), (height - SIZE, width - SIZE)]
        places += draw.integers(0, (height - SIZE + 1, width - SIZE + 1), (6, 2)).tolist()
        views = [(0, 0, height, width, height, width, top, left, 0) for top, left in places]
    h, w = (int(draw.integers(1, side + 1)) for side in (height, width))
    top, left = (int(draw.integers(0, side + 1)) for side in (height - h, width - w))
    views += [(top, left, h, w, SIZE, SIZE, 0, 0, 0), (0, 0, height, width, SIZE, SIZE, 0, 0, 0)]
    return np.array(views, VIEW)


def show(kernel: NativeKernel, data: bytes, height: int, width: int, views: Views) -> tuple[Pixels, NDArray[np.int64]]:
    """Pixels and statuses of one stored JPEG under several views."""
    num = len(views)
    file = np.frombuffer(data, np.uint8)
    stored = np.array([(0, len(data), height, width, 0)] * num, STORED_IMAGE)
    images, no_operations = np.zeros((num, SIZE, SIZE, 3), np.uint8), np.zeros((num, 0), OPERATION)
    return images, kernel.decode(file, stored, views, no_operations, images)


def is_read_without_a_warning(data: bytes) -> bool:
    try:
        turbojpeg.check(data)
    except turbojpeg.JpegError:
        return False
    return True


class _KeptDecoder:
    """Decodes all images with one TurboJPEG handle, as ffcv does."""

    def __init__(self, before: bytes) -> None:
        self._library: Any = turbojpeg.open_library()
        self._handle = self._library.tjInitDecompress()
        self._before = before

    def decode(self, data: bytes, height: int, width: int) -> Pixels:
        """Decodes `before`, then `data`."""
        self._decode(self._before, np.empty((1024, 1024, 3), np.uint8))
        return self._decode(data, np.empty((height, width, 3), np.uint8))

    def _decode(self, data: bytes, pixels: Pixels) -> Pixels:
        height, width, _ = pixels.shape
        target = (ctypes.c_void_p(pixels.ctypes.data), width, 0, height, turbojpeg.RGB, 0)
        self._library.tjDecompress2(self._handle, data, len(data), *target)
        return pixels

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.tjDestroy(self._handle)
