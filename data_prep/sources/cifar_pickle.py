"""Reads CIFAR's pickles without running what they say.

A pickle is a program that may name any function. Here the only names it gets are inert stand-ins of this file, also for
numpy's own: numpy never sees a state that it was not made for. Anything else is refused by name.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Array:
    """Takes what numpy's `_reconstruct` and `__setstate__` would: (version, shape, dtype, fortran order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayClass:
    """Stands for `numpy.ndarray`, which pickles only hand on to `_reconstruct`."""


class _DType:
    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: a single byte has none."""


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(buffer))
    return array


def _latin1(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes text otherwise than as latin1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _ArrayClass, ("numpy", "dtype"): _DType}
_ALLOWED |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}
_ALLOWED |= {(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")}
_ALLOWED |= {("_codecs", "encode"): _latin1}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which data has no use for") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read_cifar_pickle(data: bytes) -> dict[str, Any]:
    """A dict by text keys; arrays in it are uint8 or refused. ValueError, with the reason, on anything else."""
    try:
        loaded = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(loaded, dict):
            raise ValueError("it holds no dict")
        return {_text(key): _to_array(value) if isinstance(value, _Array) else value for key, value in loaded.items()}
    except Exception as error:  # noqa: BLE001  # a damaged pickle makes its stand-ins and the reader raise anything
        raise ValueError(f"is no pickle of plain data: {error}") from None


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _to_array(array: _Array) -> NDArray[np.uint8]:
    if not isinstance(array.state, tuple) or len(array.state) != 5:
        raise ValueError("it holds an array without a state")
    _, shape, dtype, is_fortran, data = array.state
    name = _text(dtype.name) if isinstance(dtype, _DType) else None
    if name not in ("u1", "|u1", "uint8") or not isinstance(data, bytes):
        raise ValueError(f"it holds an array of {name}, expected uint8")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")
