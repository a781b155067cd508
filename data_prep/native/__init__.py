"""This package's own C (the folders `native/`). Optional, as all of this project's C: results are the same.

A module of its own beside the packages: a Ray job runs a copy of the sources, without what was built from them, and
must still find what was installed with the environment.
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


def is_built() -> bool:
    return library() is not None


@cache
def library() -> Any:
    """None where it was not built, or of other sources than these."""
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
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


# The shared library that `native/*.c` becomes, by ctypes, which lets go of the GIL for the length of a call.


# A module of its own beside the packages: a Ray job runs a copy of the sources, without what was built from them, and
# must still find the kernel that was installed with the environment.
DECODE_MODULE = "_resnet_dist_decode"
_INTERFACE = 4  # as in kernel.c; grows when arguments or statuses change


def open_library(needed_for: str, otherwise: str = "") -> ctypes.CDLL:
    """UserError where it was not built, saying what it is `needed_for` and what to do `otherwise`."""
    spec = find_spec(DECODE_MODULE)
    if spec is not None and spec.origin is not None:
        library = ctypes.CDLL(spec.origin)
        if not hasattr(library, "resnet_dist_interface") or library.resnet_dist_interface() != _INTERFACE:
            raise UserError(
                f"{spec.origin} was built from other sources than these: build it again (make setup; in a clone, "
                "python setup.py build_ext --inplace)"
            )
        return library
    raise UserError(
        f"{needed_for}, but the native kernel ({DECODE_MODULE}) was not built for {sys.executable}: install "
        f"libjpeg-turbo's header (apt-get install libjpeg-dev) and this package again (make setup){otherwise}"
    )


def pointer(array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> ctypes.c_void_p:
    """Of an array whose memory is as the kernel takes it to be; ValueError for any other."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"expected a contiguous {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
    return ctypes.c_void_p(array.ctypes.data)
