"""The headers of many JPEGs, by their ends or whole: of plain files by C of this package (`native/jpeg_headers.c`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_prep.jpeg.header import SOF_PROGRESSIVE, JpegHeader, read_jpeg_header
from data_prep.native_library import library as native_library
from data_prep.sources.files.places import TAIL_BYTES, Ends

HEADER = np.dtype(
    [
        ("answer", "u1"),
        ("frame", "u1"),
        ("num_components", "u1"),
        ("factors", "u1", 3),
        ("height", "<u2"),
        ("width", "<u2"),
    ]
)
ASK_PYTHON, TOLD, NONE = range(3)
PRECISION = 8


def read_jpeg_headers(ends: Ends) -> list[JpegHeader | None]:
    """`read_jpeg_header` of each file; None also where the ends could not be read."""
    headers = np.zeros(len(ends), dtype=HEADER)
    library = native_library()
    if library is not None:
        rows, num_bytes = ends.rows, ends.num_bytes
        library.data_prep_jpeg_headers(
            rows.ctypes.data,
            rows.strides[0],
            len(ends),
            num_bytes.ctypes.data,
            ends.max_head_bytes,
            TAIL_BYTES,
            headers.ctypes.data,
        )

    def ask_python(number: int) -> JpegHeader | None:
        head, tail = ends.of(number)
        return read_jpeg_header(bytes(head), bytes(tail))

    return _told(headers, ask_python)


def read_whole_jpeg_headers(files: Sequence[bytes]) -> list[JpegHeader | None]:
    """`read_jpeg_header` of each file."""
    headers = np.zeros(len(files), dtype=HEADER)
    library = native_library()
    if library is not None:
        data, sizes = (ctypes.c_char_p * len(files))(*files), (ctypes.c_size_t * len(files))(*map(len, files))
        library.data_prep_whole_jpeg_headers(data, sizes, len(files), headers.ctypes.data)
    return _told(headers, lambda number: read_jpeg_header(files[number]))


def _told(headers: NDArray[np.void], ask_python: Callable[[int], JpegHeader | None]) -> list[JpegHeader | None]:
    factors = headers["factors"].tolist()
    found: list[JpegHeader | None] = []
    for number, (answer, frame, count, _, height, width) in enumerate(headers.tolist()):
        if answer == NONE:
            found.append(None)
        elif answer == TOLD:
            sampling = _sampling(*factors[number][:count])
            in_one_scan = frame != SOF_PROGRESSIVE
            found.append(JpegHeader(height, width, frame, PRECISION, sampling, True, in_one_scan, True, True))
        else:
            found.append(ask_python(number))
    return found


@cache
def _sampling(*factors: int) -> tuple[tuple[int, int], ...]:
    return tuple((factor >> 4, factor & 15) for factor in factors)
