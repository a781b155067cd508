"""The reader gives back what was stored, and refuses files that would make it read rubbish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.beton import layout
from data_prep.beton.reader import BetonReader
from data_prep.errors import UserError
from data_prep.sources.datasets.builtin import Synthetic

SOURCE = Synthetic(num_samples=7, min_side=20, max_side=40, num_classes=3)


@pytest.fixture
def beton(tmp_path: Path, convert_here) -> Path:
    convert_here(SOURCE, None, tmp_path / "a.beton")
    return tmp_path / "a.beton"


def test_stored_bytes_and_labels_come_back(beton: Path) -> None:
    reader = BetonReader(beton)
    assert len(reader) == 7
    for i in range(7):
        height, width, _ = SOURCE.pixels(i).shape
        assert bytes(reader.image_bytes(i)) == SOURCE[i].data
        assert (reader.label(i), reader.height(i), reader.width(i)) == (i % 3, height, width)
        assert reader.mode(i) == layout.MODE_JPEG
    assert reader.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert reader.sizes.tolist() == [len(SOURCE[i].data) for i in range(7)]


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_is_refused(beton: Path, index: int) -> None:
    reader = BetonReader(beton)
    for read in (reader.image_bytes, reader.label, reader.mode, reader.height, reader.width):
        with pytest.raises(IndexError, match=f"sample {index} of 7"):
            read(index)


def damage(beton: Path, change: Callable[[np.ndarray], None]) -> None:
    data = np.fromfile(beton, dtype=np.uint8)
    change(data)
    data.tofile(beton)


def set_header(name: str, value: int) -> Callable[[np.ndarray], None]:
    def change(data: np.ndarray) -> None:
        data[: layout.HEADER.itemsize].view(layout.HEADER)[name] = value

    return change


def set_image(name: str, value: int) -> Callable[[np.ndarray], None]:
    def change(data: np.ndarray) -> None:
        start = layout.METADATA_START
        rows = data[start : start + 7 * layout.SAMPLE_METADATA.itemsize].view(layout.SAMPLE_METADATA)
        rows["image"][name][2] = value

    return change


def set_allocation(name: str, value: int) -> Callable[[np.ndarray], None]:
    def change(data: np.ndarray) -> None:
        data[-7 * layout.ALLOCATION.itemsize :].view(layout.ALLOCATION)[name][2] = value

    return change


def rename_field(data: np.ndarray) -> None:
    data[layout.HEADER.itemsize + 1] = ord("j")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_header("version", 3), "is not a beton of version 2"),
        (set_header("page_bytes", 3 << 20), "is not a beton of version 2"),
        (set_header("num_fields", 3), "expected the fields image"),
        (set_header("num_samples", 2**60), "within the metadata"),
        (set_header("allocation_table_ptr", 2**60), "the allocation table is not where the header says"),
        (set_header("allocation_table_ptr", 24), "the allocation table is not where the header says"),
        (rename_field, r"found jmage \(RGB image\), label \(whole number\); other"),
        (set_image("data_ptr", 12345), "sample 2 is damaged: its pointer is not in the allocation table"),
        (set_image("mode", 2), "sample 2 is damaged: its mode is unknown"),
        (set_image("mode", 1), r"sample 2 is damaged: its size is not height \* width \* 3"),
        (set_allocation("size", 0), "sample 2 is damaged: its size is not within a page"),
        (set_allocation("size", 2**63), "sample 2 is damaged: its size is not within a page"),
        (set_allocation("size", 8 << 20), "sample 2 is damaged: it is outside the pages"),
    ],
)
def test_damage_is_found_on_opening(beton: Path, change: Callable[[np.ndarray], None], message: str) -> None:
    damage(beton, change)
    with pytest.raises(UserError, match=message) as error:
        BetonReader(beton)
    assert str(beton) in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 24, 1000, 2106, 2200, 9 << 20, -1])
def test_a_file_cut_short_is_refused(beton: Path, keep: int) -> None:
    beton.write_bytes(beton.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.beton"):
        BetonReader(beton)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.beton: does not exist"):
        BetonReader(tmp_path / "no.beton")
    with pytest.raises(UserError, match="cannot be read as a beton"):
        BetonReader(tmp_path)
