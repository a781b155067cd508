"""Where every sample's bytes go: packing into pages as a pure function of the sizes, in sample order.

The layout depends on nothing but the rows, so it is the same whatever number of workers encoded them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.layout import ALLOCATION, SAMPLE_METADATA, field_descriptors, header, pages_start

STORED_ROW = np.dtype(
    [("mode", "<u1"), ("untouched", "<u1"), ("width", "<u2"), ("height", "<u2"), ("label", "<i8"), ("size", "<u8")]
)
"""What encoding says of one sample: its metadata and the number of bytes to store.

`untouched` is 1 where those bytes are the source's own.
"""


@dataclass(frozen=True)
class BetonLayout:
    """Every byte of a beton but the images themselves, and where those go."""

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
