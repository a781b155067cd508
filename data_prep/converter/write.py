"""Writes ranges of the beton at their place: encoded bytes from the parts, the source's own bytes straight from there.

Any worker that sees the output's file system may write any range, twice if need be. A finished range leaves a note with
its digests; a later run compares them with what stands in the file, so neither a kill nor a power cut is believed.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.contents import CONTENT, content_of
from data_prep.beton.digest import ALGORITHM, CHUNK_BYTES, is_hex_digest, sample_digest
from data_prep.beton.layout import pack
from data_prep.beton.ranges import FileRange, cut_images
from data_prep.converter.output import Output, Reader, Written, read_work_file
from data_prep.converter.plan import ENDS_IN_SOURCE, IN_SOURCE, UNIT_SAMPLES, Part, part_name, whole_note
from data_prep.errors import Fault
from data_prep.sources.base import Source, SourceWithEnds, digest_of
from data_prep.sources.files.places import ends_of
from data_prep.strict_json import parse

NOTE_PREFIX = "range-"
MAX_NOTE_BYTES = 1 << 30
"""Of a range of 64 MiB, 20 kB for ImageNet's images; as many samples as fit in there."""

PLACED_ROW = np.dtype([("index", "<u8"), ("check", "<u8"), ("spill", "<i8")])
"""Index in the source; the others as in `part.PART_ROW`."""


class ImageChanged(Fault):
    """An image is not what it was when its unit was read: the same command reads it anew."""


@dataclass(frozen=True)
class PlaceJob:
    """What all ranges of a beton share. Sent to each worker once."""

    source: Source
    output: Output
    target: str
    """What `output.begin` gave."""


@dataclass(frozen=True)
class PlaceTask:
    range: FileRange
    samples: NDArray[np.void]
    """`PLACED_ROW` of the range's samples."""

    def __str__(self) -> str:
        return str(self.range)

    @property
    def reads_first(self) -> bool:
        """Whether some of the files are read whole for the first time."""
        return bool((self.samples["spill"] == ENDS_IN_SOURCE).any())

    def digest(self) -> str:
        """Hex. Of tasks of one plan those with equal digests write the same bytes to the same place, or fail."""
        part = self.range
        parts: list[int | bytes] = [part.number, part.start, part.stop, part.first_sample]
        for offset, data in part.literal:
            parts += [offset, data]
        parts += [array.tobytes() for array in (part.pointers, part.sizes, self.samples)]
        return digest_of(parts).partition(":")[2]


@dataclass(frozen=True)
class RangeReport:
    number: int
    digest: str
    """`PlaceTask.digest`."""
    num_bytes: int
    written: Written
    node: str


def place_range(job: PlaceJob, task: PlaceTask) -> RangeReport:
    """Fault when the beton cannot be written; ImageChanged."""
    part, digest = task.range, task.digest()
    note = f"{NOTE_PREFIX}{part.number:06d}.{digest[:16]}"
    try:
        written = _noted(job.output, note, task)
        if written is None or not job.output.holds(job.target, part, written):
            with _Images(job, task) as images:
                written = job.output.write_range(job.target, part, images.put)
            written = replace(written, contents=images.contents())
            job.output.write(note, _as_note(written))
    except OSError as error:
        raise Fault(
            f"{job.output.work_shown}: cannot be written: {error.strerror or error}; fix that, then run the same "
            "command again"
        ) from None
    return RangeReport(part.number, digest, part.stop - part.start, written, socket.gethostname())


def _as_note(written: Written) -> bytes:
    return json.dumps({**asdict(written), "contents": written.contents.hex()}).encode()


def _noted(output: Output, name: str, task: PlaceTask) -> Written | None:
    """What an earlier run noted, if that is whole; others may write where it lies, and a power cut tears it."""
    text = read_work_file(output, name)
    if text is None:
        return None
    try:
        note = parse(text, max_bytes=MAX_NOTE_BYTES)
        written = Written(tuple(note["chunks"]), note["receipt"], bytes.fromhex(note["contents"]))
    except (ValueError, TypeError, KeyError):
        return None
    part = task.range
    is_whole = (
        isinstance(written.receipt, str)
        and len(written.chunks) == -(-(part.stop - part.start) // CHUNK_BYTES)
        and all(is_hex_digest(chunk, ALGORITHM) for chunk in written.chunks)
        and len(written.contents) == (CONTENT.itemsize * len(task.samples) if task.reads_first else 0)
    )
    return written if is_whole else None


class _Images:
    """The stored bytes of a range's samples, each compared with its digest. Keeps the part read last open."""

    def __init__(self, job: PlaceJob, task: PlaceTask) -> None:
        self._job = job
        self._first_sample = task.range.first_sample
        self._rows = task.samples.tolist()
        self._in_place = job.source if isinstance(job.source, SourceWithEnds) else None
        self._unit = -1
        self._part: Reader | None = None
        self._contents = bytearray(CONTENT.itemsize * len(self._rows)) if task.reads_first else bytearray()

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, *_: object) -> None:
        if self._part is not None:
            self._part.close()

    def contents(self) -> bytes:
        """`Written.contents`."""
        return bytes(self._contents)

    def put(self, sample: int, sizes: Sequence[int], into: memoryview) -> None:
        """`beton.ranges.Payload`."""
        place = (sample - self._first_sample) * CONTENT.itemsize
        rows = self._rows[sample - self._first_sample :][: len(sizes)]
        is_read = self._read_together(rows, into)
        at = 0
        for (index, check, where), size in zip(rows, sizes, strict=True):
            image = into[at : at + size]
            at += size
            if where not in (IN_SOURCE, ENDS_IN_SOURCE):
                self._copy(index, self._from_part(index // UNIT_SAMPLES, size, where), image)
            elif not is_read:
                self._from_source(index, image, is_first_reading=where == ENDS_IN_SOURCE)
            if sample_digest(ends_of(image) if where == ENDS_IN_SOURCE else image) != check:
                self._forget_changed(index)
            if where == ENDS_IN_SOURCE:
                self._contents[place : place + CONTENT.itemsize] = content_of(image)
            place += CONTENT.itemsize

    def _read_together(self, rows: Sequence[tuple[int, int, int]], into: memoryview) -> bool:
        """All of them at once, where all lie in the source. One by one it is told which of them cannot be read."""
        if self._in_place is None or any(where not in (IN_SOURCE, ENDS_IN_SOURCE) for _, _, where in rows):
            return False
        try:
            self._in_place.read_into([index for index, _, _ in rows], into)
        except (OSError, ValueError):
            return False
        return True

    def _from_source(self, index: int, into: memoryview, *, is_first_reading: bool) -> None:
        source = self._job.source
        try:
            if self._in_place is not None:
                self._in_place.read_into([index], into)
                return
            data = source[index].data
        except (OSError, ValueError) as error:
            what = "only its ends can be read" if is_first_reading else "could be read at first, and now not"
            self._forget(index, f"{source.key(index)}: {what}: {error}")
        self._copy(index, data, into)

    def _copy(self, index: int, data: bytes, into: memoryview) -> None:
        if len(data) != len(into):
            self._forget_changed(index)
        into[:] = data

    def _from_part(self, unit: int, size: int, offset: int) -> bytes:
        if unit != self._unit or self._part is None:
            if self._part is not None:
                self._part.close()
                self._part = None
            self._part = self._job.output.reader(part_name(unit))
            self._unit = unit
        return self._part.read_at(offset, size)

    def _forget_changed(self, index: int) -> NoReturn:
        self._forget(index, f"{self._job.source.key(index)}: changed while the data set was being converted")

    def _forget(self, index: int, message: str) -> NoReturn:
        """The unit is read again by the next run, whole."""
        self._job.output.write(whole_note(index // UNIT_SAMPLES), b"")
        self._job.output.remove(part_name(index // UNIT_SAMPLES))
        raise ImageChanged(f"{message}; no beton was written; run the same command again")


# Which ranges of a beton can be written while later images are still unread, their files being in memory just now.


def placed_rows(rows: NDArray[np.void], first_index: int) -> NDArray[np.void]:
    """`PLACED_ROW`s of those of the `PART_ROW`s that are stored; `first_index`: in the source, of the first."""
    stored = rows["size"] > 0
    placed = np.zeros(int(stored.sum()), dtype=PLACED_ROW)
    placed["index"] = np.flatnonzero(stored) + first_index
    for name in ("check", "spill"):
        placed[name] = rows[name][stored]
    return placed


class WriteAhead:
    """Takes the parts in order, gives the ranges that are complete with them. Holds the samples of one of each."""

    def __init__(self, num_samples: int, page_bytes: int, range_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._range_bytes = range_bytes
        self._pages_start = layout.pages_start(num_samples, page_bytes)
        self._next_range = -(-self._pages_start // range_bytes)  # those before it hold the tables
        self._used_bytes = 0  # of the pages
        self._first_sample = 0  # of those below
        self._pointers: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._sizes: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._samples: NDArray[np.void] = np.zeros(0, dtype=PLACED_ROW)

    def add(self, part: Part) -> Iterator[PlaceTask]:
        sizes = part.rows["size"][part.rows["size"] > 0].astype(np.int64)
        if not len(sizes):
            return
        offsets, _ = pack(sizes, self._page_bytes, self._used_bytes)
        self._used_bytes = int(offsets[-1] + sizes[-1])
        self._pointers = np.concatenate([self._pointers, offsets + self._pages_start])
        self._sizes = np.concatenate([self._sizes, sizes])
        self._samples = np.concatenate([self._samples, placed_rows(part.rows, part.unit.start)])
        while (self._next_range + 1) * self._range_bytes <= self._pages_start + self._used_bytes:
            yield self._cut()

    def _cut(self) -> PlaceTask:
        start = self._next_range * self._range_bytes
        part = cut_images(
            self._next_range, start, start + self._range_bytes, self._pointers, self._sizes, self._first_sample
        )
        inside = slice(part.samples.start - self._first_sample, part.samples.stop - self._first_sample)
        task = PlaceTask(part, self._samples[inside].copy())
        done = max(inside.stop - 1, 0)  # the last one may reach into the next range
        self._first_sample += done
        self._pointers, self._sizes, self._samples = self._pointers[done:], self._sizes[done:], self._samples[done:]
        self._next_range += 1
        return task
