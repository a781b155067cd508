"""The native decode kernel (`native/*.c`): one call decodes a batch, on its own threads and without the GIL.

It decodes only the part of a JPEG that is shown, with libjpeg-turbo's accurate settings, and resizes with Pillow's
arithmetic: the pixels are Pillow's, bit for bit, on every CPU.
"""

from __future__ import annotations

import ctypes
import io
import logging
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.native import open_decode_library, pointer
from resnet_dist.config.recipe import MAX_SIZE, Interpolation
from resnet_dist.data.augment import OPERATION, Operations
from resnet_dist.data.crops import VIEW, Views
from resnet_dist.data.kernel import STORED_IMAGE, StoredImages

_log = logging.getLogger(__name__)
_MESSAGE_BYTES = 200  # as in jpeg_region.h
_MAX_SIDE = 65535  # as in kernel.c


class Status(IntEnum):
    """Outcomes of decoding one image, numbered as in `native/jpeg_region.h`."""

    OK = 0
    JPEG_BROKEN = 1
    JPEG_SIZE_DIFFERS = 2
    RAW_SIZE_DIFFERS = 3
    MODE_UNKNOWN = 4
    COLOURS_UNKNOWN = 5
    OUTSIDE_FILE = 6
    VIEW_UNFIT = 7
    NO_MEMORY = 8
    TOO_MUCH_HELD = 9


_REASONS = {
    Status.JPEG_SIZE_DIFFERS: "the JPEG's size is not the one the beton says",
    Status.RAW_SIZE_DIFFERS: "the raw pixels do not have the size the beton says",
    Status.MODE_UNKNOWN: "its storage mode is unknown",
    Status.COLOURS_UNKNOWN: "its JPEG is neither grey nor RGB (CMYK?)",
    Status.OUTSIDE_FILE: "it is outside the file",
    Status.VIEW_UNFIT: "its crop is not inside it",
    Status.NO_MEMORY: "there is not enough memory",
    Status.TOO_MUCH_HELD: "its JPEG has several scans, and its coefficients take more than 256 MiB",
}


class NativeKernel:
    """`resnet_dist.data.decoder.Kernel`. UserError when the extension was not built.

    interpolation: how a view is resized.
    own_huffman: whether the kernel's entropy decoder is used, twice as fast as libjpeg's; None: if it passes its check.
    """

    def __init__(
        self, num_threads: int = 1, interpolation: Interpolation = "bilinear", own_huffman: bool | None = None
    ) -> None:
        library = open_decode_library(
            "data.decoder is native", ", or set data.decoder: ffcv, whose pixels differ slightly"
        )
        self._function = library.resnet_dist_decode
        self._function.restype = None
        self._bicubic = interpolation == "bicubic"
        self._own_huffman = own_huffman_is_sound() if own_huffman is None else own_huffman
        self._pool = _Pool(library, num_threads)

    def decode(
        self,
        file: NDArray[np.uint8],
        stored: StoredImages,
        views: Views,
        operations: Operations,
        images: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        return self._call(file, stored, views, operations, images)[0]

    def explain(self, file: NDArray[np.uint8], stored: StoredImages, views: Views, size: int, status: int) -> str:
        if status != Status.JPEG_BROKEN:
            return _REASONS[Status(status)]
        image, no_operations = np.empty((1, size, size, 3), np.uint8), np.zeros((1, 0), OPERATION)
        return f"its JPEG is broken: {self._call(file, stored, views, no_operations, image)[1]}"

    def close(self) -> None:
        self._pool.close()

    def _call(
        self,
        file: NDArray[np.uint8],
        stored: StoredImages,
        views: Views,
        operations: Operations,
        images: NDArray[np.uint8],
    ) -> tuple[NDArray[np.int64], str]:
        """The statuses, and libjpeg's message if there is one image and it is broken."""
        num, size, num_operations = len(images), images.shape[1], operations.shape[1]
        if not 1 <= size <= (MAX_SIZE if num_operations else _MAX_SIDE):
            raise ValueError(f"images of {size} x {size} px")
        statuses, message = np.empty(num, np.int64), ctypes.create_string_buffer(_MESSAGE_BYTES)
        batch = _Batch(
            file=pointer(file, np.uint8, (len(file),)),
            file_bytes=len(file),
            num_images=num,
            stored=pointer(stored, STORED_IMAGE, (num,)),
            views=pointer(views, VIEW, (num,)),
            operations=pointer(operations, OPERATION, (num, num_operations)),
            num_operations=num_operations,
            size=size,
            bicubic=self._bicubic,
            own_huffman=self._own_huffman,
            images=pointer(images, np.uint8, (num, size, size, 3)),
            statuses=pointer(statuses, np.int64, (num,)),
            message=ctypes.cast(message, ctypes.c_void_p),
        )
        self._function(self._pool.address, ctypes.byref(batch))
        return statuses, message.value.decode("ascii", errors="replace")


class _Batch(ctypes.Structure):
    """`Batch` in native/kernel.h."""

    _fields_ = (
        ("file", ctypes.c_void_p),
        ("file_bytes", ctypes.c_int64),
        ("num_images", ctypes.c_int64),
        ("stored", ctypes.c_void_p),
        ("views", ctypes.c_void_p),
        ("operations", ctypes.c_void_p),
        ("num_operations", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("bicubic", ctypes.c_int64),
        ("own_huffman", ctypes.c_int64),
        ("images", ctypes.c_void_p),
        ("statuses", ctypes.c_void_p),
        ("message", ctypes.c_void_p),
    )


class _Pool:
    """The kernel's threads (native/pool.h). Their memory is freed when no call can be running: a call holds the kernel,
    which holds this."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        library.resnet_dist_pool_open.restype = ctypes.c_void_p
        address = library.resnet_dist_pool_open(ctypes.c_int64(num_threads))
        if not address:
            raise MemoryError("no memory for the threads of the native kernel")
        self.address = ctypes.c_void_p(address)
        self._library = library

    def close(self) -> None:
        self._library.resnet_dist_pool_close(self.address)

    def __del__(self) -> None:
        if hasattr(self, "_library"):  # it was opened
            self.close()
            self._library.resnet_dist_pool_release(self.address)


@cache
def own_huffman_is_sound() -> bool:
    """Whether the kernel's own entropy decoder can take libjpeg's place in this process; a warning if not.

    It writes to a private structure of libjpeg-turbo, which another version may have changed. So once per process (15
    ms) the structure is checked and three images are decoded both ways. The pixels are the same either way.
    """
    images = [_sample_jpeg(subsampling) for subsampling in (0, 1, 2)]
    fits = open_decode_library("data.decoder is native").resnet_dist_huffman_fits
    if fits(images[0], ctypes.c_int64(len(images[0]))) and all(_decodes_alike(image) for image in images):
        return True
    _log.warning(
        "the native kernel's fast entropy decoder does not support this libjpeg; libjpeg's own is used: the "
        "pixels are the same, loading is slower. Build against libjpeg-turbo 2 or 3 (make setup) to use it again"
    )
    return False


def _sample_jpeg(subsampling: int) -> bytes:
    y, x = np.mgrid[:61, :83]
    pixels = np.stack([x * y % 256, x * 3 % 256, (x ^ y) * 2 % 256], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=subsampling)
    return buffer.getvalue()


def _decodes_alike(image: bytes) -> bool:
    file = np.frombuffer(image, np.uint8)
    stored = np.array([(0, len(file), 61, 83, 0)], STORED_IMAGE)
    views = np.array([(3, 9, 50, 64, 32, 32, 0, 0, 0)], VIEW)
    decoded = []
    for own_huffman in (True, False):
        pixels, no_operations = np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 0), OPERATION)
        (status,) = NativeKernel(own_huffman=own_huffman).decode(file, stored, views, no_operations, pixels)
        decoded.append((int(status), pixels.tobytes()))
    return decoded[0] == decoded[1] and decoded[0][0] == Status.OK
