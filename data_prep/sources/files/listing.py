"""Long listings: names that pickle fast, byte ranges of large files, and listing or fetching many files at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.sources.files.paths import (
    HEAD_BYTES,
    MAX_SAMPLE_BYTES,
    Ends,
    FileStatus,
    RangeReader,
    StoragePath,
    check_sample_size,
    empty_ends,
    ends_bytes,
)


class PackedStrings(Sequence[str]):
    """An immutable list of file names (any bytes the file system allows) that pickles fast: Ray passes its two arrays
    to workers without a copy."""

    def __init__(self, names: Sequence[str]) -> None:
        packed = os.fsencode("".join(names))
        lengths = list(map(len, names))
        if sum(lengths) != len(packed):  # not only ASCII: a character is not a byte
            lengths = [len(os.fsencode(name)) for name in names]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._bytes = np.frombuffer(packed, dtype=np.uint8)

    @property
    def packed(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The names' bytes, one name after another, and where each ends."""
        return self._bytes, self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])].tobytes())


def locate(ends: NDArray[np.int64], index: int) -> tuple[int, int]:
    """Which of several runs of samples an index is in, and where in it. `ends`: the runs' lengths, summed up."""
    run = int(np.searchsorted(ends, index, side="right"))
    return run, index - (int(ends[run - 1]) if run else 0)


Item = TypeVar("Item")
Listing = TypeVar("Listing", bound=Sized)

NUM_THREADS = 32
FAST_S = 50e-6
"""Per entry. From memory or a local disk an entry takes 3 to 15 us, much of it Python, so threads slow each other down:
with 1.28 million files and without the C, 32 threads took 2.6 times as long as one."""


def list_each(list_one: Callable[[Item], Listing], items: Sequence[Item]) -> Iterator[Listing]:
    """`list_one` of each item, in order: in threads if the first one was slow, so waits for a disk or a network."""
    started_s = time.monotonic()
    first = list_one(items[0])
    # Threads help only where a listing waits; see FAST_S.
    is_fast = time.monotonic() - started_s < FAST_S * (1 + len(first))
    with ThreadPoolExecutor(1 if is_fast else NUM_THREADS) as pool:
        yield from chain([first], pool.map(list_one, items[1:]))


MAX_OPEN = 4


class RecordedFile(NamedTuple):
    path: StoragePath
    status: FileStatus
    """When it was listed; a file that has changed since is not read."""


def record(path: StoragePath) -> RecordedFile:
    return RecordedFile(path, path.status())


class FileRanges:
    """Samples that are byte ranges of a few large files. Pickled as arrays; files are opened when they are read, at
    most MAX_OPEN at a time."""

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
        self._readers: dict[int, RangeReader] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def file_of(self, index: int) -> StoragePath:
        return self.files[int(self.file_numbers[index])].path

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

    def _reader(self, number: int) -> RangeReader:
        reader = self._readers.get(number)
        if reader is None:
            while len(self._readers) >= MAX_OPEN:
                self._readers.pop(next(iter(self._readers))).close()
            path, status = self.files[number]
            reader = self._readers[number] = path.reader(status)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


NUM_AHEAD = 16


class FetchAhead:
    """Small files of a remote store, fetched ahead while they are read in order: each takes a round trip.

    `fetch` must be safe to call from threads. At most NUM_AHEAD files more than asked for are fetched.
    """

    def __init__(self, fetch: Callable[[int], bytes], count: int) -> None:
        self._fetch = fetch
        self._count = count
        self._pool = ThreadPoolExecutor(NUM_AHEAD)
        self._under_way: dict[int, Future[bytes]] = {}
        self._last = -2

    def __getitem__(self, index: int) -> bytes:
        """Raises what `fetch` of this index raised."""
        if index != self._last + 1:  # not in order: what was fetched ahead is useless
            for useless in self._under_way.values():
                useless.cancel()
            self._under_way = {}
        else:
            for number in range(index, min(index + 1 + NUM_AHEAD, self._count)):
                if number not in self._under_way:
                    self._under_way[number] = self._pool.submit(self._fetch, number)
        self._last = index
        future = self._under_way.pop(index, None)
        return self._fetch(index) if future is None else future.result()
