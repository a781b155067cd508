"""Reads a beton without ffcv: memory-mapped, every pointer checked once when it is opened.

Betons of the stock `DatasetWriter` too, whose workers leave images and allocation table in any order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.digest import CHUNK_BYTES
from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.beton.statistics import Stored
from data_prep.errors import UserError


def open_beton(path: str | Path) -> BetonReader:
    """A beton whose size matches its manifest; `verify` also checks the bytes.

    >>> import data_prep, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outcome = data_prep.convert("synthetic", f"{folder}/train.beton", input="n=5,size=32..64,classes=3")
    ...     beton = data_prep.open_beton(outcome.path)
    >>> len(beton), beton.label(4), beton.manifest.class_names[1]
    (5, 1, 'class-1')
    >>> bytes(beton.image_bytes(0)[:3]), beton.height(0) >= 32
    (b'\\xff\\xd8\\xff', True)

    Raises:
        UserError: the file or its manifest is missing, damaged, or not of this format.
    """
    path = Path(path).expanduser()
    return BetonReader(path, load_manifest(path))


class BetonReader:
    """Labels, sizes and stored bytes by sample id, which is the index in the beton.

    Attributes:
        modes: uint8 [num_samples], `layout.MODE_JPEG` or `layout.MODE_RAW`.
        heights, widths: uint16 [num_samples], px.
        labels: int64 [num_samples].
        pointers: int64 [num_samples], offset of the stored bytes in the file.
        sizes: int64 [num_samples], number of stored bytes.

    Raises:
        UserError: the file is missing, is not a beton of version 2 with the fields image and label, or points outside
        itself.
        IndexError: for an id outside 0..len-1.
    """

    modes: NDArray[np.uint8]
    heights: NDArray[np.uint16]
    widths: NDArray[np.uint16]
    labels: NDArray[np.int64]
    pointers: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self._manifest = manifest
        try:
            self._file = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise UserError(f"{path}: does not exist") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise UserError(f"{path}: cannot be read as a beton: {error}") from None
        header = self._array(layout.HEADER, 0, 1, "the header")[0]
        if header["version"] != layout.FORMAT_VERSION or not layout.is_page_size(int(header["page_bytes"])):
            raise UserError(f"{path}: is not a beton of version {layout.FORMAT_VERSION}")
        self.page_bytes = int(header["page_bytes"])
        num_samples = int(header["num_samples"])
        self._check_fields(int(header["num_fields"]))

        metadata = self._array(layout.SAMPLE_METADATA, layout.METADATA_START, num_samples, "the metadata")
        self.modes = metadata["image"]["mode"].copy()
        self.heights = metadata["image"]["height"].copy()
        self.widths = metadata["image"]["width"].copy()
        self.labels = metadata["label"].astype(np.int64)
        self.pointers, self.sizes = self._find_images(metadata, int(header["allocation_table_ptr"]))

    @property
    def manifest(self) -> Manifest:
        """UserError when it is missing, unreadable, or of a beton of another size."""
        self._manifest = self._manifest or load_manifest(self.path)
        return self._manifest

    def __len__(self) -> int:
        return len(self.labels)

    def image_bytes(self, index: int) -> memoryview:
        """The stored bytes: a JPEG file, or `height * width * 3` bytes of RGB pixels. Read-only, not a copy."""
        start = int(self.pointers[self._checked(index)])
        return self._file[start : start + int(self.sizes[index])].data

    def stored(self, index: int) -> Stored:
        """`image_bytes` and what is needed to decode them."""
        return Stored(self.image_bytes(index), self.mode(index), self.height(index), self.width(index))

    def chunk(self, number: int) -> memoryview:
        """One of the pieces of `digest.CHUNK_BYTES` whose digests are in the manifest. Read-only, not a copy."""
        return self._file[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES].data

    def label(self, index: int) -> int:
        return int(self.labels[self._checked(index)])

    def mode(self, index: int) -> int:
        """`layout.MODE_JPEG` or `layout.MODE_RAW`."""
        return int(self.modes[self._checked(index)])

    def height(self, index: int) -> int:
        return int(self.heights[self._checked(index)])

    def width(self, index: int) -> int:
        return int(self.widths[self._checked(index)])

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        return index

    def _array(self, dtype: np.dtype[np.void], offset: int, count: int, what: str) -> NDArray[np.void]:
        end = offset + count * dtype.itemsize
        if end > len(self._file):
            raise UserError(f"{self.path}: ends at byte {len(self._file)}, within {what}: cut short, or not a beton")
        return self._file[offset:end].view(dtype)

    def _check_fields(self, num_fields: int) -> None:
        count = min(num_fields, 16)  # a damaged count must not become a huge read
        rows = self._array(layout.FIELD_DESCRIPTOR, layout.HEADER.itemsize, count, "the field descriptors")
        found = tuple((layout.field_name(row), int(row["type_id"])) for row in rows)
        if num_fields != count or found != layout.FIELDS:
            names = ", ".join(f"{name} ({_kind(type_id)})" for name, type_id in found)
            raise UserError(
                f"{self.path}: expected the fields image (RGB image) and label (whole number), found {names}; other "
                "fields, several labels and regression are not supported"
            )

    def _find_images(self, metadata: NDArray[np.void], table_ptr: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pointers and sizes of the images by sample; the sizes are only in the allocation table."""
        file_bytes = len(self._file)
        table_bytes = file_bytes - table_ptr
        if table_bytes < 0 or table_bytes % layout.ALLOCATION.itemsize:
            raise UserError(f"{self.path}: the allocation table is not where the header says: cut short or damaged")
        table = self._array(layout.ALLOCATION, table_ptr, table_bytes // layout.ALLOCATION.itemsize, "the table")
        pointers = metadata["image"]["data_ptr"].astype(np.uint64)
        order = np.argsort(table["ptr"], kind="stable")
        known, known_sizes = table["ptr"][order], table["size"][order]
        if len(known) == 0 and len(pointers):
            raise UserError(f"{self.path}: the allocation table is empty: the writer was stopped")
        places = np.minimum(np.searchsorted(known, pointers), max(len(known) - 1, 0))
        self._require(known[places] == pointers, "its pointer is not in the allocation table")
        sizes = known_sizes[places]
        self._require((sizes >= 1) & (sizes <= self.page_bytes), "its size is not within a page")
        first_page = layout.pages_start(len(metadata), self.page_bytes)
        inside = (pointers >= first_page) & (pointers < table_ptr) & (pointers + sizes <= table_ptr)
        self._require(inside, "it is outside the pages")
        self._require(self.modes < len(layout.MODE_NAMES), "its mode is unknown")
        raw_bytes = self.heights.astype(np.uint64) * self.widths * np.uint64(3)
        self._require((self.modes != layout.MODE_RAW) | (sizes == raw_bytes), "its size is not height * width * 3")
        return pointers.astype(np.int64), sizes.astype(np.int64)

    def _require(self, holds: NDArray[np.bool_], otherwise: str) -> None:
        if not holds.all():
            raise UserError(f"{self.path}: sample {int(np.argmin(holds))} is damaged: {otherwise}")


def _kind(type_id: int) -> str:
    """What a field holds, by ffcv's numbers of types."""
    kinds = ("fraction", "whole number", "RGB image", "bytes", "array", "JSON", "tensor")
    return kinds[type_id] if type_id < len(kinds) else f"type {type_id}"
