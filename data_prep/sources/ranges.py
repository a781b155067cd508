"""Samples that are pieces of a few large files: archives read in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.sources.base import Ends, read_ends
from data_prep.sources.places import FileStatus, Place, Reader, check_sample_size

MAX_OPEN = 4


class RecordedFile(NamedTuple):
    place: Place
    status: FileStatus
    """When it was listed: a file that is not like this any more is not read."""


def record(place: Place) -> RecordedFile:
    return RecordedFile(place, place.status())


class FileRanges:
    """Recorded once, pickled as arrays; files are opened where they are read, at most MAX_OPEN at a time."""

    def __init__(
        self,
        files: Sequence[RecordedFile],
        file_numbers: NDArray[np.int32],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None:
        self.files = tuple(files)
        self.file_numbers = file_numbers
        self.offsets = offsets
        self.sizes = sizes
        self._readers: dict[int, Reader] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def file_of(self, index: int) -> Place:
        return self.files[int(self.file_numbers[index])].place

    def read(self, index: int) -> bytes:
        size = int(self.sizes[index])
        check_sample_size(size)
        return self._reader(int(self.file_numbers[index])).read_at(int(self.offsets[index]), size)

    def ends(self, index: int) -> Ends:
        size, offset = int(self.sizes[index]), int(self.offsets[index])
        check_sample_size(size)
        reader = self._reader(int(self.file_numbers[index]))
        return read_ends(lambda start, length: reader.read_at(offset + start, length), size)

    def _reader(self, number: int) -> Reader:
        reader = self._readers.get(number)
        if reader is None:
            while len(self._readers) >= MAX_OPEN:
                self._readers.pop(next(iter(self._readers))).close()
            place, status = self.files[number]
            reader = self._readers[number] = place.reader(status)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}
