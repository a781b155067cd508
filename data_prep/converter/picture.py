"""Any image file -> RGB pixels, shrunk; and whether the stock ffcv decoder shows an encoded JPEG correctly.

Images are shrunk with Pillow's Hamming filter, antialiased, in this package's C or in Pillow. In Pillow it takes 0.61
of bicubic's time and differs from it by 1.0 grey level (mean, ImageNet files shrunk to 256 px); ffcv's own writer uses
a box. The C (`native/shrink.c`) gives the same bytes in a fifth of the time.

libffcv decodes with libjpeg-turbo's fast DCT, which computes in 16 bits. On photographs of quality 95 it is off by at
most 20 grey levels, of quality 100 by 51; on graphics of full contrast its sums overflow, and blocks become garbage.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.converter.settings import ConvertSettings
from data_prep.jpeg import turbojpeg
from data_prep.jpeg.header import JpegHeader, is_jpeg, plain, read_odd_jpeg_header
from data_prep.native import library as native_library
from data_prep.pixels import (
    DRAFT_RESERVE,
    SMALLER,
    orientation,
    read_header,
    require_sides,
    require_size,
    shrunk_size,
    to_rgb,
    turned,
)

TALL = 2
"""Ratio of height to width from which Pillow 13 may shrink the columns first, which rounds differently. Such images are
left to Pillow."""
MAX_OFF = 64
"""Largest error of the stock decoder that is accepted, in grey levels."""
SURE_QUALITIES = range(80, 97)
"""Qualities at which only an overflow can exceed `MAX_OFF`, and quantization adds too little to cause one."""


class BadSample(Exception):
    """This sample cannot be stored; the message is the reason."""


class DamagedSample(BadSample):
    """A JPEG whose data are damaged; some of it may be decoded."""


def decode_rgb(data: bytes, settings: ConvertSettings) -> NDArray[np.uint8]:
    """Any image file as RGB, uint8 [height, width, 3], shrunk to `max_side`. BadSample or BadPicture if it is damaged.

    A JPEG that is to be shrunk much is decoded at a fraction of its size, see `DRAFT_RESERVE`.
    """
    header = read_odd_jpeg_header(data)
    if header is not None:
        reduction = _reduction(header, settings)
        try:
            return _finished(turbojpeg.decode_rgb(data, reduction), data, header, settings)
        except turbojpeg.UnreadableJpeg:
            pass  # CMYK and the like, which Pillow may read
        except turbojpeg.JpegError as error:
            raise _bad_sample(error) from None
    return _decode_with_pillow(data, settings)


def decode_damaged(data: bytes, settings: ConvertSettings) -> NDArray[np.uint8] | None:
    """What can be decoded of a damaged JPEG, as `decode_rgb`; None if nothing can. BadPicture if it is too large."""
    header = read_odd_jpeg_header(data)
    if header is None:
        return None
    try:
        pixels = turbojpeg.decode_damaged_rgb(data, header, _reduction(header, settings))
    except turbojpeg.JpegError:
        return None
    return _finished(pixels, data, header, settings)


def is_read_to_its_end(data: bytes) -> bool:
    """False for a JPEG that the decoder warns about although it is not damaged. BadSample if it is damaged."""
    try:
        turbojpeg.check(data)
    except turbojpeg.UnreadableJpeg:
        return False
    except turbojpeg.JpegError as error:
        raise _bad_sample(error) from None
    return True


def _bad_sample(error: turbojpeg.JpegError) -> BadSample:
    if isinstance(error, turbojpeg.DamagedJpeg):
        return DamagedSample(f"is damaged: {error}")
    return BadSample(f"is too large to decode: {error}")


def _finished(
    pixels: NDArray[np.uint8], data: bytes, header: JpegHeader, settings: ConvertSettings
) -> NDArray[np.uint8]:
    from PIL import Image

    size = shrunk_size((header.width, header.height), settings.max_side)
    turn = orientation(data) if settings.exif == "apply" else 1
    if turn != 1:
        pixels = np.ascontiguousarray(turned(Image.fromarray(pixels), turn))
        size = size[::-1] if turn >= 5 else size
    return shrink(pixels, size)


def _decode_with_pillow(data: bytes, settings: ConvertSettings) -> NDArray[np.uint8]:
    if is_jpeg(data) and not is_read_to_its_end(data):  # Pillow would not report damage
        data = plain(data)
    header = read_odd_jpeg_header(data) or read_header(data)
    size = shrunk_size((header.width, header.height), settings.max_side)
    image = to_rgb(data, settings.picture, at_least=(size[0] * DRAFT_RESERVE, size[1] * DRAFT_RESERVE))
    size = size[::-1] if settings.exif == "apply" and orientation(data) >= 5 else size
    return shrink(np.ascontiguousarray(image), size)


def _reduction(header: JpegHeader, settings: ConvertSettings) -> int:
    """The largest of 1, 2, 4, 8 that leaves the resize filter its reserve. BadPicture beyond the limits."""
    size, remedy = (header.width, header.height), "use --max-side" if settings.max_side is None else SMALLER
    require_sides(*size, remedy)
    shrunk = shrunk_size(size, settings.max_side)
    factor = min(side // (target * DRAFT_RESERVE) for side, target in zip(size, shrunk, strict=True))
    reduction = next((reduction for reduction in (8, 4, 2) if factor >= reduction), 1)
    require_size(-(-size[0] // reduction), -(-size[1] // reduction), remedy)
    return reduction


def shrink(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`pixels`: uint8 [height, width, 3], contiguous; returned as is if it has `size`, which is width, height."""
    height, width, _ = pixels.shape
    if size == (width, height):
        return pixels
    library = native_library()
    if library is None or height >= TALL * width:
        return _with_pillow(pixels, size)
    shrunk = np.empty((size[1], size[0], 3), np.uint8)
    if library.data_prep_shrink(pixels.ctypes.data, height, width, size[1], size[0], shrunk.ctypes.data) != 0:
        raise MemoryError(f"no memory to resize {width} x {height} px")
    return shrunk


def _with_pillow(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.HAMMING))


def is_shown_right(data: bytes, pixels: NDArray[np.uint8], quality: int, subsampling: str) -> bool:
    """Whether the stock decoder shows `data` correctly: the JPEG that `pixels`, uint8 [height, width, 3], became."""
    height, width, _ = pixels.shape
    library = native_library()
    is_sure = library is not None and quality in SURE_QUALITIES and subsampling == "4:4:4"
    if is_sure and not library.data_prep_may_overflow(pixels.ctypes.data, height, width):
        return True  # true of 99 in 100 photographs, which saves decoding them
    return turbojpeg.off_in_ffcv(data, height, width) <= MAX_OFF
