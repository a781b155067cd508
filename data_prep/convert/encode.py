"""One sample of a source -> the bytes to store and what the beton says of them. Pure: the same on every machine."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.beton import layout
from data_prep.convert.config import ConvertSettings
from data_prep.convert.jpeg_header import is_read_by_ffcv, read_jpeg_header

if TYPE_CHECKING:
    from PIL import Image


ENCODING_VERSION = "1"
"""Raised whenever a change of this file changes stored bytes. Stands in every manifest."""


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


def encode(data: bytes, settings: ConvertSettings) -> Encoded:
    """Stores an image file as `settings` say. BadSample, with the reason, when it cannot be."""
    if not data:
        raise BadSample("is empty")
    encoded = _keep(data, settings) if settings.encode == "original" else None
    if encoded is None:
        encoded = _encode_anew(decode_rgb(data), settings)
    if len(encoded.data) > settings.page_bytes:
        raise BadSample(
            f"has {len(encoded.data)} bytes to store, more than a page of {settings.page_bytes}; "
            "use --max-side or a larger --page-mib"
        )
    return encoded


def _keep(data: bytes, settings: ConvertSettings) -> Encoded | None:
    """The source's own bytes, where ffcv reads them and they are small enough; None otherwise."""
    header = read_jpeg_header(data)
    if header is None or not is_read_by_ffcv(header):
        return None
    if settings.max_side is not None and max(header.height, header.width) > settings.max_side:
        return None
    return Encoded(data, layout.MODE_JPEG, header.height, header.width, untouched=True)


def _encode_anew(image: Image.Image, settings: ConvertSettings) -> Encoded:
    image = shrink(image, settings.max_side)
    if max(image.size) > layout.MAX_SIDE_PX:
        raise BadSample(
            f"is {image.width} x {image.height} px, the format ends at {layout.MAX_SIDE_PX}; use --max-side"
        )
    if settings.encode == "raw":
        return Encoded(image.tobytes(), layout.MODE_RAW, image.height, image.width, untouched=False)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=settings.quality, subsampling=settings.subsampling)
    return Encoded(file.getvalue(), layout.MODE_JPEG, image.height, image.width, untouched=False)


def decode_rgb(data: bytes) -> Image.Image:
    """Any image file Pillow reads, as 8-bit RGB. BadSample when it is cut short, damaged or no image.

    As torchvision's ImageFolder does: alpha is dropped, an EXIF orientation is ignored.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        raise BadSample("is not an image that Pillow knows") from None
    # What Pillow's decoders raise on damaged files is not one family: see its own fuzzers' list.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error) as error:
        raise BadSample(f"cannot be decoded: {error}") from None
    except (MemoryError, Image.DecompressionBombError) as error:
        raise BadSample(f"is too large to decode: {error}") from None
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in ("I", "F"):
        raise BadSample(f"has pixels of 32 bits (Pillow mode {image.mode}), expected 8 or 16")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def shrink(image: Image.Image, max_side: int | None) -> Image.Image:
    """The longer side to `max_side` px when it is longer, with an antialiasing filter; the other in proportion."""
    from PIL import Image

    longer = max(image.size)
    if max_side is None or longer <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
