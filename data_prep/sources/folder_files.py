"""Samples that are files below one folder, each recorded with its size and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.sources.ahead import FetchAhead
from data_prep.sources.base import Sample, SourceDescription, digest_of, listing_identity
from data_prep.sources.ends import HEAD_BYTES, Ends, empty_ends
from data_prep.sources.imagenet import are_wnids, check_labels, label_map
from data_prep.sources.listing import PackedStrings
from data_prep.sources.local_listing import LocalListing
from data_prep.sources.local_place import LocalPlace
from data_prep.sources.places import FileStatus, ListedFile, Place

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class FolderFiles:
    root: Place
    class_names: tuple[str, ...]
    names: PackedStrings
    """Of the files, under the root."""
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    description: SourceDescription
    notes: tuple[str, ...] = ()
    """What a person should know of how the folder was understood, one line each."""

    def describe(self) -> SourceDescription:
        return self.description

    def noting(self, notes: list[str]) -> Self:
        """The same, with notes on its labels."""
        checks = [*self.description.label_checks, *notes]
        return replace(self, description=replace(self.description, label_checks=checks))

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        data = self._read(index, name) if isinstance(self.root, LocalPlace) else self._ahead[index]
        return Sample(data, int(self.labels[index]), name)

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        if self._local is None:
            return empty_ends(len(indices), max_head_bytes)
        return self._local.ends(indices, max_head_bytes)

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        if self._local is None or not self._local.read_into(indices, into):
            into[:] = b"".join(self[index].data for index in indices)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_ahead", "_local")}

    @cached_property
    def _local(self) -> LocalListing | None:
        if not isinstance(self.root, LocalPlace):
            return None
        return LocalListing(self.root.path, self.names, self.sizes, self.stamps)

    @cached_property
    def _ahead(self) -> FetchAhead:
        return FetchAhead(lambda index: self._read(index, self.names[index]), len(self))

    def _read(self, index: int, name: str) -> bytes:
        return self.root.child(name).read(self._recorded(index))

    def _recorded(self, index: int) -> FileStatus:
        return FileStatus(int(self.sizes[index]), int(self.stamps[index]))


def describe_files(
    name: str,
    root: Place,
    split: str,
    class_names: tuple[str, ...],
    files: Sequence[ListedFile],
    labels: NDArray[np.int64],
    num_left_out: int,
) -> tuple[PackedStrings, NDArray[np.int64], NDArray[np.int64], SourceDescription]:
    """The files' names, sizes and stamps as arrays, and what the manifest says of them."""
    names = [file.name for file in files]
    sizes = np.array([file.num_bytes for file in files], dtype=np.int64)
    stamps = np.array([file.stamp for file in files], dtype=np.int64)
    identity = listing_identity(class_names, names, sizes, labels)
    wnids = label_map(class_names) if are_wnids(class_names) else {}
    description = SourceDescription(
        name,
        root.shown,
        split,
        identity,
        digest_of([identity, stamps.tobytes()]),
        num_left_out,
        label_map=wnids,
        label_checks=check_labels(wnids, labels, names, root.shown),
    )
    return PackedStrings(names), sizes, stamps, description
