"""The `.beton` format, version 2, as numpy dtypes, and where each byte goes: what the stock ffcv 1.0.2 reader expects.

A file is: header | two field descriptors | one metadata row per sample | zeros up to the next page | pages | allocation
table. Everything is little-endian. The allocation table runs to the end of the file: nothing may follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 2

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_bytes", "<u4"),
        ("num_samples", "<u8"),
        ("allocation_table_ptr", "<u8"),
    ],
    align=True,
)
"""24 bytes."""

FIELD_DESCRIPTOR = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
"""1041 bytes. ffcv stores no arguments for our two fields: how the images were encoded is in the manifest only."""

IMAGE_METADATA = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
"""13 bytes, packed. Sides in px; `data_ptr` counts from the start of the file."""

SAMPLE_METADATA = np.dtype([("image", IMAGE_METADATA), ("label", "<i8")], align=True)
"""24 bytes: 13, three of padding, 8."""

ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
"""24 bytes, one per stored image. The size of an image is recorded nowhere else."""

INT_FIELD_TYPE_ID = 1
RGB_IMAGE_FIELD_TYPE_ID = 2
FIELDS = (("image", RGB_IMAGE_FIELD_TYPE_ID), ("label", INT_FIELD_TYPE_ID))
"""Names and types of the fields of every beton of this project, in this order."""

MODE_JPEG = 0
MODE_RAW = 1
MODE_NAMES = ("jpeg", "raw")
"""Indexed by mode."""

MAX_SIDE_PX = 65_535
MIN_PAGE_BYTES = 1 << 21
MAX_PAGE_BYTES = 1 << 31
DEFAULT_PAGE_BYTES = 1 << 23
"""ffcv's own default, 8 MiB. A page holds whole images only, so the largest image must fit in one."""

METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD_DESCRIPTOR.itemsize


def is_page_size(page_bytes: int) -> bool:
    """Whether ffcv can use pages of that size: it finds an image's page by shifting its address."""
    return MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES and page_bytes & (page_bytes - 1) == 0


def pages_start(num_samples: int, page_bytes: int) -> int:
    """Offset of the first page: the end of the metadata, rounded up to a whole page."""
    metadata_end = METADATA_START + num_samples * SAMPLE_METADATA.itemsize
    return -(-metadata_end // page_bytes) * page_bytes


def header(num_samples: int, page_bytes: int, allocation_table_ptr: int) -> bytes:
    row = np.zeros(1, dtype=HEADER)
    row["version"] = FORMAT_VERSION
    row["num_fields"] = len(FIELDS)
    row["page_bytes"] = page_bytes
    row["num_samples"] = num_samples
    row["allocation_table_ptr"] = allocation_table_ptr
    return row.tobytes()


def field_descriptors() -> bytes:
    rows = np.zeros(len(FIELDS), dtype=FIELD_DESCRIPTOR)
    for row, (name, type_id) in zip(rows, FIELDS, strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype="<u1")
    return rows.tobytes()


def field_name(descriptor: NDArray[np.void]) -> str:
    """The zero-terminated name in a field descriptor."""
    return bytes(descriptor["name"]).split(b"\0", 1)[0].decode("ascii", errors="replace")


# --- where each sample's bytes go: a pure function of the sizes, in sample order --------------------------------------


STORED_ROW = np.dtype(
    [("mode", "<u1"), ("untouched", "<u1"), ("width", "<u2"), ("height", "<u2"), ("label", "<i8"), ("size", "<u8")]
)
"""The result of encoding one sample: its metadata and the number of bytes to store.

`untouched` is 1 where those bytes are the source's own.
"""


@dataclass(frozen=True)
class BetonLayout:
    """Every byte of a beton except the images, and where the images go."""

    page_bytes: int
    metadata: NDArray[np.void]
    """`SAMPLE_METADATA`, one row per sample."""
    allocations: NDArray[np.void]
    """`ALLOCATION`, one row per sample, ascending in `ptr`."""
    page_starts: NDArray[np.int64]
    """Index of the first sample of each page, and one past the last sample at the end: `num_pages + 1` values."""

    @property
    def num_samples(self) -> int:
        return len(self.metadata)

    @property
    def num_pages(self) -> int:
        return len(self.page_starts) - 1

    @property
    def pages_start(self) -> int:
        return pages_start(self.num_samples, self.page_bytes)

    @property
    def allocation_table_ptr(self) -> int:
        return self.pages_start + self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.allocation_table_ptr + self.allocations.nbytes

    @cached_property
    def front_matter(self) -> bytes:
        """Header, field descriptors, metadata. Zeros follow up to the first page."""
        head = header(self.num_samples, self.page_bytes, self.allocation_table_ptr)
        return head + field_descriptors() + self.metadata.tobytes()

    @cached_property
    def table(self) -> bytes:
        """The allocation table: the end of the file."""
        return self.allocations.tobytes()


def pack(
    sizes: NDArray[np.integer[Any]], page_bytes: int, used_bytes: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fills pages greedily in order; a sample never crosses into the next page.

    `sizes`: bytes per sample, each in 1..page_bytes. `used_bytes`: of the pages, by samples before these. Returns the
    offset of each sample from the first page, and the index of the first sample of each page, from the one that is in
    use, with `len(sizes)` at the end. ValueError when a size does not fit.
    """
    if len(sizes) and (int(sizes.min()) < 1 or int(sizes.max()) > page_bytes):
        raise ValueError(f"every sample must have 1..{page_bytes} bytes")
    ends = np.cumsum(sizes.astype(np.int64))
    begins = ends - sizes.astype(np.int64)
    offsets = np.empty(len(sizes), dtype=np.int64)
    starts = [0]
    page_start, used_bytes = used_bytes - used_bytes % page_bytes, used_bytes % page_bytes
    while starts[-1] < len(sizes):
        first = starts[-1]
        end = int(np.searchsorted(ends, begins[first] + page_bytes - used_bytes, side="right"))
        offsets[first:end] = begins[first:end] - begins[first] + page_start + used_bytes
        starts.append(end)
        page_start, used_bytes = page_start + page_bytes, 0
    return offsets, np.array(starts, dtype=np.int64)


def lay_out(rows: NDArray[np.void], page_bytes: int) -> BetonLayout:
    """The layout of a beton from its `STORED_ROW`s, in sample order. ValueError when a sample does not fit a page."""
    offsets, page_starts = pack(rows["size"], page_bytes)
    pointers = offsets + pages_start(len(rows), page_bytes)

    metadata = np.zeros(len(rows), dtype=SAMPLE_METADATA)
    for name in ("mode", "width", "height"):
        metadata["image"][name] = rows[name]
    metadata["image"]["data_ptr"] = pointers
    metadata["label"] = rows["label"]

    allocations = np.zeros(len(rows), dtype=ALLOCATION)
    allocations["sample_id"] = np.arange(len(rows))
    allocations["ptr"] = pointers
    allocations["size"] = rows["size"]
    return BetonLayout(page_bytes, metadata, allocations, page_starts)
