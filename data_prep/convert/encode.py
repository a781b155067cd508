"""One sample of a source -> the bytes to store and what the beton says of them. Pure: the same on every machine."""

from __future__ import annotations

import importlib.metadata
import io
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.digest import sample_digest
from data_prep.beton.ranges import RANGE_BYTES
from data_prep.convert.config import ConvertSettings
from data_prep.convert.jpeg_headers import read_jpeg_headers
from data_prep.convert.shrink import shrink
from data_prep.jpeg import turbojpeg
from data_prep.jpeg.header import (
    MAX_DECODED_SIDE_PX,
    JpegHeader,
    is_jpeg,
    is_read_by_ffcv,
    plain,
    read_jpeg_header,
    read_odd_jpeg_header,
)
from data_prep.jpeg.native_check import are_sound
from data_prep.sources.base import IMAGE_FORMATS
from data_prep.sources.ends import Ends

if TYPE_CHECKING:
    from PIL import Image


ENCODING_VERSION = "2"
"""Raised whenever a change of this file changes stored bytes. Stands in every manifest."""

MAX_DECODED_PIXELS = 36_000_000
"""Four bytes each in Pillow, twice where the colours are converted: what 512 MiB for a worker allow."""

DRAFT_RESERVE = 2
"""A JPEG may be decoded at 1/2, 1/4 or 1/8 as long as this many times the sides wanted are left to the resize filter.

On ImageNet files shrunk to 256 px: 0.07 grey levels (mean, 0.7 at worst) from the full decode, in 0.81 of the time.
With a reserve of 1 it would be 1.9 (6.8) in 0.42, which is no longer nothing.
"""

ORIENTATION_TAG = 0x0112


class BadSample(Exception):
    """This sample cannot be stored; the message is the reason."""


@dataclass(frozen=True)
class Encoded:
    data: bytes
    mode: int
    """`layout.MODE_JPEG` or `layout.MODE_RAW`."""
    height: int
    width: int
    untouched: bool
    """`data` is the source's own."""


class LeftInSource(NamedTuple):
    """An image whose own bytes are stored, and which has not been read for that but for its ends."""

    height: int
    width: int
    num_bytes: int
    check: int
    """`sample_digest` of `Ends.checked`."""


def leave_in_source(ends: Ends, settings: ConvertSettings) -> list[LeftInSource | None]:
    """What `encode` would store untouched, where a file's ends tell that; None: the file must be read.

    Only of files for which `ends_may_do`.
    """
    found: list[LeftInSource | None] = []
    for number, (header, num_bytes) in enumerate(zip(read_jpeg_headers(ends), ends.num_bytes.tolist(), strict=True)):
        if header is None or not _stays(header, num_bytes, settings):
            found.append(None)
        else:
            found.append(LeftInSource(header.height, header.width, num_bytes, sample_digest(ends.checked(number))))
    return found


def ends_may_do(settings: ConvertSettings, index: int) -> bool:
    """Whether a file's ends may tell that it is stored as it is: with `check: headers` only."""
    # An image of a page larger than a range is read once for each range that it lies in: only a digest of all its bytes
    # tells that these readings agree.
    return (
        settings.check == "headers"
        and settings.exif == "ignore"
        and settings.page_bytes <= RANGE_BYTES
        and _may_stay(settings, index)
    )


def encode(data: bytes, settings: ConvertSettings, index: int = 0) -> Encoded:
    """Stores an image file as `settings` say. `index`: of the sample in its source, which decides with `mixed`.

    BadSample, with the reason, when it cannot be stored.
    """
    (result,) = encode_all([data], [index], settings)
    if isinstance(result, BadSample):
        raise result
    return result


def encode_all(files: Sequence[bytes], indices: Sequence[int], settings: ConvertSettings) -> list[Encoded | BadSample]:
    """As `encode`, of several files, which takes less time: their JPEGs are checked together."""
    stays = [_as_it_is(data, settings, index) for data, index in zip(files, indices, strict=True)]
    to_check = [encoded.data for encoded in stays if encoded is not None] if settings.check == "decode" else []
    sound = iter(are_sound(to_check))
    results: list[Encoded | BadSample] = []
    for data, index, encoded in zip(files, indices, stays, strict=True):
        is_sound = encoded is not None and (settings.check == "headers" or next(sound))
        try:
            results.append(encoded if encoded is not None and is_sound else _encode(data, settings, index, encoded))
        except BadSample as error:
            results.append(error)
    return results


def _encode(data: bytes, settings: ConvertSettings, index: int, as_it_is: Encoded | None) -> Encoded:
    """`as_it_is`: where the source's bytes could be stored if libjpeg-turbo reads them without a warning."""
    if not data:
        raise BadSample("is empty")
    if as_it_is is not None and _is_read_to_its_end(data):
        return as_it_is
    pixels = decode_rgb(data, settings)
    encoded = _as_pixels(pixels, settings) if _is_wanted_raw(index, settings) else _as_jpeg(pixels, settings)
    if len(encoded.data) > settings.page_bytes:
        raise _too_large(len(encoded.data), settings)
    return encoded


def _is_wanted_raw(index: int, settings: ConvertSettings) -> bool:
    return settings.encode == "raw" or (settings.encode == "mixed" and is_raw(index, settings))


def is_raw(index: int, settings: ConvertSettings) -> bool:
    """Whether `mixed` stores the sample as pixels: a draw keyed by seed and index, so the same on every run."""
    draw = xxhash.xxh3_64_intdigest(struct.pack("<QQ", settings.seed, index))
    return draw < settings.raw_share * 2.0**64


def _as_it_is(data: bytes, settings: ConvertSettings, index: int) -> Encoded | None:
    """The source's own bytes, if by its markers ffcv reads the file, and it is small enough; None otherwise."""
    if not _may_stay(settings, index):
        return None
    header = read_jpeg_header(data)
    if header is None or not _stays(header, len(data), settings):
        return None
    if settings.exif == "apply" and _is_turned(data):
        return None
    return Encoded(data, layout.MODE_JPEG, header.height, header.width, untouched=True)


def _may_stay(settings: ConvertSettings, index: int) -> bool:
    return settings.encode in ("original", "mixed") and not _is_wanted_raw(index, settings)


def _stays(header: JpegHeader, num_bytes: int, settings: ConvertSettings) -> bool:
    is_small = settings.max_side is None or max(header.height, header.width) <= settings.max_side
    return is_small and num_bytes <= settings.page_bytes and is_read_by_ffcv(header)


def _is_read_to_its_end(data: bytes) -> bool:
    """False for a JPEG that the decoder takes offence at without calling it damaged, which is a BadSample."""
    try:
        turbojpeg.check(data)
    except turbojpeg.Unreadable:
        return False
    except turbojpeg.Damaged as error:
        raise BadSample(f"is damaged: {error}") from None
    except turbojpeg.TooLarge as error:
        raise BadSample(f"is too large to decode: {error}") from None
    return True


def _is_turned(data: bytes) -> bool:
    from PIL import Image

    if b"Exif\0" not in data[:1024] and b"Exif\0" not in data:
        return False
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).getexif().get(ORIENTATION_TAG, 1) != 1
    except Exception:  # noqa: BLE001  # a damaged tag raises half a dozen kinds; then there is no orientation to apply
        return False


def _as_pixels(pixels: NDArray[np.uint8], settings: ConvertSettings) -> Encoded:
    if pixels.nbytes > settings.page_bytes:
        raise _too_large(pixels.nbytes, settings)
    height, width, _ = pixels.shape
    return Encoded(pixels.tobytes(), layout.MODE_RAW, height, width, untouched=False)


def _as_jpeg(pixels: NDArray[np.uint8], settings: ConvertSettings) -> Encoded:
    height, width, _ = pixels.shape
    if max(height, width) > MAX_DECODED_SIDE_PX:
        raise BadSample(f"is {width} x {height} px, libjpeg ends at {MAX_DECODED_SIDE_PX}; use --max-side")
    data = turbojpeg.encode_rgb(pixels, settings.quality, settings.subsampling)
    return Encoded(data, layout.MODE_JPEG, height, width, untouched=False)


def _too_large(size: int, settings: ConvertSettings) -> BadSample:
    return BadSample(
        f"has {size} bytes to store, more than a page of {settings.page_bytes}; use --max-side or a larger --page-mib"
    )


def decode_rgb(data: bytes, settings: ConvertSettings) -> NDArray[np.uint8]:
    """Any image file as RGB, uint8 [height, width, 3], shrunk to `max_side`. BadSample when it cannot be.

    As torchvision's ImageFolder does: alpha is dropped, and, unless `exif` is `apply`, an EXIF orientation is ignored.
    A JPEG that is to be shrunk much is decoded at a fraction of its size, see `DRAFT_RESERVE`.
    """
    header = read_odd_jpeg_header(data)
    if header and header.height and header.width and not (settings.exif == "apply" and _is_turned(data)):
        size = _shrunk_size((header.width, header.height), settings.max_side)
        reduction = _reduction((header.width, header.height), size)
        _require_decodable((header.width // reduction, header.height // reduction))
        try:
            pixels = turbojpeg.decode_rgb(data, reduction)
            return shrink(pixels, size)
        except turbojpeg.Damaged as error:
            raise BadSample(f"is damaged: {error}") from None
        except turbojpeg.TooLarge as error:
            raise BadSample(f"is too large to decode: {error}") from None
        except turbojpeg.Unreadable:
            pass  # CMYK and the like: Pillow may know it
    return _decode_with_pillow(data, settings)


def _decode_with_pillow(data: bytes, settings: ConvertSettings) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if is_jpeg(data) and not _is_read_to_its_end(data):  # Pillow would not tell what is damaged
        data = plain(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF, and Pillow's own limit on size, which is above ours
            image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            size = _shrunk_size(image.size, settings.max_side)
            image.draft("", (size[0] * DRAFT_RESERVE, size[1] * DRAFT_RESERVE))
            _require_decodable(image.size)
            image.load()
            if settings.exif == "apply" and image.getexif().get(ORIENTATION_TAG, 1) != 1:
                before = image.size
                image = ImageOps.exif_transpose(image)
                size = size[::-1] if image.size == before[::-1] else size
    except UnidentifiedImageError:
        raise BadSample("is not an image that Pillow knows") from None
    except (MemoryError, Image.DecompressionBombError) as error:
        raise BadSample(f"is too large to decode: {error}") from None
    # What Pillow's decoders raise on damaged files is not one family: see its own fuzzers' list.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, struct.error) as error:
        raise BadSample(f"cannot be decoded: {error}") from None
    return shrink(np.ascontiguousarray(_to_rgb(image)), size)


def _reduction(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 that leaves the resize filter its reserve."""
    factor = min(side // (target * DRAFT_RESERVE) for side, target in zip(size, wanted, strict=True))
    return next((reduction for reduction in (8, 4, 2) if factor >= reduction), 1)


def _shrunk_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """The longer side to `max_side` px when it is longer, the other in proportion. BadSample beyond 65,535."""
    longer = max(size)
    if max_side is not None and longer > max_side:
        width, height = (max(1, round(side * max_side / longer)) for side in size)
        return width, height
    if longer > layout.MAX_SIDE_PX:
        raise BadSample(f"is {size[0]} x {size[1]} px, the format ends at {layout.MAX_SIDE_PX}; use --max-side")
    return size


def _require_decodable(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_DECODED_PIXELS:
        raise BadSample(f"is too large to decode: {size[0]} x {size[1]} px, more than {MAX_DECODED_PIXELS:,} in all")


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        raise BadSample(f"has pixels of 32 bits (Pillow mode {image.mode}), expected 8 or 16")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@cache
def encoder_versions() -> Mapping[str, str]:
    """Of what decides the bytes of images that are encoded anew: all workers of a conversion must have the same."""
    from PIL import features

    return {
        "encoding": ENCODING_VERSION,
        "pillow": importlib.metadata.version("pillow"),
        "pillow's libjpeg_turbo": features.version_feature("libjpeg_turbo") or "unknown",
        "libturbojpeg": turbojpeg.library_version(),
    }
