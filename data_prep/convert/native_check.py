"""Which JPEGs are sound to their last bit, by this package's own C (`native/jpeg_sound.c`).

Optional, as all of this project's C: where it was not built, libjpeg-turbo is asked about every file. The verdicts are
the same, so nothing else depends on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

# A module of its own beside the packages: a Ray job runs a copy of the sources, without what was built from them, and
# must still find what was installed with the environment.
MODULE = "_data_prep_native"


def is_built() -> bool:
    return _library() is not None


def are_sound(files: Sequence[bytes]) -> list[bool]:
    """Whether each file is a baseline JPEG that libjpeg-turbo is sure to decode to its end without a warning.

    False says nothing: ask `turbojpeg.check`. Give it several: two are followed in turns, in less than half of the time
    that libjpeg-turbo takes.
    """
    library = _library()
    if library is None or not files:
        return [False] * len(files)
    count = len(files)
    sound = (ctypes.c_uint8 * count)()
    data, sizes = (ctypes.c_char_p * count)(*files), (ctypes.c_size_t * count)(*map(len, files))
    library.data_prep_jpegs_are_sound(data, sizes, count, sound)
    return [bool(verdict) for verdict in sound]


@cache
def _library() -> Any:
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.data_prep_jpegs_are_sound.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    library.data_prep_jpegs_are_sound.restype = None
    return library
