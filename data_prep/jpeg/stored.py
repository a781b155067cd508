"""Are a beton's bytes a JPEG that conversion stores as it is, and that training so reads, whatever part is shown?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.jpeg import turbojpeg
from data_prep.jpeg.header import is_read_by_ffcv, read_jpeg_header, read_odd_jpeg_header
from data_prep.jpeg.native_check import are_sound


def why_unfit(data: bytes, height: int, width: int) -> str | None:
    """What is wrong with it, to continue the sample's name; None: nothing.

    `height`, `width`: px that it should have.
    """
    header = read_jpeg_header(data)
    try:
        if not are_sound([data])[0]:
            turbojpeg.check(data)
    except (turbojpeg.Damaged, turbojpeg.TooLarge, turbojpeg.Unreadable) as error:
        return str(error)
    if header is None:
        return "is no JPEG whose markers can be followed"
    if (header.height, header.width) != (height, width):
        return f"is {header.width} x {header.height} px, the metadata says {width} x {height}"
    if not header.has_tables:
        return "has no tables of its own: decoders that keep an earlier image's show other pixels"
    return None if is_read_by_ffcv(header) else "is a JPEG of a kind that training does not read"


def decode(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """RGB [height, width, 3], Pillow's pixels. ValueError with the reason, wherever training refuses a part of it."""
    header = read_odd_jpeg_header(data)
    if header is not None and (header.height, header.width) != (height, width):
        raise ValueError(f"is {header.width} x {header.height} px, the metadata says {width} x {height}")
    try:
        return turbojpeg.decode_sound_rgb(data)
    except (turbojpeg.Damaged, turbojpeg.TooLarge, turbojpeg.Unreadable) as error:
        raise ValueError(str(error)) from None
