"""The shared library that `native/*.c` becomes, by ctypes, which lets go of the GIL for the length of a call."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

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
