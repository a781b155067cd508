"""Reads CIFAR's pickles without running what they say.

A pickle is a program that may name any function. Here the only names it gets are inert stand-ins of this file, also for
numpy's own: numpy never sees a state that it was not made for. Anything else is refused by name. It may also make much
of little: it is looked through before it is run, and what is made by name is counted.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shown import shown

MAX_OPCODES = 1_000_000
"""CIFAR-100's training set has some 250,000: a label or a file name takes one to three."""
MAX_COPIES = 4
"""Bytes that it makes by name, as a multiple of its own."""


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


_ALLOWED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _ArrayClass, ("numpy", "dtype"): _DType}
_ALLOWED |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._bytes_left = MAX_COPIES * len(data) + 1024

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._latin1
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return self._array_from_buffer
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which data has no use for") from None

    def _latin1(self, text: Any, encoding: Any) -> bytes:
        """How protocol 2 writes bytes."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("it encodes text otherwise than as latin1")
        self._count(len(text))
        return text.encode("latin1")

    def _array_from_buffer(self, buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
        if not isinstance(buffer, bytes | bytearray):
            raise pickle.UnpicklingError("it makes an array of something else than bytes")
        self._count(len(buffer))
        array = _Array()
        array.state = (1, shape, dtype, order == "F", bytes(buffer))
        return array

    def _count(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("it makes much more data than it has")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read_cifar_pickle(data: bytes) -> dict[str, Any]:
    """A dict by text keys; arrays in it are uint8 or refused. ValueError, with the reason, on anything else."""
    try:
        _look_through(data)
        loaded = _Unpickler(data).load()
        if not isinstance(loaded, dict):
            raise ValueError("it holds no dict")
        by_key = {_text(key): _to_array(value) if isinstance(value, _Array) else value for key, value in loaded.items()}
        if len(by_key) != len(loaded):
            raise ValueError("it holds a key twice")
        return by_key
    except Exception as error:  # noqa: BLE001  # a damaged pickle makes its stand-ins and the reader raise anything
        raise ValueError(f"is no pickle of plain data: {shown(error)}") from None


def _look_through(data: bytes) -> None:
    """ValueError when it has more steps than data needs, or would keep something under a number that takes memory."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        is_numbered = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if count > MAX_OPCODES or (is_numbered and int(str(argument)) > MAX_OPCODES):
            raise ValueError(f"it has more than {MAX_OPCODES:,} parts")


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
