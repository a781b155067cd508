"""The `.beton` format, version 2, as numpy dtypes: what the stock ffcv 1.0.2 `Reader` expects, byte for byte.

A file is: header | two field descriptors | one metadata row per sample | zeros up to the next page | pages | allocation
table. Everything is little-endian. The allocation table runs to the end of the file: nothing may follow it.
"""

from __future__ import annotations

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
"""1041 bytes. ffcv stores no arguments for our two fields: how the images were encoded stands in the manifest only."""

IMAGE_METADATA = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
"""13 bytes, packed. Sides in px; `data_ptr` counts from the start of the file."""

SAMPLE_METADATA = np.dtype([("image", IMAGE_METADATA), ("label", "<i8")], align=True)
"""24 bytes: 13, three of padding, 8."""

ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
"""24 bytes, one per stored image. The size of an image stands nowhere else."""

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
    """ffcv finds an image's page by shifting its address, so a page is a power of two."""
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
