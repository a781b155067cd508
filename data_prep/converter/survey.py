"""What `data-prep inspect` shows: counts over an entire source, and statistics of some images' headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.converter.verify import spread
from data_prep.errors import UserError
from data_prep.jpeg.header import is_jpeg, is_read_by_ffcv, read_jpeg_header
from data_prep.pixels import BadPicture
from data_prep.pixels import read_header as picture_header
from data_prep.shown import few, shown
from data_prep.sources.base import Source, UnreadableSample, read_sample
from data_prep.sources.files.paths import MAX_SAMPLE_BYTES
from data_prep.sources.labels import are_numbered

NUM_FIRST = 5
MANY_CLASSES = 10
SUFFIXES = {
    "JPEG": ("jpg", "jpeg", "mpo"),
    "PNG": ("png",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "WEBP": ("webp",),
}
"""Pillow's format -> the endings it should have."""


@dataclass(frozen=True)
class Spread:
    min: int
    median: float
    max: int
    mean: float


@dataclass(frozen=True)
class Header:
    """The header of one image file; for a file that is not an image only the number of bytes, and the reason."""

    key: str
    label: int
    num_bytes: int
    file_format: str = ""
    mode: str = ""
    """Pillow's: RGB, L (gray), P (palette), CMYK, ..."""
    height: int = 0
    width: int = 0
    is_passed_through: bool = False
    """A JPEG that `--encode original` stores as it is, if `--max-side` allows."""
    is_rotated: bool = False
    """It has an EXIF orientation, which is ignored by default."""
    problem: str = ""


@dataclass(frozen=True)
class Survey:
    source: Mapping[str, Any]
    """The source's `SourceDescription`."""
    num_samples: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_headers: int
    """Images whose headers were read. The statistics below are of these, unless stated otherwise."""
    file_bytes: Spread | None
    file_bytes_of_all: bool
    """`file_bytes` is of all samples, not only of those whose headers were read."""
    heights: Spread | None
    widths: Spread | None
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    num_passed_through: int
    num_rotated: int
    first: tuple[Header, ...]
    findings: tuple[str, ...]
    """Oddities, one line each."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def survey(source: Source, num_headers: int, on_header: Callable[[int, int], None]) -> Survey:
    """Reads `num_headers` headers, spread evenly, and calls `on_header(done, total)` after each. UserError if the
    source is empty."""
    if len(source) == 0:
        raise UserError(f"{source.description.location}: holds no samples")
    indices = spread(len(source), num_headers).tolist()
    headers: list[Header] = []
    for index in indices:
        headers.append(read_header(source, index))
        on_header(len(headers), len(indices))
    images = [header for header in headers if not header.problem]
    sizes = source.sizes
    all_known = sizes is not None and bool((sizes >= 0).all())
    of_headers = np.array([h.num_bytes for h in headers if h.num_bytes >= 0], dtype=np.int64)
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    return Survey(
        source=asdict(source.description),
        num_samples=len(source),
        class_names=source.class_names,
        class_counts=tuple(counts.tolist()),
        num_headers=len(headers),
        file_bytes=_spread(sizes if sizes is not None and all_known else of_headers),
        file_bytes_of_all=all_known,
        heights=_spread(np.array([h.height for h in images], dtype=np.int64)),
        widths=_spread(np.array([h.width for h in images], dtype=np.int64)),
        formats=_count(h.file_format for h in images),
        modes=_count(h.mode for h in images),
        num_passed_through=sum(h.is_passed_through for h in images),
        num_rotated=sum(h.is_rotated for h in images),
        first=tuple(read_header(source, index) for index in range(min(NUM_FIRST, len(source)))),
        findings=tuple(find_oddities(source, headers)),
    )


def read_header(source: Source, index: int) -> Header:
    """Reads one file; only its header is decoded."""
    try:
        sample = read_sample(source, index)
    except UnreadableSample as error:
        return Header(source.key(index), int(source.labels[index]), -1, problem=str(error))
    return _parse(sample.data, sample.label, sample.key)


def _parse(data: bytes, label: int, key: str) -> Header:
    try:
        picture = picture_header(data, "convert it with --max-side" if is_jpeg(data) else "make it smaller first")
    except BadPicture as error:
        return Header(key, label, len(data), problem=str(error))
    jpeg = read_jpeg_header(data)
    passed = jpeg is not None and is_read_by_ffcv(jpeg)
    found = (picture.format, picture.mode, picture.height, picture.width)
    return Header(key, label, len(data), *found, is_passed_through=passed, is_rotated=picture.orientation != 1)


def find_oddities(source: Source, headers: list[Header]) -> list[str]:
    """Oddities that the user should look at before converting, most important first."""
    found: list[str] = []
    bad = [header for header in headers if header.problem]
    if bad:
        found.append(
            f"{len(bad):,} of {len(headers):,} files read are no good: "
            + few((f"{h.key} {h.problem}" for h in bad), "; ")
        )
    sizes = source.sizes
    if sizes is not None:
        for what, odd in (("empty", sizes == 0), (f"larger than {MAX_SAMPLE_BYTES:,} bytes", sizes > MAX_SAMPLE_BYTES)):
            (indices,) = np.nonzero(odd)
            if len(indices):
                found.append(f"{len(indices):,} files are {what}: " + few((source.key(int(i)) for i in indices), "; "))
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    (empty,) = np.nonzero(counts == 0)
    if len(empty):
        found.append(
            f"{len(empty):,} classes have no samples: " + few((source.class_names[int(i)] for i in empty), "; ")
        )
    misnamed = [h for h in headers if not h.problem and _is_misnamed(h)]
    if misnamed:
        found.append(
            f"{len(misnamed):,} files are not of the kind they are named: "
            + few((f"{h.key} is {h.file_format}" for h in misnamed), "; ")
        )
    (single,) = np.nonzero(counts == 1)
    if len(single) >= MANY_CLASSES and 2 * len(single) >= len(counts):
        found.append(
            f"{len(single):,} of {len(counts):,} classes have one sample only: "
            + few((source.class_names[int(i)] for i in single), "; ")
        )
    if are_numbered(source.class_names) and not source.description.label_map:
        found.append(
            "classes are named by numbers, so their order cannot be verified: compare some images with their labels"
        )
    found += source.notes
    return [shown(finding, None) for finding in found]


def _is_misnamed(header: Header) -> bool:
    ending = header.key.rpartition(".")[2].lower()
    known = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}
    return ending in known and ending not in SUFFIXES.get(header.file_format, (ending,))


def _spread(values: NDArray[np.int64]) -> Spread | None:
    if not len(values):
        return None
    return Spread(int(values.min()), float(np.median(values)), int(values.max()), round(float(values.mean()), 1))


def _count(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())
