"""The native decode kernel (`native/*.c`) by ctypes, which lets go of the GIL for the length of a call.

It decodes only the part of a JPEG that is shown, with libjpeg-turbo's accurate settings, and resizes with Pillow's
arithmetic: the pixels are Pillow's, bit for bit, on every CPU.
"""

from __future__ import annotations

import ctypes
import sys
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.crops import Views
from resnet_dist.data.kernels import StoredImages
from resnet_dist.errors import UserError

# A module of its own beside the packages: a Ray job runs a copy of the sources, without what was built from them, and
# must still find the kernel that was installed with the environment.
_MODULE = "_resnet_dist_decode"
_MESSAGE_BYTES = 200  # as in jpeg_region.h
_MAX_SIDE = 65535  # as in kernel.c


class Status(IntEnum):
    """As `native/jpeg_region.h` numbers them."""

    OK = 0
    JPEG_BROKEN = 1
    JPEG_SIZE_DIFFERS = 2
    RAW_SIZE_DIFFERS = 3
    MODE_UNKNOWN = 4
    COLOURS_UNKNOWN = 5
    OUTSIDE_FILE = 6
    VIEW_UNFIT = 7
    NO_MEMORY = 8


_REASONS = {
    Status.JPEG_SIZE_DIFFERS: "the JPEG's size is not the one the beton says",
    Status.RAW_SIZE_DIFFERS: "the raw pixels do not have the size the beton says",
    Status.MODE_UNKNOWN: "its storage mode is unknown",
    Status.COLOURS_UNKNOWN: "its JPEG is neither grey nor RGB (CMYK?)",
    Status.OUTSIDE_FILE: "it lies outside the file",
    Status.VIEW_UNFIT: "its crop does not lie within it",
    Status.NO_MEMORY: "there is not enough memory",
}


class NativeKernel:
    """`resnet_dist.data.kernels.Kernel`. UserError when the extension was not built."""

    def __init__(self) -> None:
        self._function = ctypes.CDLL(str(_library())).resnet_dist_decode_crop_resize
        self._function.restype = None

    def decode(
        self,
        file: NDArray[np.uint8],
        stored: StoredImages,
        views: Views,
        flips: NDArray[np.bool_],
        images: NDArray[np.uint8],
        statuses: NDArray[np.int64],
    ) -> None:
        self._call(file, stored, views, flips, images, statuses)

    def explain(self, file: NDArray[np.uint8], stored: StoredImages, views: Views, size: int, status: int) -> str:
        if status != Status.JPEG_BROKEN:
            return _REASONS[Status(status)]
        images, statuses = np.empty((1, size, size, 3), np.uint8), np.empty(1, np.int64)
        message = self._call(file, stored, views, np.zeros(1, np.bool_), images, statuses)
        return f"its JPEG is broken: {message}"

    def _call(
        self,
        file: NDArray[np.uint8],
        stored: StoredImages,
        views: Views,
        flips: NDArray[np.bool_],
        images: NDArray[np.uint8],
        statuses: NDArray[np.int64],
    ) -> str:
        """libjpeg's message about the last image that is broken."""
        num, size = len(statuses), images.shape[1]
        if not 1 <= size <= _MAX_SIDE:
            raise ValueError(f"images of {size} x {size} px")
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        self._function(
            _pointer(file, np.uint8, (len(file),)),
            ctypes.c_int64(len(file)),
            ctypes.c_int64(num),
            _pointer(stored.offsets, np.int64, (num,)),
            _pointer(stored.sizes, np.int64, (num,)),
            _pointer(stored.modes, np.uint8, (num,)),
            _pointer(stored.heights, np.int64, (num,)),
            _pointer(stored.widths, np.int64, (num,)),
            _pointer(views, np.int64, (num, 8)),
            _pointer(flips, np.bool_, (num,)),
            ctypes.c_int64(size),
            _pointer(images, np.uint8, (num, size, size, 3)),
            _pointer(statuses, np.int64, (num,)),
            message,
        )
        return message.value.decode("ascii", errors="replace")


def _pointer(array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> ctypes.c_void_p:
    """Of an array whose memory is as the kernel takes it to be; ValueError for any other."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"expected a contiguous {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
    return ctypes.c_void_p(array.ctypes.data)


def _library() -> Path:
    spec = find_spec(_MODULE)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin)
    raise UserError(
        f"data.decoder is native, but the native kernel ({_MODULE}) was not built for {sys.executable}: install "
        "libjpeg-turbo's header (apt-get install libjpeg-dev) and this package again (make setup), or set "
        "data.decoder: ffcv, whose pixels differ by a grey level or two"
    )
