"""Packing: in order, never across a page boundary, no page overfull and none emptier than necessary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.beton import layout
from data_prep.beton.layout import STORED_ROW, lay_out, pack

PAGE = 100


@given(st.lists(st.integers(1, PAGE), max_size=300))
def test_pack_fills_pages_greedily_in_order(sizes: list[int]) -> None:
    offsets, page_starts = pack(np.array(sizes, dtype=np.uint64), PAGE)

    expected = []
    page, used = -1, PAGE
    for size in sizes:
        if used + size > PAGE:
            page, used = page + 1, 0
        expected.append((page * PAGE + used, page))
        used += size
    assert offsets.tolist() == [offset for offset, _ in expected]
    pages = [p for _, p in expected]
    assert page_starts.tolist() == [pages.index(p) for p in range(page + 1)] + [len(sizes)]


@pytest.mark.parametrize("size", [0, PAGE + 1])
def test_pack_refuses_a_size_that_fits_no_page(size: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.100 bytes"):
        pack(np.array([5, size], dtype=np.uint64), PAGE)


def test_layout_puts_every_part_where_the_format_says() -> None:
    page_bytes = layout.MIN_PAGE_BYTES
    rows = np.zeros(3, dtype=STORED_ROW)
    rows["size"] = [page_bytes - 10, 11, 5]
    rows["mode"], rows["width"], rows["height"], rows["label"] = [0, 1, 0], 7, 9, [2, 1, 0]

    beton = lay_out(rows, page_bytes)

    assert (layout.METADATA_START, layout.SAMPLE_METADATA.itemsize) == (24 + 2 * 1041, 24)
    assert beton.pages_start == page_bytes
    assert beton.allocations["ptr"].tolist() == [page_bytes, 2 * page_bytes, 2 * page_bytes + 11]
    assert beton.metadata["image"]["data_ptr"].tolist() == beton.allocations["ptr"].tolist()
    assert beton.metadata["image"]["mode"].tolist() == [0, 1, 0]
    assert beton.metadata["label"].tolist() == [2, 1, 0]
    assert beton.num_pages == 2
    assert beton.page_starts.tolist() == [0, 1, 3]
    assert beton.allocation_table_ptr == 3 * page_bytes
    assert beton.total_bytes == 3 * page_bytes + 3 * 24
    assert len(beton.front_matter) == layout.METADATA_START + 3 * 24


@given(st.integers(0, 2**22), st.integers(21, 31))
def test_pages_start_on_the_first_page_after_the_metadata(num_samples: int, page_bits: int) -> None:
    start = layout.pages_start(num_samples, 1 << page_bits)
    metadata_end = layout.METADATA_START + num_samples * layout.SAMPLE_METADATA.itemsize
    assert start % (1 << page_bits) == 0
    assert 0 <= start - metadata_end < 1 << page_bits
