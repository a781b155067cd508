"""One sample of a source -> the bytes to store, and their metadata. Pure: the same on every machine."""

from __future__ import annotations

import ctypes
import importlib.metadata
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.digest import sample_digest
from data_prep.beton.ranges import RANGE_BYTES
from data_prep.converter.picture import (
    BadSample,
    DamagedSample,
    decode_damaged,
    decode_rgb,
    is_read_to_its_end,
    is_shown_right,
)
from data_prep.converter.settings import DEFAULT_QUALITY, ConvertSettings
from data_prep.errors import Fault, UserError
from data_prep.jpeg import turbojpeg
from data_prep.jpeg.check import are_sound
from data_prep.jpeg.header import (
    SOF_PROGRESSIVE,
    JpegHeader,
    is_read_by_ffcv,
    read_jpeg_header,
)
from data_prep.native import library as native_library
from data_prep.pixels import BadPicture, orientation, require_size
from data_prep.sources.files.paths import TAIL_BYTES, Ends

ENCODING_VERSION = "3"
"""Raise it whenever a change here or in `data_prep/pixels.py` changes stored bytes. It is in every manifest."""


@dataclass(frozen=True)
class Encoded:
    data: bytes
    mode: int
    """`layout.MODE_JPEG` or `layout.MODE_RAW`."""
    height: int
    width: int
    untouched: bool
    """`data` is the source's own."""
    is_rotated: bool = False
    """The source has an EXIF orientation, applied or not."""
    damage: str = ""
    """What was wrong with the source's file, if it was encoded again from what could be decoded of it."""


class LeftInSource(NamedTuple):
    """An image whose own bytes will be stored, of which only the ends have been read."""

    height: int
    width: int
    num_bytes: int
    check: int
    """`sample_digest` of `Ends.checked`."""
    is_rotated: bool
    """As in `Encoded`, as far as the file's first bytes show it."""


def leave_in_source(ends: Ends, settings: ConvertSettings) -> list[LeftInSource | None]:
    """What `encode` would store untouched, if a file's ends show that; None: the whole file must be read. Only for
    samples for which `ends_may_do`.
    """
    found: list[LeftInSource | None] = []
    for number, (header, num_bytes) in enumerate(zip(read_jpeg_headers(ends), ends.num_bytes.tolist(), strict=True)):
        if header is None or not _stays(header, num_bytes, settings):
            found.append(None)
        else:
            check, is_rotated = sample_digest(ends.checked(number)), orientation(bytes(ends.of(number)[0])) != 1
            found.append(LeftInSource(header.height, header.width, num_bytes, check, is_rotated))
    return found


def ends_may_do(settings: ConvertSettings, index: int) -> bool:
    """Whether the ends of a file may show that it is stored unchanged: only with `check: headers`."""
    # With pages larger than a range, an image is read once for each range it is in: only a digest of all its bytes
    # shows that the reads agree.
    return (
        settings.check == "headers"
        and settings.exif == "ignore"
        and settings.page_bytes <= RANGE_BYTES
        and _may_stay(settings, index)
    )


def encode(data: bytes, settings: ConvertSettings, index: int = 0) -> Encoded:
    """The bytes to store for an image file. `index`: the sample's index in its source, which decides with `mixed`.

    BadSample, with the reason, if it cannot be stored.
    """
    result = next(encode_all([data], [index], settings))
    if isinstance(result, BadSample):
        raise result
    return result


def encode_all(
    files: Sequence[bytes], indices: Sequence[int], settings: ConvertSettings
) -> Iterator[Encoded | BadSample]:
    """As `encode`, for several files in less time: their JPEGs are checked together.

    Each is encoded on demand: pixels may take a thousand times as many bytes as their file.
    """
    stays = [
        _as_it_is(data, header, settings, index)
        for data, header, index in zip(files, read_whole_jpeg_headers(files), indices, strict=True)
    ]
    to_check = [encoded.data for encoded in stays if encoded is not None] if settings.check == "decode" else []
    sound = iter(are_sound(to_check))
    for data, index, encoded in zip(files, indices, stays, strict=True):
        if encoded is not None and (settings.check == "headers" or next(sound)):
            yield encoded
        else:
            yield _encoded_or_bad(data, settings, index, encoded)


def _encoded_or_bad(
    data: bytes, settings: ConvertSettings, index: int, as_it_is: Encoded | None
) -> Encoded | BadSample:
    """Any error in one image makes it a bad sample, and has no other effect."""
    try:
        try:
            return _encode(data, settings, index, as_it_is)
        except DamagedSample as error:
            pixels = decode_damaged(data, settings) if settings.salvage else None
            if pixels is None:
                return error
            return replace(_encode_pixels(data, pixels, settings, index), damage=str(error))
    except BadSample as error:
        return error
    except BadPicture as error:
        return BadSample(str(error))
    except (UserError, Fault):
        raise
    except MemoryError:
        return BadSample("needs more memory than there is")
    except Exception as error:  # noqa: BLE001
        return BadSample(f"cannot be stored: {type(error).__name__}: {error}")


def _encode(data: bytes, settings: ConvertSettings, index: int, as_it_is: Encoded | None) -> Encoded:
    """`as_it_is`: the source's own bytes, to be stored if libjpeg-turbo reads them without a warning."""
    if not data:
        raise BadSample("is empty")
    if as_it_is is not None and is_read_to_its_end(data):
        return as_it_is
    return _encode_pixels(data, decode_rgb(data, settings), settings, index)


def _encode_pixels(data: bytes, pixels: NDArray[np.uint8], settings: ConvertSettings, index: int) -> Encoded:
    """`data`: the file that they are from."""
    encoded = _as_pixels(pixels, settings) if _is_wanted_raw(index, settings) else _as_jpeg(pixels, settings)
    if len(encoded.data) > settings.page_bytes:
        raise _too_large(len(encoded.data), settings)
    return replace(encoded, is_rotated=orientation(data) != 1)


def _is_wanted_raw(index: int, settings: ConvertSettings) -> bool:
    return settings.encode == "raw" or (settings.encode == "mixed" and is_raw(index, settings))


def is_raw(index: int, settings: ConvertSettings) -> bool:
    """Whether `mixed` stores the sample as pixels: a draw keyed by seed and index, so the same on every run."""
    draw = xxhash.xxh3_64_intdigest(struct.pack("<QQ", settings.seed, index))
    return draw < settings.raw_share * 2.0**64


def _as_it_is(data: bytes, header: JpegHeader | None, settings: ConvertSettings, index: int) -> Encoded | None:
    """The source's own bytes, if ffcv reads a file with these markers and it is small enough; else None."""
    if header is None or not _may_stay(settings, index) or not _stays(header, len(data), settings):
        return None
    is_rotated = orientation(data) != 1
    if settings.exif == "apply" and is_rotated:
        return None
    return Encoded(data, layout.MODE_JPEG, header.height, header.width, untouched=True, is_rotated=is_rotated)


def _may_stay(settings: ConvertSettings, index: int) -> bool:
    return settings.encode in ("original", "mixed") and not _is_wanted_raw(index, settings)


def _stays(header: JpegHeader, num_bytes: int, settings: ConvertSettings) -> bool:
    is_small = settings.max_side is None or max(header.height, header.width) <= settings.max_side
    try:
        require_size(header.width, header.height)
    except BadPicture:
        return False
    return is_small and num_bytes <= settings.page_bytes and is_read_by_ffcv(header)


def _as_pixels(pixels: NDArray[np.uint8], settings: ConvertSettings) -> Encoded:
    if pixels.nbytes > settings.page_bytes:
        raise _too_large(pixels.nbytes, settings)
    height, width, _ = pixels.shape
    return Encoded(pixels.tobytes(), layout.MODE_RAW, height, width, untouched=False)


def _as_jpeg(pixels: NDArray[np.uint8], settings: ConvertSettings) -> Encoded:
    """A JPEG; as pixels, if the stock decoder would show none of the attempts correctly."""
    height, width, _ = pixels.shape
    for quality, subsampling in _attempts(settings):
        data = turbojpeg.encode_rgb(pixels, quality, subsampling)
        if is_shown_right(data, pixels, quality, subsampling):
            return Encoded(data, layout.MODE_JPEG, height, width, untouched=False)
    return _as_pixels(pixels, settings)


def _attempts(settings: ConvertSettings) -> list[tuple[int, str]]:
    """Qualities and samplings to encode with, the user's first, each once."""
    first = (settings.quality, settings.subsampling)
    return list(dict.fromkeys([first, (settings.quality, "4:4:4"), (min(settings.quality, DEFAULT_QUALITY), "4:4:4")]))


def _too_large(size: int, settings: ConvertSettings) -> BadSample:
    return BadSample(
        f"has {size} bytes to store, more than a page of {settings.page_bytes}; use --max-side or a larger --page-mib"
    )


@cache
def encoder_versions() -> Mapping[str, str]:
    """Versions that decide the bytes of images that are encoded again. All workers must have the driver's."""
    from PIL import features

    return {
        "encoding": ENCODING_VERSION,
        "pillow": importlib.metadata.version("pillow"),
        "pillow's libjpeg_turbo": features.version_feature("libjpeg_turbo") or "unknown",
        "libturbojpeg": turbojpeg.library_version(),
        **_heif_version(),
    }


def _heif_version() -> Mapping[str, str]:
    """Empty if the plugin is not installed: then no picture is read with it."""
    try:
        return {"pillow-heif": importlib.metadata.version("pillow-heif")}
    except importlib.metadata.PackageNotFoundError:
        return {}


# --- headers of many JPEGs, from their ends or complete: plain files in C (`native/jpeg_headers.c`) -------------------

HEADER = np.dtype(
    [
        ("status", "u1"),
        ("frame", "u1"),
        ("num_components", "u1"),
        ("factors", "u1", 3),
        ("height", "<u2"),
        ("width", "<u2"),
    ]
)
UNUSUAL, PLAIN, INCOMPLETE = range(3)
"""`status`: left to Python; read in C; not complete in the bytes that were read."""
PRECISION = 8


def read_jpeg_headers(ends: Ends) -> list[JpegHeader | None]:
    """`read_jpeg_header` of each file; None also if its ends could not be read."""
    headers = np.zeros(len(ends), dtype=HEADER)
    library = native_library()
    if library is not None:
        rows, num_bytes = ends.rows, ends.num_bytes
        library.data_prep_jpeg_headers(
            rows.ctypes.data,
            rows.strides[0],
            len(ends),
            num_bytes.ctypes.data,
            ends.max_head_bytes,
            TAIL_BYTES,
            headers.ctypes.data,
        )

    def read_unusual(number: int) -> JpegHeader | None:
        head, tail = ends.of(number)
        return read_jpeg_header(bytes(head), bytes(tail))

    return _as_jpeg_headers(headers, read_unusual)


def read_whole_jpeg_headers(files: Sequence[bytes]) -> list[JpegHeader | None]:
    """`read_jpeg_header` of each file."""
    headers = np.zeros(len(files), dtype=HEADER)
    library = native_library()
    if library is not None:
        data, sizes = (ctypes.c_char_p * len(files))(*files), (ctypes.c_size_t * len(files))(*map(len, files))
        library.data_prep_whole_jpeg_headers(data, sizes, len(files), headers.ctypes.data)
    return _as_jpeg_headers(headers, lambda number: read_jpeg_header(files[number]))


def _as_jpeg_headers(
    headers: NDArray[np.void], read_unusual: Callable[[int], JpegHeader | None]
) -> list[JpegHeader | None]:
    factors = headers["factors"].tolist()
    found: list[JpegHeader | None] = []
    for number, (status, frame, count, _, height, width) in enumerate(headers.tolist()):
        if status == INCOMPLETE:
            found.append(None)
        elif status == PLAIN:
            sampling = _sampling(*factors[number][:count])
            in_one_scan = frame != SOF_PROGRESSIVE
            found.append(JpegHeader(height, width, frame, PRECISION, sampling, True, in_one_scan, True, True))
        else:
            found.append(read_unusual(number))
    return found


@cache
def _sampling(*factors: int) -> tuple[tuple[int, int], ...]:
    return tuple((factor >> 4, factor & 15) for factor in factors)
