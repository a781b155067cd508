"""What the hot loop is given and gives. Two do it: `native_kernel.py`, and `ffcv_kernel.py` around libffcv.

A kernel knows nothing of seeds or epochs. It shares the images of a batch between threads of its own, without the GIL.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.crops import Views
from resnet_dist.data.operations import Operations

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

    def part(self, part: slice) -> StoredImages:
        return StoredImages(
            self.offsets[part], self.sizes[part], self.modes[part], self.heights[part], self.widths[part]
        )


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
