"""Samples that are pieces of a few large files: archives read in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.sources.ends import HEAD_BYTES, Ends, empty_ends, ends_bytes
from data_prep.sources.places import MAX_SAMPLE_BYTES, FileStatus, Place, Reader, check_sample_size

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

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        for index in indices:
            size = int(self.sizes[index])
            self._reader(int(self.file_numbers[index])).read_into(int(self.offsets[index]), into[:size])
            into = into[size:]

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        ends = empty_ends(len(indices), max_head_bytes)
        for number, index in enumerate(indices):
            size = int(self.sizes[index])
            if size > MAX_SAMPLE_BYTES:
                continue
            offset = int(self.offsets[index])
            head, tail = ends_bytes(size, max_head_bytes)
            row = ends.rows[number].data
            try:
                reader = self._reader(int(self.file_numbers[index]))
                reader.read_into(offset, row[:head])
                reader.read_into(offset + size - tail, row[head : head + tail])
            except OSError:
                continue
            ends.num_bytes[number] = size
        return ends

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
