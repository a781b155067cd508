"""What a decode kernel is: from stored images to pixels, for one batch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.augment import Operations
from resnet_dist.data.crops import Views

OK = 0
"""The status of a decoded image; all other values are each kernel's own."""

STORED_IMAGE = np.dtype([(name, "<i8") for name in ("offset", "bytes", "height", "width", "mode")])
"""Where an image is in the file, its sides in px, and how it is stored (`StoredImage` in native/kernel.h)."""
StoredImages = NDArray[np.void]
"""`STORED_IMAGE` [N]."""


class Kernel(Protocol):
    """Decodes, crops, resizes, flips and augments the images of a batch on its own threads, without the GIL.

    It knows nothing of seeds or epochs. `native_kernel.NativeKernel` and `ffcv_kernel.FfcvKernel` are the two.
    """

    def decode(
        self,
        file: NDArray[np.uint8],
        stored: StoredImages,
        views: Views,
        operations: Operations,
        images: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """Returns the statuses [N]. Calls from several threads run one after the other.

        Args:
            file: uint8 [bytes of the beton].
            stored: [N], where the images are in it.
            views: [N], what is shown of each.
            operations: [N, K], applied to what is shown.
            images: uint8 [N, size, size, 3], RGB, written. Undefined for an image whose status is not OK.
        """

    def explain(self, file: NDArray[np.uint8], stored: StoredImages, views: Views, size: int, status: int) -> str:
        """Why the single image given, shown as `size` x `size` px, ended with `status`."""

    def close(self) -> None:
        """Ends the threads, each after its current image; does not wait for them."""
