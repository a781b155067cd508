"""JPEGs through libjpeg-turbo's own C interface (TurboJPEG): a strict check, a strict decode, an encode.

Damage is defined here, once, for conversion, `verify` and training: a JPEG is sound if libjpeg-turbo decodes all of it,
to the end of the image, without an error or a warning. Otherwise it is damaged, if the picture's own data are the
reason: bytes between segments and numbers in them that affect no pixel are removed first (`header.plain`). Training
decodes parts of images, with libjpeg-turbo and with its own entropy decoder, which falls back to libjpeg's where it is
not sure; no part of a sound file causes a warning.

The check decodes at 1/8: every bit is read, most of the arithmetic is skipped (0.73 ms for an ImageNet file of 110 KB
on one core, where a full decode takes 0.98). Of 800 files with a flipped bit, a byte of 255 or a run of zeros in them
it refused the same 517 that a full decode refuses.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.jpeg.header import LIBJPEG_FRAMES, JpegHeader, plain, read_odd_jpeg_header, why_too_large

_Result = TypeVar("_Result")

STOP_ON_WARNING, LIMIT_SCANS, FAST_UPSAMPLE, FAST_DCT, ACCURATE_DCT = 8192, 32768, 256, 2048, 4096
WARNING = 0
"""TurboJPEG's code of an error after which there are pixels all the same."""
RGB, GRAY, CMYK = 0, 6, 11
"""TurboJPEG's pixel formats."""
SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
CHECK_REDUCTION = 8
MOST_LOST = 0.9
"""Largest share of a damaged picture that may be missing. The decoder leaves it grey."""


class JpegError(Exception):
    """The file is not sound: one of the three below."""


class DamagedJpeg(JpegError):
    """The picture's own data are damaged; the message is the decoder's."""


class JpegTooLarge(JpegError):
    """Decoding it would take too much memory or time; the message says how much."""


class UnreadableJpeg(JpegError):
    """No damage: the decoder does not read this kind of JPEG, or warns about something that affects no pixel."""


def check(data: bytes) -> None:
    """DamagedJpeg, JpegTooLarge or UnreadableJpeg unless libjpeg-turbo decodes `data` to the end without a warning.

    UserError when the library is not installed; so in all functions here.
    """
    _read_strictly(data, _check)


def decode_rgb(data: bytes, reduction: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], each side 1/`reduction` (1, 2, 4 or 8) rounded up; the same pixels as Pillow's.

    DamagedJpeg or JpegTooLarge as `check`, UnreadableJpeg only for kinds that are not read as RGB; warnings that
    affect no pixel are ignored.
    """
    try:
        return _read_strictly(data, partial(_decode_rgb, reduction=reduction))
    except _Odd as odd:
        return odd.result


def decode_sound_rgb(data: bytes) -> NDArray[np.uint8]:
    """As `decode_rgb` at full size, but UnreadableJpeg also for warnings that affect no pixel, as training refuses
    them."""
    return _read_strictly(data, partial(_decode_rgb, reduction=1))


def decode_damaged_rgb(data: bytes, header: JpegHeader, reduction: int) -> NDArray[np.uint8]:
    """As `decode_rgb`, with what the decoder puts in place of damaged data: of a truncated file the rest is grey.

    DamagedJpeg if the decoder gives up, or more than `MOST_LOST` of the picture is one colour.
    """
    _require_known_kind(header)
    height, width, is_cmyk = _shape(header)
    if is_cmyk or why_too_large(data, header) is not None:
        raise UnreadableJpeg("is CMYK or too large")
    pixels = np.zeros((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    with _decompressor() as (library, handle):
        target = (pixels.ctypes.data, pixels.shape[1], 0, pixels.shape[0], RGB, LIMIT_SCANS)
        is_whole = library.tjDecompress2(handle, data, len(data), *target) == 0
        if not is_whole and library.tjGetErrorCode(handle) != WARNING:
            raise DamagedJpeg(_message(library, handle))
    _, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    if counts.max() > MOST_LOST * counts.sum():
        raise DamagedJpeg("next to nothing of it can be decoded")
    return pixels


class _Odd(UnreadableJpeg):
    """The result came from `plain(data)`."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class _Complaint(Exception):
    """An error or a warning of libjpeg-turbo."""


def _read_strictly(data: bytes, read: Callable[[bytes, JpegHeader | None], _Result]) -> _Result:
    header = read_odd_jpeg_header(data)
    if header is not None:
        _require_known_kind(header)
        too_large = why_too_large(data, header)
        if too_large is not None:
            raise JpegTooLarge(too_large)
    try:
        return read(data, header)
    except _Complaint as complaint:
        first = str(complaint)
    if header is None:
        raise DamagedJpeg(f"its markers cannot be followed to a picture ({first})")
    same_picture = plain(data)
    if same_picture == data:
        raise DamagedJpeg(first)
    try:
        result = read(same_picture, header)
    except _Complaint as complaint:
        raise DamagedJpeg(str(complaint)) from None
    raise _Odd(first, result)


def _require_known_kind(header: JpegHeader) -> None:
    if header.frame not in LIBJPEG_FRAMES:
        raise UnreadableJpeg(f"is a JPEG of an unusual kind (start of frame 0x{header.frame:02X})")
    if header.precision != 8:
        raise UnreadableJpeg(f"is a JPEG of {header.precision} bits a value, expected 8")
    if len(header.sampling) not in (1, 3, 4):
        raise UnreadableJpeg(f"is a JPEG of {len(header.sampling)} components, expected 1, 3 or 4")


def _check(data: bytes, header: JpegHeader | None) -> None:
    height, width, is_cmyk = _shape(header)
    columns, rows = (-(-side // CHECK_REDUCTION) for side in (width, height))
    pixels = np.empty((rows, columns, 4 if is_cmyk else 1), np.uint8)
    _decode(data, pixels, CMYK if is_cmyk else GRAY, FAST_UPSAMPLE | FAST_DCT)


def _decode_rgb(data: bytes, header: JpegHeader | None, reduction: int) -> NDArray[np.uint8]:
    height, width, is_cmyk = _shape(header)
    if is_cmyk:
        raise UnreadableJpeg("is CMYK")
    pixels = np.empty((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    try:
        _decode(data, pixels, RGB, 0)
    except _Complaint as complaint:
        _check(data, header)
        raise UnreadableJpeg(
            str(complaint)
        ) from None  # its data are sound: sampling factors that libjpeg has no code for
    return pixels


def _shape(header: JpegHeader | None) -> tuple[int, int, bool]:
    """Height, width and whether it is CMYK. Without a header any size does: libjpeg-turbo then finds the error."""
    if header is None:
        return 1, 1, False
    return max(header.height, 1), max(header.width, 1), len(header.sampling) == 4


def encode_rgb(pixels: NDArray[np.uint8], quality: int, subsampling: str) -> bytes:
    """A baseline JPEG. `pixels`: uint8 [height, width, 3], contiguous."""
    library = open_library()
    handle = library.tjInitCompress()
    data, size = ctypes.c_void_p(), ctypes.c_ulong()
    height, width, _ = pixels.shape
    try:
        target = (ctypes.byref(data), ctypes.byref(size))
        options = (SUBSAMPLING[subsampling], quality, ACCURATE_DCT)
        if library.tjCompress2(handle, pixels.ctypes.data, width, 0, height, RGB, *target, *options) != 0:
            raise MemoryError(_message(library, handle))
        return ctypes.string_at(data.value or 0, size.value)
    finally:
        library.tjFree(data)
        library.tjDestroy(handle)


def decode_as_ffcv(data: bytes, height: int, width: int, dct: int = FAST_DCT) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] as the stock ffcv decoder shows a JPEG of that size. DamagedJpeg only on errors."""
    pixels = np.empty((height, width, 3), np.uint8)
    with _decompressor() as (library, handle):
        if library.tjDecompress2(handle, data, len(data), pixels.ctypes.data, width, 0, height, RGB, dct) != 0:
            raise DamagedJpeg(_message(library, handle))
    return pixels


def off_in_ffcv(data: bytes, height: int, width: int) -> int:
    """The largest error, in grey levels, of the stock ffcv decoder, which its fast DCT causes."""
    fast, accurate = (decode_as_ffcv(data, height, width, dct) for dct in (FAST_DCT, ACCURATE_DCT))
    return int((np.maximum(fast, accurate) - np.minimum(fast, accurate)).max())


def library_version() -> str:
    """The library's file name, which contains its version: `libturbojpeg.so.0.2.0`."""
    open_library()
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.rpartition("/")[2]
        if name.startswith("libturbojpeg"):
            return name
    return "unknown"


@contextmanager
def _decompressor() -> Iterator[tuple[Any, Any]]:
    library = open_library()
    handle = library.tjInitDecompress()
    if not handle:
        raise MemoryError("libjpeg-turbo cannot start")
    try:
        yield library, handle
    finally:
        library.tjDestroy(handle)


def _decode(data: bytes, pixels: NDArray[np.uint8], pixel_format: int, flags: int) -> None:
    """Decodes into `pixels`, at the largest scale that fits. _Complaint on any error or warning."""
    height, width, _ = pixels.shape
    target = (pixels.ctypes.data, width, 0, height, pixel_format, flags | STOP_ON_WARNING | LIMIT_SCANS)
    with _decompressor() as (library, handle):
        if library.tjDecompress2(handle, data, len(data), *target) != 0:
            raise _Complaint(_message(library, handle))


def _message(library: Any, handle: Any) -> str:
    return library.tjGetErrorStr2(handle).decode("ascii", errors="replace")


@cache
def open_library() -> Any:
    """libturbojpeg, with argument types set."""
    name = ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        raise UserError(
            "libturbojpeg is not installed on this machine; ffcv needs it too (Debian: apt-get install libturbojpeg0)"
        ) from None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
    library.tjInitDecompress.restype = library.tjInitCompress.restype = pointer
    library.tjDecompress2.argtypes = [pointer, ctypes.c_char_p, size, pointer, *[number] * 5]
    library.tjCompress2.argtypes = [pointer, pointer, *[number] * 4, pointer, pointer, *[number] * 3]
    library.tjGetErrorStr2.argtypes = library.tjDestroy.argtypes = library.tjFree.argtypes = [pointer]
    library.tjGetErrorCode.argtypes = [pointer]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library
