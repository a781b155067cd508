"""Writes the beton range by range: when each range is complete, and its bytes, from the source and the parts.

Any worker that sees the output may write any range, even twice. A finished range leaves a note with its digests, which
a later run compares with the file: so neither a kill nor a power cut goes unnoticed.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.contents import CONTENT, content_of
from data_prep.beton.digest import ALGORITHM, CHUNK_BYTES, is_hex_digest, sample_digest
from data_prep.beton.files import cannot_be_written
from data_prep.beton.layout import BetonLayout, pack, pages_start
from data_prep.beton.ranges import FileRange, Written, cut, cut_images, num_ranges
from data_prep.converter.output import Output, WorkReader, read_work_file
from data_prep.converter.plan import ENDS_IN_SOURCE, IN_SOURCE, UNIT_SAMPLES, Job, UnitPart, part_name, whole_note
from data_prep.errors import Fault
from data_prep.sources.base import digest_of
from data_prep.sources.file_source import FileSource
from data_prep.sources.files.paths import ends_of
from data_prep.strict_json import parse

NOTE_PREFIX = "range-"
MAX_NOTE_BYTES = 1 << 30
"""20 kB for a range of ImageNet's images, but one of 64 MiB may hold millions of tiny ones."""

WRITE_ROW = np.dtype([("index", "<u8"), ("check", "<u8"), ("spill", "<i8")])
"""`index`: in the source; the others as in `plan.PART_ROW`."""


@dataclass(frozen=True)
class WriteTask:
    target: str
    """From `Output.begin`."""
    range: FileRange
    samples: NDArray[np.void]
    """The `WRITE_ROW`s of the range's samples."""

    def __str__(self) -> str:
        return str(self.range)

    @property
    def reads_first(self) -> bool:
        """Whether some files are read completely for the first time."""
        return bool((self.samples["spill"] == ENDS_IN_SOURCE).any())

    def digest(self) -> str:
        """Hex. Tasks of one plan with equal digests write the same bytes to the same offsets, or fail."""
        span = self.range
        values: list[int | bytes] = [span.number, span.start, span.stop, span.first_sample]
        for offset, data in span.literal:
            values += [offset, data]
        values += [array.tobytes() for array in (span.pointers, span.sizes, self.samples)]
        return digest_of(values).partition(":")[2]


# --- which ranges -----------------------------------------------------------------------------------------------------


def write_rows(rows: NDArray[np.void], first_index: int) -> NDArray[np.void]:
    """The `WRITE_ROW`s of the samples that are stored. `rows`: `PART_ROW`s; `first_index`: the first one's index in the
    source."""
    stored = rows["size"] > 0
    found = np.zeros(int(stored.sum()), dtype=WRITE_ROW)
    found["index"] = np.flatnonzero(stored) + first_index
    for name in ("check", "spill"):
        found[name] = rows[name][stored]
    return found


class EarlyRanges:
    """The ranges that are complete while later images are unread. Takes the parts in order.

    So a file's bytes are still in memory when they are copied, however large the data set, and the disk that is read
    and the one that is written work at the same time. Images are in the order of the source: an image's offset depends
    on those before it, and on the start of the pages, which follows from the number of samples. If samples are left out
    and the pages start elsewhere (`pages_start`), these ranges are not the beton's.
    """

    def __init__(self, target: str, num_samples: int, page_bytes: int, range_bytes: int) -> None:
        self.pages_start = pages_start(num_samples, page_bytes)
        self._target = target
        self._page_bytes = page_bytes
        self._range_bytes = range_bytes
        self._next_range = -(-self.pages_start // range_bytes)  # those before it hold the tables
        self._used_bytes = 0  # of the pages
        self._first_sample = 0  # of the samples below, in the next range or after it
        self._pointers: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._sizes: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._samples: NDArray[np.void] = np.zeros(0, dtype=WRITE_ROW)

    def add(self, part: UnitPart) -> Iterator[WriteTask]:
        """The ranges that are complete with this part."""
        sizes = part.rows["size"][part.rows["size"] > 0].astype(np.int64)
        if not len(sizes):
            return
        offsets, _ = pack(sizes, self._page_bytes, self._used_bytes)
        self._used_bytes = int(offsets[-1] + sizes[-1])
        self._pointers = np.concatenate([self._pointers, offsets + self.pages_start])
        self._sizes = np.concatenate([self._sizes, sizes])
        self._samples = np.concatenate([self._samples, write_rows(part.rows, part.unit.start)])
        while (self._next_range + 1) * self._range_bytes <= self.pages_start + self._used_bytes:
            yield self._cut()

    def _cut(self) -> WriteTask:
        start = self._next_range * self._range_bytes
        file_range = cut_images(
            self._next_range, start, start + self._range_bytes, self._pointers, self._sizes, self._first_sample
        )
        inside = slice(file_range.samples.start - self._first_sample, file_range.samples.stop - self._first_sample)
        task = WriteTask(self._target, file_range, self._samples[inside].copy())
        done = max(inside.stop - 1, 0)  # the last one may reach into the next range
        self._first_sample += done
        self._pointers, self._sizes, self._samples = self._pointers[done:], self._sizes[done:], self._samples[done:]
        self._next_range += 1
        return task


@dataclass(frozen=True)
class AllRanges:
    """The ranges of the finished layout, made one by one: all at once would copy the tables of the entire beton."""

    target: str
    beton: BetonLayout
    samples: NDArray[np.void]
    """The `WRITE_ROW`s of all samples."""
    range_bytes: int

    def __len__(self) -> int:
        return num_ranges(self.beton, self.range_bytes)

    def task(self, number: int) -> WriteTask:
        file_range = cut(self.beton, number, self.range_bytes)
        return WriteTask(self.target, file_range, self.samples[file_range.samples])


# --- one range --------------------------------------------------------------------------------------------------------


class ImageChanged(Fault):
    """An image is not what it was when its unit was read; the same command reads it again."""


@dataclass(frozen=True)
class RangeReport:
    number: int
    num_bytes: int
    written: Written
    node: str
    """Host name of the worker's machine."""


def write_task(job: Job, task: WriteTask) -> RangeReport:
    """Fault when the range cannot be written; ImageChanged."""
    file_range = task.range
    note = f"{NOTE_PREFIX}{file_range.number:06d}.{task.digest()[:16]}"
    with cannot_be_written(job.output.work_shown):
        written = _noted(job.output, note, task)
        if written is None or not job.output.holds(task.target, file_range, written):
            with _Images(job, task) as images:
                written = job.output.write_range(task.target, file_range, images.put)
            written = replace(written, contents=bytes(images.contents))
            text = json.dumps({**asdict(written), "contents": written.contents.hex()})
            job.output.write(note, text.encode())
    return RangeReport(file_range.number, file_range.stop - file_range.start, written, socket.gethostname())


def _noted(output: Output, name: str, task: WriteTask) -> Written | None:
    """An earlier run's note, if it is valid: others may write there, and a power cut may damage it."""
    text = read_work_file(output, name)
    if text is None:
        return None
    try:
        note = parse(text, max_bytes=MAX_NOTE_BYTES)
        written = Written(tuple(note["chunks"]), note["receipt"], bytes.fromhex(note["contents"]))
    except (ValueError, TypeError, KeyError):
        return None
    is_whole = (
        isinstance(written.receipt, str)
        and len(written.chunks) == -(-(task.range.stop - task.range.start) // CHUNK_BYTES)
        and all(is_hex_digest(chunk, ALGORITHM) for chunk in written.chunks)
        and len(written.contents) == (CONTENT.itemsize * len(task.samples) if task.reads_first else 0)
    )
    return written if is_whole else None


class _Images:
    """The stored bytes of a range's samples, each compared with its digest. Keeps the last part open."""

    def __init__(self, job: Job, task: WriteTask) -> None:
        self._job = job
        self._first_sample = task.range.first_sample
        self._rows = task.samples.tolist()
        self._in_place = job.source if isinstance(job.source, FileSource) else None
        self._unit = -1
        self._part: WorkReader | None = None
        self.contents = bytearray(CONTENT.itemsize * len(self._rows)) if task.reads_first else bytearray()
        """`Written.contents`."""

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, *_: object) -> None:
        if self._part is not None:
            self._part.close()

    def put(self, sample: int, sizes: Sequence[int], into: memoryview) -> None:
        """See `beton.ranges.Payload`."""
        first = sample - self._first_sample
        rows = self._rows[first:][: len(sizes)]
        is_read = self._read_together(rows, into)
        at = 0
        for number, ((index, check, where), size) in enumerate(zip(rows, sizes, strict=True), first):
            image = into[at : at + size]
            at += size
            if where not in (IN_SOURCE, ENDS_IN_SOURCE):
                self._copy(index, self._from_part(index // UNIT_SAMPLES, size, where), image)
            elif not is_read:
                self._from_source(index, image, is_first_reading=where == ENDS_IN_SOURCE)
            if sample_digest(ends_of(image) if where == ENDS_IN_SOURCE else image) != check:
                self._fail_changed(index)
            if where == ENDS_IN_SOURCE:
                self.contents[number * CONTENT.itemsize : (number + 1) * CONTENT.itemsize] = content_of(image)

    def _read_together(self, rows: Sequence[tuple[int, int, int]], into: memoryview) -> bool:
        """Reads them in one call, if all are in the source. False: read them one by one, to see which one fails."""
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
            problem = "only its ends can be read" if is_first_reading else "could be read at first, but not now"
            self._fail(index, f"{source.key(index)}: {problem}: {error}")
        self._copy(index, data, into)

    def _copy(self, index: int, data: bytes, into: memoryview) -> None:
        if len(data) != len(into):
            self._fail_changed(index)
        into[:] = data

    def _from_part(self, unit: int, size: int, offset: int) -> bytes:
        if unit != self._unit or self._part is None:
            if self._part is not None:
                self._part.close()
                self._part = None
            self._part = self._job.output.reader(part_name(unit))
            self._unit = unit
        return self._part.read_at(offset, size)

    def _fail_changed(self, index: int) -> NoReturn:
        self._fail(index, f"{self._job.source.key(index)}: changed while the data set was being converted")

    def _fail(self, index: int, message: str) -> NoReturn:
        """Makes the next run read the unit again, with every file in full."""
        self._job.output.write(whole_note(index // UNIT_SAMPLES), b"")
        self._job.output.remove(part_name(index // UNIT_SAMPLES))
        raise ImageChanged(f"{message}; no beton was written; run the same command again")
