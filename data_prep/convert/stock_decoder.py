"""Whether the stock ffcv decoder shows an encoded image as it should.

libffcv decodes with libjpeg-turbo's fast DCT, which computes in 16 bits. On photographs at quality 95 it is off by 20
grey levels at most, at quality 100 by 51; on graphics of full contrast its sums overflow, and blocks become garbage.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.jpeg.turbojpeg import off_in_ffcv
from data_prep.native_library import library as native_library

MAX_OFF = 64
"""Grey levels that it may be off at most."""
SURE_QUALITIES = range(80, 97)
"""Where only an overflow takes it further than `MAX_OFF`, and quantization adds too little to cause one."""


def is_shown_right(data: bytes, pixels: NDArray[np.uint8], quality: int, subsampling: str) -> bool:
    """`data`: what `pixels`, uint8 [height, width, 3], were encoded to."""
    height, width, _ = pixels.shape
    library = native_library()
    is_sure = library is not None and quality in SURE_QUALITIES and subsampling == "4:4:4"
    if is_sure and not library.data_prep_may_overflow(pixels.ctypes.data, height, width):
        return True  # so 99 of 100 photographs need not be decoded
    return off_in_ffcv(data, height, width) <= MAX_OFF
