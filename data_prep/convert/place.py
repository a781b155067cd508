"""Writes ranges of the beton at their place: encoded bytes from the parts, the source's own bytes straight from there.

Any worker that sees the output's file system may write any range, twice if need be. A finished range leaves a note with
its digests; a later run compares them with what stands in the file, so neither a kill nor a power cut is believed.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.digest import sample_digest
from data_prep.beton.ranges import FileRange, read_digests, write_range
from data_prep.convert.part import IN_SOURCE, part_path
from data_prep.convert.plan import UNIT_SAMPLES
from data_prep.errors import Fault
from data_prep.sources.base import Source

PLACED_ROW = np.dtype([("index", "<u8"), ("check", "<u8"), ("spill", "<i8")])
"""Index in the source, `sample_digest` of the stored bytes, offset in the part or `IN_SOURCE`."""


@dataclass(frozen=True)
class PlaceJob:
    """What all ranges of a beton share. Sent to each worker once."""

    source: Source
    folder: Path
    target: Path
    """The unfinished beton; it exists and has its size."""
    layout_digest: str
    driver_machine: str
    """`machine()` of the driver, whose fsync at the end covers what is written there."""


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
    chunks: tuple[str, ...]
    node: str


def place_range(job: PlaceJob, task: PlaceTask) -> RangeReport:
    """Fault when the beton cannot be written, or an image is not what it was when its unit was read."""
    part = task.range
    note = job.folder / f"range-{part.number:06d}.{job.layout_digest[:16]}"
    try:
        descriptor = os.open(job.target, os.O_RDWR)
        try:
            chunks = _noted(note)
            if chunks is None or chunks != read_digests(descriptor, part):
                with _Images(job, task) as images:
                    chunks = write_range(descriptor, part, images.read)
                if machine() != job.driver_machine:
                    os.fsync(descriptor)
                _take_note(note, chunks)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Fault(
            f"{job.target}: cannot be written: {error.strerror}; mend that, then run the same command again"
        ) from None
    return RangeReport(part.number, part.stop - part.start, chunks, socket.gethostname())


def machine() -> str:
    """The running kernel: its page cache is what an fsync empties."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()


class _Images:
    """The stored bytes of a range's samples, each compared with its digest. Keeps the part read last open."""

    def __init__(self, job: PlaceJob, task: PlaceTask) -> None:
        self._job = job
        self._task = task
        self._unit = -1
        self._part = -1

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, *_: object) -> None:
        if self._part >= 0:
            os.close(self._part)

    def read(self, sample: int) -> bytes:
        place = sample - self._task.range.first_sample
        row = self._task.samples[place]
        index, size = int(row["index"]), int(self._task.range.sizes[place])
        if row["spill"] == IN_SOURCE:
            data = self._from_source(index)
        else:
            data = self._from_part(index // UNIT_SAMPLES, size, int(row["spill"]))
        if len(data) != size or sample_digest(data) != int(row["check"]):
            self._forget(index, f"{self._job.source.key(index)}: changed while the data set was being converted")
        return data

    def _from_source(self, index: int) -> bytes:
        try:
            return self._job.source[index].data
        except (OSError, ValueError) as error:
            self._forget(index, f"{self._job.source.key(index)}: could be read at first, and now not: {error}")

    def _from_part(self, unit: int, size: int, offset: int) -> bytes:
        if unit != self._unit:
            if self._part >= 0:
                os.close(self._part)
                self._part = -1
            self._part = os.open(part_path(self._job.folder, unit), os.O_RDONLY)
            self._unit = unit
        return os.pread(self._part, size, offset)

    def _forget(self, index: int, message: str) -> NoReturn:
        """The unit is read again by the next run."""
        part_path(self._job.folder, index // UNIT_SAMPLES).unlink(missing_ok=True)
        raise Fault(f"{message}; no beton was written; run the same command again")


def _noted(note: Path) -> tuple[str, ...] | None:
    try:
        return tuple(note.read_text().split())
    except FileNotFoundError:
        return None


def _take_note(note: Path, chunks: tuple[str, ...]) -> None:
    temporary = note.with_name(f"{note.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    temporary.write_text("\n".join(chunks))
    temporary.replace(note)
