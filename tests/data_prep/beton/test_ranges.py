"""Pages are filled in order; ranges written in any order and any number of times make the same file."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.beton import ranges
from data_prep.beton.digest import combine, digest_file
from data_prep.beton.files import write_at
from data_prep.beton.layout import MODE_RAW, STORED_ROW, BetonLayout, lay_out, pack
from data_prep.beton.ranges import create_sized, cut, num_ranges, payload_of, read_digests, write_beton, write_range
from data_prep.beton.reader import BetonReader
from data_prep.errors import Fault

MIB = 1 << 20
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


def images(num: int, max_bytes: int) -> list[bytes]:
    rng = np.random.default_rng(num)
    return [rng.bytes(3 * int(rng.integers(1, max_bytes // 3))) for _ in range(num)]


def layout_of(stored: list[bytes], page_bytes: int) -> BetonLayout:
    rows = np.zeros(len(stored), dtype=STORED_ROW)
    rows["mode"], rows["height"], rows["width"] = MODE_RAW, 1, [len(data) // 3 for data in stored]
    rows["label"] = np.arange(len(stored))
    rows["size"] = [len(data) for data in stored]
    return lay_out(rows, page_bytes)


def expected_bytes(beton: BetonLayout, stored: list[bytes]) -> bytes:
    """Built the plain way."""
    whole = bytearray(beton.total_bytes)
    whole[: len(beton.front_matter)] = beton.front_matter
    for data, pointer in zip(stored, beton.allocations["ptr"].tolist(), strict=True):
        whole[pointer : pointer + len(data)] = data
    whole[beton.allocation_table_ptr :] = beton.table
    return bytes(whole)


@pytest.mark.parametrize(("page_mib", "num", "max_kib"), [(2, 300, 190), (8, 300, 190), (32, 300, 190), (2, 1, 3)])
def test_ranges_in_any_order_make_the_file(
    page_mib: int, num: int, max_kib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where pages are larger than chunks, so that images cross from chunk to chunk and from range to range."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 8 * MIB)
    stored = images(num, max_kib << 10)
    beton = layout_of(stored, page_mib * MIB)
    path = tmp_path / "a.beton"
    create_sized(path, beton.total_bytes)
    descriptor = os.open(path, os.O_RDWR)
    order = [*reversed(range(num_ranges(beton))), 0]
    chunks = {}
    for number in order:
        part = cut(beton, number)
        chunks[number] = write_range(partial(write_at, descriptor), part, payload_of(lambda i: stored[i]))
        assert chunks[number] == read_digests(descriptor, part)
    os.close(descriptor)
    assert path.read_bytes() == expected_bytes(beton, stored)
    digest = combine([chunk for number in sorted(chunks) for chunk in chunks[number]])
    assert digest == digest_file(path)

    again = write_beton(tmp_path / "b.beton", beton, payload_of(lambda i: stored[i]), temporary=tmp_path / "b.tmp")
    assert again == digest
    assert (tmp_path / "b.beton").read_bytes() == path.read_bytes()
    if all(len(data) // 3 < 65_536 for data in stored):
        reader = BetonReader(path)
        assert [bytes(reader.image_bytes(i)) for i in range(num)] == stored


def test_bytes_that_do_not_fit_the_layout_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    stored = [b"abc" * 10, b"def" * 20]
    with pytest.raises(ValueError, match="sample 1 has 3 bytes, the layout says 60"):
        write_beton(
            tmp_path / "a.beton",
            layout_of(stored, 2 * MIB),
            payload_of(lambda i: [stored[0], b"def"][i]),
            temporary=tmp_path / "a.tmp",
        )
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    from data_prep.beton.files import require_space

    require_space(tmp_path / "a", 1000)
    with pytest.raises(Fault, match=r"GB free, 1,000,000,000\.00 GB are needed; make room there"):
        require_space(tmp_path / "a", 10**18)
