"""Files below a folder, many at a time by this package's own C (`native/read_files.c`): their status, their bytes."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.native_library import library as native_library
from data_prep.sources.ends import TAIL_BYTES, Ends, empty_ends
from data_prep.sources.listing import PackedStrings
from data_prep.sources.places import MAX_SAMPLE_BYTES, NO_FILE, FileStatus

_UNKNOWN = -2
"""In C, beside `NO_FILE`."""


class _Listing(ctypes.Structure):
    _fields_ = (
        ("root", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("names", "name_ends", "sizes", "stamps_ns")),
    )


def stat_files(folder: str, names: Sequence[str]) -> list[FileStatus]:
    """Through links; of what is no file, or not there: 0 bytes and `NO_FILE`. OSError when that cannot be told."""
    library = native_library()
    if library is None:
        return [_status(folder, name) for name in names]
    sizes, stamps = np.empty(len(names), dtype=np.int64), np.empty(len(names), dtype=np.int64)
    packed, ends = PackedStrings(names).packed
    listing = _Listing(os.fsencode(folder), packed.ctypes.data, ends.ctypes.data, None, None)
    library.data_prep_stat_files(ctypes.byref(listing), len(names), sizes.ctypes.data, stamps.ctypes.data)
    found = list(map(FileStatus, sizes.tolist(), stamps.tolist()))
    for number in np.flatnonzero(stamps == _UNKNOWN).tolist():
        found[number] = _status(folder, names[number])
    return found


def _status(folder: str, name: str) -> FileStatus:
    try:
        status = Path(folder, name).stat()
    except FileNotFoundError:  # a link to nothing, or just gone
        return FileStatus(0, NO_FILE)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return FileStatus(0, NO_FILE)
        raise
    if not stat.S_ISREG(status.st_mode):
        return FileStatus(0, NO_FILE)
    return FileStatus(status.st_size, status.st_mtime_ns)


class LocalListing:
    """What it does not read (changed, gone, no file, larger than a sample may be), and where the C was not built all of
    it, is for Python to read, one by one, and to tell what is wrong."""

    def __init__(self, root: str, names: PackedStrings, sizes: NDArray[np.int64], stamps: NDArray[np.int64]) -> None:
        self._library = native_library()
        packed, ends = names.packed
        self._arrays = tuple(map(np.ascontiguousarray, (packed, ends, sizes, stamps)))  # kept: C has their addresses
        self._sizes = sizes
        self._listing = _Listing(os.fsencode(root), *(array.ctypes.data for array in self._arrays))

    def ends(self, indices: Sequence[int], max_head_bytes: int) -> Ends:
        ends = empty_ends(len(indices), max_head_bytes)
        if self._library is not None:
            numbers = np.array(indices, dtype=np.int64)
            self._library.data_prep_read_ends(
                ctypes.byref(self._listing),
                numbers.ctypes.data,
                len(numbers),
                max_head_bytes,
                TAIL_BYTES,
                ends.rows.ctypes.data,
                ends.rows.strides[0],
                ends.num_bytes.ctypes.data,
            )
            ends.num_bytes[self._sizes[numbers] > MAX_SAMPLE_BYTES] = -1
        return ends

    def read_into(self, indices: Sequence[int], into: memoryview) -> bool:
        """Whole files one behind the other, as many bytes as go into `into`. Whether they were all read."""
        if self._library is None or not len(into):
            return False
        numbers = (ctypes.c_int64 * len(indices))(*indices)
        address = ctypes.byref(ctypes.c_char.from_buffer(into))
        return bool(
            self._library.data_prep_read_files(ctypes.byref(self._listing), numbers, len(indices), address, len(into))
        )
