"""Operations on decoded images, as data: which, with what numbers. `native/augment.c` applies them, without the GIL."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.native_library import open_library, pointer

OPERATION = np.dtype([("kind", "<i8"), ("values", "<f8", (8,))])
"""As `Operation` in native/augment.h, which says what the values mean."""
Operations = NDArray[np.void]
"""`OPERATION` [N, K]: the K operations of each of N images, applied one after another."""


class OperationKind(IntEnum):
    IDENTITY = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    SHARPNESS = 4
    HUE = 5
    POSTERIZE = 6
    SOLARIZE = 7
    AUTOCONTRAST = 8
    EQUALIZE = 9
    AFFINE = 10
    ADD = 11
    ERASE = 12
    INVERT = 13


def operation(kind: OperationKind, *values: float) -> Operations:
    """One operation, a 0-d array."""
    result = np.zeros((), OPERATION)
    result["kind"] = kind
    result["values"][: len(values)] = values
    return result


class Operator:
    """Applies operations. UserError when the native kernel was not built."""

    def __init__(self) -> None:
        self._function = open_library("data.train.augment needs it").resnet_dist_augment
        self._function.restype = ctypes.c_int

    def apply(self, operations: Operations, images: NDArray[np.uint8]) -> None:
        """operations: [N, K]; images: uint8 [N, size, size, 3], changed in place. MemoryError."""
        num, num_operations = operations.shape
        size = images.shape[1]
        failed = self._function(
            ctypes.c_int64(num),
            ctypes.c_int64(num_operations),
            pointer(operations, OPERATION, (num, num_operations)),
            ctypes.c_int64(size),
            pointer(images, np.uint8, (num, size, size, 3)),
        )
        if failed:
            raise MemoryError(f"no memory for an image of {size} x {size} px")
