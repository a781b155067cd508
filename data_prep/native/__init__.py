"""The project's own C, two shared libraries that ctypes loads: data preparation's, and the loader's decode kernel.

Each is a top-level module: a Ray job runs a copy of the sources without built files, and must find those that were
installed with the environment. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

MODULE = "_data_prep_native"
DECODE_MODULE = "_resnet_dist_decode"
_DECODE_INTERFACE = 6  # as in resnet_dist/data/native/kernel.c; grows when arguments or statuses change


@cache
def _load(module: str) -> ctypes.CDLL | None:
    """None if it was not built."""
    spec = find_spec(module)
    return ctypes.CDLL(spec.origin) if spec is not None and spec.origin is not None else None


def is_built() -> bool:
    """Whether data preparation's C was built. It is optional: without it results are the same."""
    return library() is not None


@cache
def library() -> Any:
    """Data preparation's library; None if it was not built from these sources."""
    library = _load(MODULE)
    if library is None:
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    try:
        library.data_prep_jpegs_are_sound.argtypes = [pointer, pointer, number, pointer]
        library.data_prep_whole_jpeg_headers.argtypes = [pointer, pointer, size, pointer]
        library.data_prep_jpeg_headers.argtypes = [pointer, size, size, pointer, size, size, pointer]
        library.data_prep_read_ends.argtypes = [pointer, pointer, size, size, size, pointer, size, pointer]
        library.data_prep_read_files.argtypes = [pointer, pointer, size, pointer, size]
        library.data_prep_stat_files.argtypes = [pointer, size, pointer, pointer]
        library.data_prep_shrink.argtypes = [pointer, *[number] * 4, pointer]
        library.data_prep_may_overflow.argtypes = [pointer, number, number]
    except AttributeError:
        return None
    for name in ("jpegs_are_sound", "jpeg_headers", "whole_jpeg_headers", "stat_files", "read_ends"):
        getattr(library, f"data_prep_{name}").restype = None
    return library


def open_decode_library(needed_for: str, otherwise: str = "") -> ctypes.CDLL:
    """The decode kernel's library. UserError if it was not built, with what it is `needed_for` and what to do
    `otherwise`.
    """
    library = _load(DECODE_MODULE)
    if library is None:
        raise UserError(
            f"{needed_for}, but the native kernel ({DECODE_MODULE}) was not built for {sys.executable}: install "
            f"libjpeg-turbo's header (apt-get install libjpeg-dev) and this package again (make setup){otherwise}"
        )
    if not hasattr(library, "resnet_dist_interface") or library.resnet_dist_interface() != _DECODE_INTERFACE:
        raise UserError(
            f"{library._name} was built from other sources than these: build it again (make setup; in a clone, "
            "python setup.py build_ext --inplace)"
        )
    return library


def pointer(array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> ctypes.c_void_p:
    """A pointer to a contiguous array of this dtype and shape; ValueError for any other."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"expected a contiguous {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
    return ctypes.c_void_p(array.ctypes.data)
