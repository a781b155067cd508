"""Files of a listing, read many at a time by this package's own C (`native/read_files.c`)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.native_library import library as native_library
from data_prep.sources.ends import HEAD_BYTES, TAIL_BYTES, Ends, empty_ends
from data_prep.sources.listing import PackedStrings
from data_prep.sources.places import MAX_SAMPLE_BYTES


class _Listing(ctypes.Structure):
    _fields_ = (
        ("root", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("names", "name_ends", "sizes", "stamps_ns")),
    )


class LocalListing:
    """What it does not read (changed, gone, no file, larger than a sample may be), and where the C was not built all of
    it, is for Python to read, one by one, and to tell what is wrong."""

    def __init__(self, root: str, names: PackedStrings, sizes: NDArray[np.int64], stamps: NDArray[np.int64]) -> None:
        self._library = native_library()
        packed, ends = names.packed
        self._arrays = tuple(map(np.ascontiguousarray, (packed, ends, sizes, stamps)))  # kept: C has their addresses
        self._sizes = sizes
        self._listing = _Listing(os.fsencode(root), *(array.ctypes.data for array in self._arrays))

    def ends(self, indices: Sequence[int]) -> Ends:
        ends = empty_ends(len(indices))
        if self._library is not None:
            numbers = np.array(indices, dtype=np.int64)
            self._library.data_prep_read_ends(
                ctypes.byref(self._listing),
                numbers.ctypes.data,
                len(numbers),
                HEAD_BYTES,
                TAIL_BYTES,
                ends.rows.ctypes.data,
                ends.rows.strides[0],
                ends.num_bytes.ctypes.data,
            )
            ends.num_bytes[self._sizes[numbers] > MAX_SAMPLE_BYTES] = -1
        return ends

    def read_into(self, indices: Sequence[int], into: memoryview) -> bool:
        """Whole files one behind the other, as many bytes as go into `into`. Whether they were all read."""
        if self._library is None or not len(into) or int(self._sizes[indices].sum()) != len(into):
            return False
        numbers = (ctypes.c_int64 * len(indices))(*indices)
        address = ctypes.byref(ctypes.c_char.from_buffer(into))
        count = self._library.data_prep_read_files(
            ctypes.byref(self._listing), numbers, len(indices), address, len(into)
        )
        return count == len(indices)
