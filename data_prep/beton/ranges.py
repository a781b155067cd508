"""A beton cut into ranges of 64 MiB, which workers may write in any order and any number of times, with one result.

The offset and the bytes of a range follow from the layout alone. Ranges consist of whole chunks, so the chunks' digests
are computed while they are written and combined at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.digest import CHUNK_BYTES, FileDigest, RunningDigests, chunk_digest, combine
from data_prep.beton.files import open_regular, rename_durably, write_at
from data_prep.beton.layout import BetonLayout

RANGE_BYTES = 8 * CHUNK_BYTES
"""About 600 of ImageNet's files. A Ray task costs some ms: with 32 MiB, and units half as large, a conversion without
decoding took a seventh more CPU."""

BLOCK_BYTES = 1 << 20
"""Bytes written at a time, and at most one image more; as many are read in one call. 256 KiB take a thirtieth more CPU;
8 MiB a tenth more, for the page faults of a fresh buffer for every range."""

ALIGNMENT_BYTES = 4096
"""Blocks start and end at multiples of this, so that each page of the page cache is written once."""

ZEROS = memoryview(bytes(BLOCK_BYTES))

Payload = Callable[[int, Sequence[int], memoryview], None]
"""`payload(sample, sizes, into)` copies the stored bytes of the samples `sample`, `sample + 1`, ... into `into`, one
after another. `sizes`: the bytes of each, as in the layout. The memory is reused."""

_Piece = tuple[int, Callable[[memoryview], None]]
"""Some bytes of a range: how many, and a function that writes them into memory."""


def payload_of(stored: Callable[[int], bytes | memoryview]) -> Payload:
    """A payload from a function that returns a sample's bytes. ValueError if their number is not the layout's."""

    def payload(sample: int, sizes: Sequence[int], into: memoryview) -> None:
        at = 0
        for number, size in enumerate(sizes, sample):
            data = stored(number)
            if len(data) != size:
                raise ValueError(f"sample {number} has {len(data)} bytes, the layout says {size}")
            into[at : at + size] = data
            at += size

    return payload


@dataclass(frozen=True)
class Written:
    """A range that is in the unfinished beton."""

    chunks: tuple[str, ...]
    """Digests of its chunks."""
    receipt: str = ""
    """The store's ETag, if it gives one."""
    contents: bytes = b""
    """`beton.contents.CONTENT` of each sample whose file was first read with this range; empty if there is none."""


@dataclass(frozen=True)
class FileRange:
    """Everything needed to write the bytes start..stop-1, except the images."""

    number: int
    start: int
    stop: int
    literal: tuple[tuple[int, bytes], ...]
    """Pieces of the tables in this range: offset in the file, and bytes."""
    first_sample: int
    """Id of the first sample with bytes here."""
    pointers: NDArray[np.int64]
    """Offset in the file of each sample with bytes here; the first and the last may reach beyond the range."""
    sizes: NDArray[np.int64]

    def __str__(self) -> str:
        return f"bytes {self.start:,}..{self.stop - 1:,}"

    @property
    def samples(self) -> slice:
        return slice(self.first_sample, self.first_sample + len(self.pointers))


def num_ranges(beton: BetonLayout, range_bytes: int | None = None) -> int:
    """`range_bytes`, here and in `cut`: a multiple of `RANGE_BYTES`, which is the default."""
    return -(-beton.total_bytes // (range_bytes or RANGE_BYTES))


def cut(beton: BetonLayout, number: int, range_bytes: int | None = None) -> FileRange:
    range_bytes = range_bytes or RANGE_BYTES
    start, stop = number * range_bytes, min((number + 1) * range_bytes, beton.total_bytes)
    literal = []
    for offset, data in ((0, beton.front_matter), (beton.allocation_table_ptr, beton.table)):
        begin, finish = max(start, offset), min(stop, offset + len(data))
        if begin < finish:
            literal.append((begin, data[begin - offset : finish - offset]))
    pointers, sizes = (beton.allocations[name].view(np.int64) for name in ("ptr", "size"))
    return replace(cut_images(number, start, stop, pointers, sizes), literal=tuple(literal))


def cut_images(
    number: int,
    start: int,
    stop: int,
    pointers: NDArray[np.int64],
    sizes: NDArray[np.int64],
    first_sample: int = 0,
) -> FileRange:
    """The range start..stop-1 without the tables. `first_sample`: id of the first image."""
    end = int(np.searchsorted(pointers, stop, side="left"))
    first = max(0, int(np.searchsorted(pointers, start, side="right")) - 1)
    while first < end and pointers[first] + sizes[first] <= start:
        first += 1
    return FileRange(number, start, stop, (), first_sample + first, pointers[first:end].copy(), sizes[first:end].copy())


def write_range(write: Callable[[memoryview, int], object], file_range: FileRange, payload: Payload) -> tuple[str, ...]:
    """Writes a range in blocks and returns the digests of its chunks. Holds one block and one image in memory.

    `write(block, offset in the beton)`, such as `partial(write_at, descriptor)`, must not keep the block.
    """
    digests = RunningDigests()
    for offset, block in _blocks(file_range, payload):
        digests.update(block)
        write(block, offset)
    return digests.finish()


def read_digests(descriptor: int, file_range: FileRange) -> tuple[str, ...]:
    """Digests of the chunks as they are in the file now."""
    starts = range(file_range.start, file_range.stop, CHUNK_BYTES)
    return tuple(chunk_digest(os.pread(descriptor, min(CHUNK_BYTES, file_range.stop - at), at)) for at in starts)


def _blocks(file_range: FileRange, payload: Payload) -> Iterator[tuple[int, memoryview]]:
    """The range's bytes in order, gaps as zeros: offsets in the file, and blocks in one buffer.

    Images are read straight into the buffer that is written, so they are copied once and the memory is reused.
    """
    buffer = memoryview(bytearray(BLOCK_BYTES + max(BLOCK_BYTES, int(file_range.sizes.max(initial=0)))))
    at, pieces = _pieces(file_range, payload)
    filled = 0
    for size, put in pieces:
        put(buffer[filled : filled + size])
        filled += size
        if filled >= BLOCK_BYTES:
            rest = (at + filled) % ALIGNMENT_BYTES
            done = filled - rest
            yield from _within(file_range, at, buffer[:done])
            buffer[:rest] = buffer[done:filled]
            at, filled = at + done, rest
    yield from _within(file_range, at, buffer[:filled])


def _within(file_range: FileRange, at: int, block: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The part of the block that is in the range."""
    block = block[max(0, file_range.start - at) : max(0, file_range.stop - at)]
    if len(block):
        yield max(at, file_range.start), block


def _pieces(file_range: FileRange, payload: Payload) -> tuple[int, Iterator[_Piece]]:
    """Where the pieces start, and the pieces, gaps filled with zeros. Images may extend beyond the range."""
    segments = _segments(file_range, payload)
    first, _, _ = segments[0] if segments else (file_range.stop, 0, ())
    start = min(first, file_range.start)

    def pieces() -> Iterator[_Piece]:
        at = start
        for offset, size, parts in segments:
            yield from _zeros(offset - at)
            yield from parts
            at = offset + size
        yield from _zeros(file_range.stop - at)

    return start, pieces()


def _segments(file_range: FileRange, payload: Payload) -> list[tuple[int, int, Iterable[_Piece]]]:
    """Offset in the file, size and pieces of everything but gaps, ascending."""
    images = [
        (pointer, sum(sizes), ((sum(sizes), partial(payload, sample, sizes)),))
        for pointer, sample, sizes in _runs(file_range)
    ]
    tables = [(offset, len(data), _copies(memoryview(data))) for offset, data in file_range.literal]
    return sorted([*images, *tables], key=itemgetter(0))


def _runs(file_range: FileRange) -> Iterator[tuple[int, int, list[int]]]:
    """Runs of images without a gap, of up to `BLOCK_BYTES` or one image: offset in the file, id of the first, sizes."""
    sizes = file_range.sizes.tolist()
    first = end = num_bytes = 0
    for number, (pointer, size) in enumerate(zip(file_range.pointers.tolist(), sizes, strict=True)):
        if number and (pointer != end or num_bytes + size > BLOCK_BYTES):
            yield end - num_bytes, file_range.first_sample + first, sizes[first:number]
            first, num_bytes = number, 0
        end, num_bytes = pointer + size, num_bytes + size
    if sizes:
        yield end - num_bytes, file_range.first_sample + first, sizes[first:]


def _copies(data: memoryview) -> Iterator[_Piece]:
    for start in range(0, len(data), BLOCK_BYTES):
        piece = data[start : start + BLOCK_BYTES]
        yield len(piece), partial(_copy, piece)


def _copy(data: memoryview, into: memoryview) -> None:
    into[:] = data


def _zeros(count: int) -> Iterator[_Piece]:
    while count > 0:
        size = min(count, BLOCK_BYTES)
        yield size, partial(_copy, ZEROS[:size])
        count -= size


def write_beton(
    final: Path,
    beton: BetonLayout,
    payload: Payload,
    *,
    temporary: Path,
    after_range: Callable[[int, int], None] = lambda *_: None,
) -> FileDigest:
    """Writes a complete beton in this process: `temporary`, on the file system of `final`, renamed once it is fsynced.

    `after_range(bytes written, bytes in all)` may raise to stop. The temporary file is removed on every error.
    """
    chunks: list[str] = []
    try:
        create_sized(temporary, beton.total_bytes)
        descriptor = open_regular(temporary, os.O_RDWR)
        try:
            for number in range(num_ranges(beton)):
                file_range = cut(beton, number)
                chunks += write_range(partial(write_at, descriptor), file_range, payload)
                after_range(file_range.stop, beton.total_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        rename_durably(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    return combine(chunks)


def create_sized(path: Path, total_bytes: int) -> None:
    """A sparse file of that many zero bytes; an existing one keeps its bytes."""
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(descriptor, total_bytes)
    finally:
        os.close(descriptor)
