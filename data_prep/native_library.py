"""This package's own C (the folders `native/`). Optional, as all of this project's C: results are the same.

A module of its own beside the packages: a Ray job runs a copy of the sources, without what was built from them, and
must still find what was installed with the environment.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Any

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
