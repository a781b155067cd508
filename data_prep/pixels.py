"""The bytes of a picture file -> RGB pixels, in one way for conversion, inspection, verification, evaluation, serving.

A copy of this file is logged with every model, so it imports only the standard library, numpy and Pillow.

All formats are treated alike. Of several pictures in a file the first is read, of more than 8 bits the upper 8 are
kept; colour profiles and gamma are ignored, as in torchvision; alpha and EXIF orientation follow `PictureSettings`.
Whatever the bytes are, the only error is `BadPicture`.
"""

from __future__ import annotations

import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

Exif = Literal["ignore", "apply"]
READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    **({"AVIF": AvifImagePlugin.AvifImageFile} if AvifImagePlugin.SUPPORTED else {}),
}
"""Pillow's, called by name: `Image.open` may also choose others (of an EPS file it runs Ghostscript)."""
FORMATS: tuple[str, ...] = tuple(READERS)
"""Pillow's names of the formats that are read, besides `HEIF` if its plugin is installed."""


class BadPicture(ValueError):
    """These bytes cannot become pixels. The message is one line that continues the picture's name: `is empty`."""


@dataclass(frozen=True)
class Limits:
    """Limits on one picture, for all formats and all tools, checked on its header before it is decoded."""

    pixels: int = 36_000_000
    """Decoded pixels: 144 MB as Pillow holds them, and twice that where they are converted. A JPEG that is decoded at a
    fraction of its size has the pixels of that fraction."""
    side: int = 65_500
    """px: libjpeg's limit, JPEG_MAX_DIMENSION."""
    aspect: int = 1_000
    """Longer to shorter side."""
    decoded_bytes: int = 768 << 20
    """Memory for decoding, with all a decoder holds at once: a WebP's canvases, the components of a JPEG 2000 file, a
    tile of a TIFF, the coefficients of a JPEG in several scans."""
    coefficient_bytes: int = 256 << 20
    """Coefficients of a JPEG: a decoder holds a few rows of one in a single scan, but all of any other, at whatever
    fraction of its size it is decoded. resnet_dist/data/native/jpeg_region.c has this limit and the next two."""
    scans: int = 500
    """Scans of a JPEG; libjpeg-turbo's own limit."""
    scan_pixels: int = 2_000_000_000
    """A JPEG's scans times its pixels: each scan is a pass over all of them, and a few bytes order one."""


LIMITS = Limits()


@dataclass(frozen=True)
class PictureSettings:
    """What the user may choose. ValueError for other values."""

    exif: Exif = "ignore"
    """An EXIF orientation: `ignore`, as torchvision's ImageFolder and all published figures do, or `apply`."""
    background: tuple[int, int, int] | None = None
    """Red, green and blue that transparent pixels show; None: alpha is dropped, whatever colours it hid."""

    def __post_init__(self) -> None:
        if self.exif not in get_args(Exif):
            raise ValueError(f"exif {self.exif!r}: expected one of {', '.join(get_args(Exif))}")
        if self.background is not None and not _is_colour(self.background):
            raise ValueError(f"background {self.background!r}: expected red, green and blue, each 0..255")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "background": None if self.background is None else list(self.background)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PictureSettings:
        """From `as_dict`, or any mapping with some of its keys; other keys are ignored."""
        found = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        background = found.get("background")
        if isinstance(background, list):
            found["background"] = tuple(background)
        return cls(**found)


SMALLER = "make it smaller first"
DRAFT_RESERVE = 2
"""A JPEG may be decoded at 1/2, 1/4 or 1/8 if its sides are still this many times those of the result.

On ImageNet files shrunk to 256 px: 0.07 grey levels (mean, 0.7 at worst) from the full decode, in 0.81 of the time.
With a reserve of 1 it would be 1.9 (6.8) in 0.42 of the time: too much.
"""


class PictureHeader(NamedTuple):
    """What a file's header says about its picture."""

    format: str
    """One of `FORMATS`."""
    mode: str
    """Pillow's: RGB, L (gray), P (palette), CMYK, ..."""
    width: int
    height: int
    orientation: int
    """1..8 as in EXIF; 1 if there is none that can be read."""


def to_rgb(
    data: bytes, settings: PictureSettings = PictureSettings(), *, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """The picture in mode RGB. BadPicture when it is damaged, of another kind, or beyond `LIMITS`.

    `at_least`: width and height that a JPEG must keep; it may then be decoded at 1/2, 1/4 or 1/8 of its size.
    """
    with _as_bad_picture():
        image, file_format = _open(data, at_least)
        _require_decodable(image, file_format, data)
        key = _transparent_colour(image, file_format)
        depth = _gray_depth(image)
        _forget_orientation(image)
        image.load()
        rgb = _colours(image, depth)
        alpha = None if settings.background is None else _alpha(image, key)
        if settings.background is not None and alpha is not None:
            on_background = Image.new("RGB", rgb.size, settings.background)
            on_background.paste(rgb, mask=alpha)
            rgb = on_background
        return turned(rgb, orientation(data, file_format)) if settings.exif == "apply" else rgb


def read_header(data: bytes, remedy: str = SMALLER) -> PictureHeader:
    """BadPicture as `to_rgb` raises it, for what shows without decoding. `remedy`: for a picture that is too large."""
    with _as_bad_picture():
        image, file_format = _open(data, None, remedy)
        _require_decodable(image, file_format, data, remedy)
        return PictureHeader(file_format, image.mode, image.width, image.height, orientation(data, file_format))


def require_size(width: int, height: int, remedy: str = SMALLER) -> None:
    """BadPicture for a picture of no pixels, or beyond `LIMITS`."""
    require_sides(width, height, remedy)
    if width * height > LIMITS.pixels:
        raise BadPicture(f"is {width} x {height} px, more than {LIMITS.pixels:,} px in all; {remedy}")


def require_sides(width: int, height: int, remedy: str = SMALLER) -> None:
    """BadPicture as `require_size`, except for the number of pixels: a JPEG may be decoded at a fraction of them."""
    if width < 1 or height < 1:
        raise BadPicture(f"is {width} x {height} px: it has no pixels")
    if max(width, height) > LIMITS.side:
        raise BadPicture(f"is {width} x {height} px, more than {LIMITS.side:,} px on a side; {remedy}")
    if max(width, height) > LIMITS.aspect * min(width, height):
        raise BadPicture(
            f"is {width} x {height} px, one side more than {LIMITS.aspect:,} times the other; cut it into pieces first"
        )


def picture_format(data: bytes) -> str | None:
    """One of `FORMATS`, or `HEIF`, by the file's first bytes; None if it is not read."""
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if re.match(rb"P[1-6f]\s", data[:3]):
        return "PPM"
    if re.match(_NOT_READ[AVIF], data[:1024], re.DOTALL):
        return "AVIF" if "AVIF" in READERS else None
    if re.match(_NOT_READ[HEIC], data[:1024], re.DOTALL):
        return "HEIF" if _heif_reader() is not None else None
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


@cache
def _heif_reader() -> Callable[[io.BytesIO], ImageFile.ImageFile] | None:
    """The plugin pillow-heif's; None if it is not installed."""
    try:
        reader: Callable[[io.BytesIO], ImageFile.ImageFile] = import_module("pillow_heif").HeifImageFile
    except ImportError:
        return None
    return reader


_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
}
_CONVERT = "convert it to JPEG or PNG first"
AVIF, HEIC, JPEG_XL = "an AVIF picture", "a HEIC picture", "a JPEG XL picture"
_NOT_READ = {
    AVIF: rb".{4}ftyp(avif|avis|(mif1|msf1).{4}(.{4}){0,8}avi[fs])",
    HEIC: rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
    "a camera's raw file": rb".{4}ftypcrx |II\x55\0|IIRO|IIRS|FUJIFILMCCD-RAW",
    "a film": rb".{4}ftyp|RIFF....AVI |\x1aE\xdf\xa3",
    JPEG_XL: rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "a Photoshop file": rb"8BPS",
    "a DDS texture": rb"DDS ",
    "a PostScript file": rb"%!PS|\xc5\xd0\xd3\xc6|.{0,64}%!PS-Adobe",
    "a PDF file": rb"%PDF",
    "an icon": rb"\0\0[\x01\x02]\0[^\0]|icns",
    "a QOI picture": rb"qoif",
    "an OpenEXR picture": rb"\x76\x2f\x31\x01",
    "a Radiance picture": rb"#\?RADIANCE|#\?RGBE",
    "a PAM picture": rb"P7\s",
    "a PFM picture of 32-bit colours": rb"PF\s",
    "a FITS file": rb"SIMPLE  =",
    "an SGI picture": rb"\x01\xda[\0\x01][\x01\x02]",
    "a Sun raster": rb"\x59\xa6\x6a\x95",
    "a PCX picture": rb"\x0a[\0-\x05]\x01[\x01\x02\x04\x08]",
    "an XPM picture": rb"/\* XPM \*/",
    "an XBM picture": rb"#define \w+_width",
    "a GIMP file": rb"gimp xcf",
    "a FLIF picture": rb"FLIF",
    "a BPG picture": rb"BPG\xfb",
    "a JPEG XR picture": rb"II\xbc\x01|WMPHOTO",
    "a DICOM file": rb".{128}DICM",
    "a DjVu file": rb"AT&TFORM",
    "an archive": rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd",
    "a file of arrays": rb"\x89HDF|CDF[\x01\x02]|\x93NUMPY",
    "an SVG drawing": rb"\xef?\xbb?\xbf?\s*(<\?xml[^>]*>\s*(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?)?<svg",
    "a web page": rb"(?i)\xef?\xbb?\xbf?\s*(<!doctype html|<html|<head)",
    "a pointer of Git LFS and not the file itself": rb"version https://git-lfs",
}
"""Kinds of files often found among pictures that are not read, and how they start."""
_REMEDIES = {
    AVIF: "install a Pillow that reads AVIF (11.3 or newer), or convert it to PNG first",
    HEIC: "install pillow-heif, or convert it to PNG first",
    JPEG_XL: "convert it with `djxl` first: to JPEG if it was made of one, else to PNG",
    "a film": "take pictures out of it first",
    "an archive": "unpack it first",
    "a web page": "the download went wrong: load the file again",
    "a pointer of Git LFS and not the file itself": "fetch it with `git lfs pull`",
}


def _unknown(data: bytes) -> BadPicture:
    if not data:
        return BadPicture("is empty")
    if not data.strip(b"\0"):
        return BadPicture("holds zeros only")
    start = data[:1024]
    for name, magic in _NOT_READ.items():
        if re.match(magic, start, re.DOTALL):
            return BadPicture(f"is {name}; {_REMEDIES.get(name, _CONVERT)}")
    if data[-18:] == b"TRUEVISION-XFILE.\0":
        return BadPicture(f"is a TGA picture; {_CONVERT}")
    return BadPicture("is no picture of a format that is read: JPEG, PNG, GIF, BMP, TIFF, WebP, PPM, JPEG 2000, AVIF")


class _as_bad_picture:  # noqa: N801  # a context manager
    """Turns any error into BadPicture: Pillow and its libraries raise a dozen kinds on damaged files."""

    def __enter__(self) -> None:
        _silence_pillow()
        _silence_libtiff()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, BadPicture) or not isinstance(error, Exception):
            return
        if isinstance(error, MemoryError):
            raise BadPicture("needs more memory than there is") from None
        if isinstance(error, Image.DecompressionBombError):
            raise BadPicture(f"is larger than {LIMITS.pixels:,} px; make it smaller first") from None
        raise BadPicture(f"is damaged or of an unusual kind: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    message = error.args[0].decode("latin-1") if error.args and isinstance(error.args[0], bytes) else str(error)
    text = " ".join(message.split())
    if not isinstance(error, OSError | ValueError | SyntaxError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "the file", text)
    return text if len(text) <= 200 else text[:200] + "..."


_PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\..*"), 0)


def _silence_pillow() -> None:
    """Until the process ends: `warnings.catch_warnings` is not safe with threads."""
    if _PILLOWS_WARNINGS not in warnings.filters:
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=_PILLOWS_WARNINGS[3].pattern)


@cache
def _silence_libtiff() -> None:
    """Its handlers print warnings and errors to stderr; errors reach Pillow anyway."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        for path in {line.split(maxsplit=5)[5].strip() for line in maps.splitlines() if "/libtiff" in line}:
            library = ctypes.CDLL(path)
            library.TIFFSetWarningHandler(None)
            library.TIFFSetErrorHandler(None)
    except (OSError, AttributeError, IndexError):  # not Linux, or linked statically: its lines appear
        pass


def _open(data: bytes, at_least: tuple[int, int] | None, remedy: str = SMALLER) -> tuple[ImageFile.ImageFile, str]:
    """The picture, not decoded yet, and its format. BadPicture when its sides are beyond the limits."""
    file_format = picture_format(data)
    if file_format is None:
        raise _unknown(data)
    file = data
    if file_format == "JPEG":
        parts = _jpeg_parts(data)
        if parts is not None:
            require_sides(parts.width, parts.height, remedy)
            file = _without(data, parts.metadata)
    elif file_format == "PNG":
        file = _without(data, _png_metadata(data))
    elif file_format == "WEBP":
        size = _webp_size(data)
        if size is not None:
            require_size(*size, remedy)
    elif file_format == "TIFF":
        file = _with_orientation_1(data)  # Pillow turns TIFFs by itself when it decodes them
    reader = READERS.get(file_format) or _heif_reader()
    assert reader is not None  # or `picture_format` would not have named the format
    image = reader(io.BytesIO(file))
    require_sides(image.width, image.height, remedy)
    if at_least is not None and file_format == "JPEG":  # of a HEIC it would be a thumbnail
        image.draft("", at_least)
    return image, file_format


def _require_decodable(image: ImageFile.ImageFile, file_format: str, data: bytes, remedy: str = SMALLER) -> None:
    width, height = image.size
    require_size(width, height, remedy)
    pixels = width * height
    held = pixels * 8  # as Pillow has them, and in RGB
    if file_format == "JPEG":
        held += _coefficient_bytes(data)
    elif file_format in ("WEBP", "AVIF", "HEIF"):
        held = pixels * 16
    elif file_format == "JPEG2000":
        width, height, components = _jpeg2000_size(data) or (width, height, len(image.getbands()))
        require_size(width, height, remedy)
        held = width * height * (4 * components + 8)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        held += _tiff_piece_bytes(image)
    if held > LIMITS.decoded_bytes:
        raise BadPicture(
            f"takes {held >> 20:,} MiB to decode, more than {LIMITS.decoded_bytes >> 20:,}; "
            "store it in another way, as PNG or JPEG, first"
        )


class _JpegParts(NamedTuple):
    width: int
    height: int
    sampling: bytes
    """Sampling factors of each component, horizontal << 4 | vertical."""
    is_progressive: bool
    first_scan: int
    """Offset of its marker."""
    exif: tuple[int, int]
    """Start and end; (0, 0) if there is none."""
    metadata: list[tuple[int, int]]
    """Start and end of each segment that libjpeg ignores."""


def _jpeg_parts(data: bytes) -> _JpegParts | None:
    """None if the markers cannot be followed to the first scan."""
    at, frame, exif = 2, None, (0, 0)
    metadata: list[tuple[int, int]] = []
    behind = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        if at > behind:
            metadata.append((behind, at))  # bytes between segments, which libjpeg steps over
        body, end = at + 4, at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == 0xD9 or end < body or end > len(data):
            return None
        if marker == 0xDA:
            return frame and _JpegParts(*frame, at, exif, metadata)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if end - body < 6 or frame is not None:
                return None
            height, width = struct.unpack_from(">HH", data, body + 1)
            frame = width, height, data[body + 7 : end : 3], marker in (0xC2, 0xC6, 0xCA, 0xCE)
        if marker == 0xE1 and exif == (0, 0) and data.startswith(b"Exif\0", body):
            exif = body + 6, end
        if _is_metadata(data, marker, body, end):
            metadata.append((at, end))
        at = behind = end
    return None


def _png_metadata(data: bytes) -> list[tuple[int, int]]:
    """Chunks that affect no pixel: all optional ones but transparency. So only an animation's first picture is left."""
    found, at = [], 8
    while at + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name[0] & 0x20 and name != b"tRNS":
            found.append((at, min(at + 12 + size, len(data))))
        at += 12 + size
    return found


def _without(data: bytes, pieces: list[tuple[int, int]]) -> bytes:
    """Pillow also reads metadata, and refuses a good picture if these are invalid."""
    if not pieces:
        return data
    starts, ends = zip(*pieces, strict=True)
    return b"".join(data[start:end] for start, end in zip((0, *ends), (*starts, len(data)), strict=True))


def _is_metadata(data: bytes, marker: int, start: int, end: int) -> bool:
    """Whether libjpeg ignores the segment. Of application segments it reads complete JFIF and Adobe ones."""
    if marker == 0xE0:
        return not (data.startswith(b"JFIF\0", start) and end - start >= 14)
    if marker == 0xEE:
        return not (data.startswith(b"Adobe", start) and end - start >= 12)
    return 0xE0 <= marker <= 0xEF or marker == 0xFE


def _coefficient_bytes(data: bytes) -> int:
    """Bytes of coefficients that libjpeg holds: 0 for a JPEG in a single scan, of which it holds a few rows. BadPicture
    for too many."""
    parts = _jpeg_parts(data)
    if parts is None:
        return 0
    num_components = data[parts.first_scan + 4 : parts.first_scan + 5]
    if not parts.is_progressive and num_components == bytes([len(parts.sampling)]):
        return 0
    scans = data.count(b"\xff\xda", parts.first_scan)  # within a scan's data 0xFF is always followed by 0
    if scans > LIMITS.scans or scans * parts.width * parts.height > LIMITS.scan_pixels:
        raise BadPicture(
            f"has {scans:,} scans of {parts.width} x {parts.height} px, more than can be decoded in time; encode it "
            "again with fewer"
        )
    across, down = [factors >> 4 for factors in parts.sampling], [factors & 15 for factors in parts.sampling]
    blocks = sum(
        -(-parts.width * a // (8 * max(1, *across))) * -(-parts.height * d // (8 * max(1, *down)))
        for a, d in zip(across, down, strict=True)
    )
    held = 128 * blocks
    if held > LIMITS.coefficient_bytes:
        raise BadPicture(
            f"is {parts.width} x {parts.height} px in several scans, {held >> 20:,} MiB of coefficients at once, more "
            f"than {LIMITS.coefficient_bytes >> 20}; make it smaller, or store it in one scan, first"
        )
    return held


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas, which libwebp allocates as soon as the file is opened."""
    if data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif data[12:16] == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif data[12:16] == b"VP8 " and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    else:
        return None
    return width, height


def _jpeg2000_size(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and components in the codestream; those in the boxes around it may differ."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(data) < at + 42:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    (components,) = struct.unpack_from(">H", data, at + 40)
    return right - left, bottom - top, components


def _tiff_piece_bytes(image: TiffImagePlugin.TiffImageFile) -> int:
    """Decoded bytes of a tile, or of the rows that are compressed together."""
    tags = image.tag_v2
    bits = tags.get(258, (8,))
    samples = tags.get(277, 1)
    bits_per_pixel = max(bits) * samples if isinstance(bits, tuple) else int(bits) * samples
    if 322 in tags and 323 in tags:
        return int(tags[322]) * int(tags[323]) * bits_per_pixel // 8
    return image.width * min(int(tags.get(278, image.height)), image.height) * bits_per_pixel // 8


def _forget_orientation(image: ImageFile.ImageFile) -> None:
    """Pillow also turns TIFFs by an orientation in XMP."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        exif = image.getexif()
        while ORIENTATION_TAG in exif:
            del exif[ORIENTATION_TAG]


def _gray_depth(image: Image.Image) -> int:
    """Bits of a gray value that has more than 8."""
    tags = getattr(image, "tag_v2", None)
    bits = tags.get(258, 16) if tags is not None else 16
    depth = bits[0] if isinstance(bits, tuple) else bits
    return depth if 8 < depth <= 16 else 16


def _transparent_colour(image: ImageFile.ImageFile, file_format: str) -> Any:
    """`info["transparency"]`, scaled to the values of decoded pixels: Pillow leaves that of PNGs of 2, 4 and 16 bits as
    stored."""
    key = image.info.get("transparency")
    if file_format != "PNG" or key is None or not image.tile:
        return key
    raw_mode = str(image.tile[0].args)
    if isinstance(key, int) and raw_mode in ("L;2", "L;4"):
        return key * (85 if raw_mode == "L;2" else 17)
    if isinstance(key, tuple) and raw_mode.startswith("RGB;16"):
        return tuple(value >> 8 for value in key)
    return key


def _colours(image: Image.Image, depth: int) -> Image.Image:
    """The picture as RGB without alpha."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _of_gray(image, depth)
    if image.mode in ("I", "F"):
        kind = "fractions" if image.mode == "F" else "signed or of 32 bits"
        raise BadPicture(f"has gray values that are {kind}; convert it to 8 or 16 bits without a sign first")
    if _is_signed(image):
        raise BadPicture("has signed gray values; convert it to 8 or 16 bits without a sign first")
    if image.mode in ("La", "RGBa"):  # multiplied by alpha already
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if "transparency" in image.info:  # Pillow would look for its colour in the new image's palette
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _of_gray(image: Image.Image, depth: int) -> Image.Image:
    """The upper 8 bits: Pillow's own conversion of 16 bits clips at 255."""
    values = np.asarray(image)
    gray = np.minimum(values >> (depth - 8), 255).astype(np.uint8)
    tags = getattr(image, "tag_v2", None)
    if tags is not None and tags.get(262) == 0:  # white is zero, which Pillow turns round for 8 bits only
        gray = 255 - gray
    return Image.fromarray(gray).convert("RGB")


def _is_signed(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", None)
    return tags is not None and 2 in np.atleast_1d(tags.get(339, 1)).tolist()


def _is_in_planes(image: Image.Image) -> bool:
    """Whether a TIFF stores gray and alpha as separate planes, of which Pillow reads only the gray."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(284) == 2


def _alpha(image: Image.Image, key: Any) -> Image.Image | None:
    """Opacity of each pixel as an image of mode L; None: all are opaque."""
    bands = image.getbands()
    if len(bands) == 2 and _is_in_planes(image):
        raise BadPicture("has its alpha in a plane of its own, which is read wrong; convert it to PNG first")
    if bands[-1] in ("A", "a"):
        return image.getchannel(bands[-1])
    if image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA":
        return image.convert("RGBA").getchannel("A")
    if key is None:
        return None
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if isinstance(key, bytes):
        opaque = np.full(256, 255, np.uint8)
        opaque[: len(key)] = np.frombuffer(key[:256], np.uint8)
        return Image.fromarray(opaque[values])
    is_key = values == np.asarray(key)
    if is_key.ndim == 3:
        is_key = is_key.all(axis=2)
    return Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8))


ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turned(image: Image.Image, turn: int) -> Image.Image:
    """The image upright. `turn`: an `orientation`."""
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def orientation(data: bytes, file_format: str | None = None) -> int:
    """1..8, from the EXIF tag in the one place that each format has for it; 1 if there is none, or another value.

    XMP is ignored in every format, and so is what ImageMagick writes into a PNG's text.
    """
    file_format = file_format or picture_format(data)
    if file_format == "JPEG":
        parts = _jpeg_parts(data)
        block = data[slice(*parts.exif)] if parts is not None else b""
    elif file_format == "PNG":
        block = _chunk(data, 8, b"eXIf", ">I4s", trailer=4)
    elif file_format == "WEBP":
        block = _chunk(data, 12, b"EXIF", "<4sI", trailer=0)
        block = block.removeprefix(b"Exif\0\0")
    elif file_format == "TIFF":
        block = data
    elif file_format == "AVIF":
        return _avif_orientation(data)
    else:
        return 1  # a HEIC's decoder turns it
    return _orientation_in(block)


def _avif_orientation(data: bytes) -> int:
    """That of the container, which Pillow gives as if it were in EXIF; that in EXIF has no meaning there."""
    try:
        with _as_bad_picture():
            return int(READERS["AVIF"](io.BytesIO(data)).getexif().get(ORIENTATION_TAG, 1))
    except BadPicture:
        return 1


def _chunk(data: bytes, at: int, wanted: bytes, head: str, trailer: int) -> bytes:
    """The content of the first chunk of that name; empty if there is none, or its checksum is wrong."""
    while at + 8 <= len(data):
        first, second = struct.unpack_from(head, data, at)
        name, size = (first, second) if isinstance(first, bytes) else (second, first)
        body = data[at + 8 : at + 8 + size] if name == wanted else b""
        if name == wanted:
            has_sum = trailer == 0 or data[at + 8 + size : at + 12 + size] == zlib.crc32(name + body).to_bytes(4, "big")
            return body if has_sum else b""
        at += 8 + size + trailer + (size & 1 if trailer == 0 else 0)
    return b""


def _orientation_in(block: bytes) -> int:
    """The orientation in the first directory of a TIFF structure; 1 if there is none."""
    for order, entry, value_at in _orientation_entries(block):
        (kind,) = struct.unpack_from(f"{order}H", block, entry + 2)
        if kind in (1, 3, 4):
            (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], block, value_at)
            return value if 1 <= value <= 8 else 1
    return 1


def _with_orientation_1(block: bytes) -> bytes:
    changed = bytearray(block)
    for order, entry, value_at in _orientation_entries(block):
        struct.pack_into(f"{order}H", changed, entry + 2, 3)
        struct.pack_into(f"{order}Q" if value_at - entry == 12 else f"{order}I", changed, entry + 4, 1)
        struct.pack_into(f"{order}H", changed, value_at, 1)
    return bytes(changed)


def _orientation_entries(block: bytes) -> Iterator[tuple[str, int, int]]:
    """Byte order, offset of the entry, and offset of its value, for each orientation tag in the first directory."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 16:
        return
    (version,) = struct.unpack_from(f"{order}H", block, 2)
    if version not in (42, 43):
        return
    offset_format, count_format, entry_bytes, value_at = ("I", "H", 12, 8) if version == 42 else ("Q", "Q", 20, 12)
    (at,) = struct.unpack_from(order + offset_format, block, 4 if version == 42 else 8)
    start = at + struct.calcsize(order + count_format)
    if start > len(block):
        return
    (count,) = struct.unpack_from(order + count_format, block, at)
    for entry in range(start, min(start + count * entry_bytes, len(block) - entry_bytes + 1), entry_bytes):
        if struct.unpack_from(f"{order}H", block, entry)[0] == ORIENTATION_TAG:
            yield order, entry, entry + value_at


def shrunk_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Width and height as conversion stores them: the longer side reduced to `max_side` px, in proportion."""
    longer = max(size)
    if max_side is None or longer <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longer)) for side in size)
    return width, height


def resampling(interpolation: str) -> Image.Resampling:
    """Pillow's filter for a recipe's `interpolation`: bilinear or bicubic."""
    return {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]


def resized_window(
    picture: Image.Image,
    resized: tuple[int, int],
    window: tuple[int, int, int, int],
    interpolation: str = "bilinear",
) -> Image.Image:
    """`picture.resize(resized, resampling(interpolation)).crop(...)`, bit by bit, in the memory and time of picture and
    window alone: an extreme aspect ratio would make the whole resized picture huge.

    `picture`: mode RGB. `resized`: width, height. `window`: left, top, width, height, in pixels of the resized picture;
    what is outside is black.
    """
    left, top, width, height = window
    if resized[0] * resized[1] <= picture.width * picture.height + 16 * width * height:
        whole = picture.resize(resized, resampling(interpolation))
        return whole.crop((left, top, left + width, top + height))
    shown = np.zeros((height, width, 3), np.uint8)
    columns = range(max(left, 0), min(left + width, resized[0]))
    rows = range(max(top, 0), min(top + height, resized[1]))
    if columns and rows:
        pixels = _resized_part(picture, resized, columns, rows, bicubic=interpolation == "bicubic")
        shown[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = pixels
    return Image.fromarray(shown)


_WEIGHT_BITS = 22
"""Fraction bits of Pillow's fixed-point weights: its PRECISION_BITS."""


def _resized_part(
    picture: Image.Image, resized: tuple[int, int], columns: range, rows: range, *, bicubic: bool
) -> NDArray[np.uint8]:
    """These columns and rows of an enlarged picture, with the arithmetic of Pillow's filters (Resample.c)."""
    across = _weights(picture.width, resized[0], columns, bicubic=bicubic)
    down = _weights(picture.height, resized[1], rows, bicubic=bicubic)
    box = (across[0][0], down[0][0], across[-1][0] + len(across[-1][1]), down[-1][0] + len(down[-1][1]))
    pixels = np.asarray(picture.crop(box))
    passes = [(across, 1, box[0]), (down, 0, box[1])]
    if resized[1] < picture.height:  # Pillow's order: it decides the rounding between the passes
        passes.reverse()
    for weights, axis, start in passes:
        pixels = _filtered(pixels, weights, axis, start)
    return pixels


def _weights(size: int, resized: int, outputs: range, *, bicubic: bool) -> list[tuple[int, NDArray[np.int64]]]:
    """For each output the first input, and the weights from that input on, in fixed point."""
    scale = size / resized
    reach = (2.0 if bicubic else 1.0) * max(scale, 1.0)
    found = []
    for output in outputs:
        center = (output + 0.5) * scale
        first, end = max(0, int(center - reach + 0.5)), min(size, int(center + reach + 0.5))
        x = np.abs((np.arange(first, end) - center + 0.5) * (1.0 / max(scale, 1.0)))
        exact = np.where(x < 1.0, 1.0 - x, 0.0)
        if bicubic:
            far = np.where(x < 2.0, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0)
            exact = np.where(x < 1.0, (1.5 * x - 2.5) * x * x + 1, far)
        total = np.cumsum(exact)[-1]  # one after another, as Pillow does: `sum` adds pairs
        scaled = exact / total * (1 << _WEIGHT_BITS)
        found.append((first, (scaled + np.copysign(0.5, scaled)).astype(np.int64)))
    return found


def _filtered(
    pixels: NDArray[np.uint8], weights: list[tuple[int, NDArray[np.int64]]], axis: int, start: int
) -> NDArray[np.uint8]:
    lines = np.moveaxis(pixels, axis, 0)
    results = np.empty((len(weights), *lines.shape[1:]), np.uint8)
    for result, (first, factors) in zip(results, weights, strict=True):
        sums = np.einsum("k,kij->ij", factors, lines[first - start : first - start + len(factors)], dtype=np.int64)
        result[...] = np.clip((sums + (1 << _WEIGHT_BITS - 1)) >> _WEIGHT_BITS, 0, 255)
    return np.moveaxis(results, 0, axis)


def _is_colour(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)
