"""Which JPEGs decode without a warning, and what is wrong with a stored one.

By this package's own C (`converter/native/jpeg_sound.c`); if it was not built, libjpeg-turbo checks every file. The
verdicts are the same, so nothing else depends on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.jpeg import turbojpeg
from data_prep.jpeg.header import is_read_by_ffcv, read_jpeg_header, read_odd_jpeg_header
from data_prep.native import library as native_library


def are_sound(files: Sequence[bytes]) -> list[bool]:
    """Whether each file is a baseline JPEG that libjpeg-turbo is sure to decode completely without a warning.

    False means unknown: ask `turbojpeg.check`. Pass several files at once: two are decoded in alternation, in less than
    half the time that libjpeg-turbo takes.
    """
    library = native_library()
    if library is None or not files:
        return [False] * len(files)
    count = len(files)
    sound = (ctypes.c_uint8 * count)()
    data, sizes = (ctypes.c_char_p * count)(*files), (ctypes.c_size_t * count)(*map(len, files))
    library.data_prep_jpegs_are_sound(data, sizes, count, sound)
    return [bool(verdict) for verdict in sound]


# --- the stored bytes of a beton --------------------------------------------------------------------------------------


def why_unfit(data: bytes, height: int, width: int) -> str | None:
    """Why conversion would not store these bytes unchanged, and training might not read them; None: it would.

    `height`, `width`: the size in the metadata, px.
    """
    header = read_jpeg_header(data)
    try:
        if not are_sound([data])[0]:
            turbojpeg.check(data)
    except turbojpeg.JpegError as error:
        return str(error)
    if header is None:
        return "is not a JPEG whose markers can be followed"
    if (header.height, header.width) != (height, width):
        return f"is {header.width} x {header.height} px, the metadata says {width} x {height}"
    if not header.has_tables:
        return "lacks decoding tables: decoders that keep an earlier image's show other pixels"
    return None if is_read_by_ffcv(header) else "is a JPEG of a kind that training does not read"


def decode(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], Pillow's pixels. ValueError with the reason if training refuses any part of it."""
    header = read_odd_jpeg_header(data)
    if header is not None and (header.height, header.width) != (height, width):
        raise ValueError(f"is {header.width} x {header.height} px, the metadata says {width} x {height}")
    try:
        return turbojpeg.decode_sound_rgb(data)
    except turbojpeg.JpegError as error:
        raise ValueError(str(error)) from None
