"""Writes ranges of the beton at their place: encoded bytes from the parts, the source's own bytes straight from there.

Any worker that sees the output's file system may write any range, twice if need be. A finished range leaves a note with
its digests; a later run compares them with what stands in the file, so neither a kill nor a power cut is believed.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.digest import sample_digest
from data_prep.beton.ranges import FileRange
from data_prep.convert.encode import ends_digest
from data_prep.convert.output import Output, Reader, Written, read_small
from data_prep.convert.part import ENDS_IN_SOURCE, IN_SOURCE, part_name, whole_note
from data_prep.convert.plan import UNIT_SAMPLES
from data_prep.errors import Fault
from data_prep.sources.base import Source, read_ends

NOTE_PREFIX = "range-"

PLACED_ROW = np.dtype([("index", "<u8"), ("check", "<u8"), ("spill", "<i8")])
"""Index in the source; the others as in `part.PART_ROW`."""


@dataclass(frozen=True)
class PlaceJob:
    """What all ranges of a beton share. Sent to each worker once."""

    source: Source
    output: Output
    target: str
    """What `output.begin` gave."""
    layout_digest: str


@dataclass(frozen=True)
class PlaceTask:
    range: FileRange
    samples: NDArray[np.void]
    """`PLACED_ROW` of the range's samples."""

    def __str__(self) -> str:
        return str(self.range)


@dataclass(frozen=True)
class RangeReport:
    number: int
    num_bytes: int
    written: Written
    node: str


def place_range(job: PlaceJob, task: PlaceTask) -> RangeReport:
    """Fault when the beton cannot be written, or an image is not what it was when its unit was read."""
    part = task.range
    note = f"{NOTE_PREFIX}{part.number:06d}.{job.layout_digest[:16]}"
    try:
        written = _noted(job.output, note)
        if written is None or not job.output.holds(job.target, part, written):
            with _Images(job, task) as images:
                written = job.output.write_range(job.target, part, images.read)
            job.output.write(note, "\n".join([written.receipt, *written.chunks]).encode())
    except OSError as error:
        raise Fault(
            f"{job.output.work_shown}: cannot be written: {error.strerror or error}; mend that, then run the same "
            "command again"
        ) from None
    return RangeReport(part.number, part.stop - part.start, written, socket.gethostname())


def _noted(output: Output, note: str) -> Written | None:
    text = read_small(output, note)
    if text is None:
        return None
    receipt, *chunks = text.decode().split("\n")
    return Written(tuple(chunks), receipt)


class _Images:
    """The stored bytes of a range's samples, each compared with its digest. Keeps the part read last open."""

    def __init__(self, job: PlaceJob, task: PlaceTask) -> None:
        self._job = job
        self._task = task
        self._unit = -1
        self._part: Reader | None = None

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, *_: object) -> None:
        if self._part is not None:
            self._part.close()

    def read(self, sample: int) -> bytes:
        place = sample - self._task.range.first_sample
        row = self._task.samples[place]
        index, size = int(row["index"]), int(self._task.range.sizes[place])
        where = int(row["spill"])
        if where in (IN_SOURCE, ENDS_IN_SOURCE):
            data = self._from_source(index, is_first_reading=where == ENDS_IN_SOURCE)
        else:
            data = self._from_part(index // UNIT_SAMPLES, size, where)
        if len(data) != size or _digest(data, where) != int(row["check"]):
            self._forget(index, f"{self._job.source.key(index)}: changed while the data set was being converted")
        return data

    def _from_source(self, index: int, *, is_first_reading: bool) -> bytes:
        try:
            return self._job.source[index].data
        except (OSError, ValueError) as error:
            if is_first_reading:
                self._job.output.write(whole_note(index // UNIT_SAMPLES), b"")
                self._forget(index, f"{self._job.source.key(index)}: only its ends can be read: {error}")
            self._forget(index, f"{self._job.source.key(index)}: could be read at first, and now not: {error}")

    def _from_part(self, unit: int, size: int, offset: int) -> bytes:
        if unit != self._unit or self._part is None:
            if self._part is not None:
                self._part.close()
                self._part = None
            self._part = self._job.output.reader(part_name(unit))
            self._unit = unit
        return self._part.read_at(offset, size)

    def _forget(self, index: int, message: str) -> NoReturn:
        """The unit is read again by the next run."""
        self._job.output.remove(part_name(index // UNIT_SAMPLES))
        raise Fault(f"{message}; no beton was written; run the same command again")


def _digest(data: bytes, where: int) -> int:
    if where != ENDS_IN_SOURCE:
        return sample_digest(data)
    return ends_digest(read_ends(lambda start, length: data[start : start + length], len(data)))
