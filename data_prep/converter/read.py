"""Reads one unit of work into its part file, in a worker or the driver. Reading it again gives the same part."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.beton.contents import content_of
from data_prep.beton.files import cannot_be_written
from data_prep.beton.statistics import is_measured
from data_prep.converter.encode import (
    LeftInSource,
    encode_all,
    encoder_versions,
    ends_may_do,
    leave_in_source,
)
from data_prep.converter.output import read_work_file
from data_prep.converter.picture import BadSample
from data_prep.converter.plan import BadSampleReport, Job, PartWriter, WorkUnit, part_name, whole_note
from data_prep.errors import UserError
from data_prep.sources.base import Source, UnreadableSample, read_sample
from data_prep.sources.file_source import FileSource
from data_prep.sources.files.paths import HEAD_BYTES, TAIL_BYTES

BATCH_BYTES = 1 << 20
"""Files that are read before they are encoded together.

With 4 MiB, malloc of a fresh process returns the memory to the system after every batch and fetches it again page by
page: 12 page faults an image instead of 8, and a tenth more CPU where nothing is decoded.
"""
LONG_HEAD_BYTES = 32 << 10
"""Read from files whose headers do not end within `HEAD_BYTES`."""
ENDS_BYTES = 4 << 20
"""Ends that are held in memory at a time."""


@dataclass(frozen=True)
class UnitReport:
    unit: WorkUnit
    source_bytes: int
    """Bytes read."""
    num_bad: int
    node: str
    """Host name of the worker's machine."""


def read_unit(job: Job, unit: WorkUnit) -> UnitReport:
    """Writes the unit's part, with the reasons for bad samples.

    Fault when it cannot be written. UserError when this machine has other libraries than the driver, which might give
    other bytes.
    """
    here = encoder_versions()
    if here != job.versions:
        others = ", ".join(f"{name} {here[name]}, not {v}" for name, v in job.versions.items() if here[name] != v)
        raise UserError(
            f"{socket.gethostname()}: has other libraries than the driver ({others}); install the same ones"
        )
    with cannot_be_written(job.output.work_shown), job.output.writing(part_name(unit.number)) as file:
        part = PartWriter(file, job.plan_digest, unit)
        # Files that their ends settle (`check: headers`) are read when they are written; all others are read now.
        settled, source_bytes = _settle_by_ends(job, unit, part)
        rest = (index for index in range(unit.start, unit.stop) if index not in settled)
        num_bad = 0
        for batch in _batches(job.source, rest):
            read = {one.sample: one.found for one in batch if isinstance(one.found, bytes)}
            encoded = encode_all(list(read.values()), list(read), job.settings)
            source_bytes += sum(map(len, read.values()))
            for index, label, found in batch:
                result = next(encoded) if isinstance(found, bytes) else found
                if isinstance(result, BadSample):
                    part.put_bad(BadSampleReport(index, job.source.key(index), str(result)))
                    num_bad += 1
                else:
                    spill = not (result.untouched and job.reads_again)
                    part.put(index, result, label, content_of(read[index]), spill=spill)
                    if result.damage:
                        part.put_bad(BadSampleReport(index, job.source.key(index), result.damage, is_stored=True))
                    if job.settings.check == "decode" and is_measured(index, len(job.source)):
                        part.measure(result)
        part.finish()
    return UnitReport(unit, source_bytes, num_bad, socket.gethostname())


def _settle_by_ends(job: Job, unit: WorkUnit, part: PartWriter) -> tuple[set[int], int]:
    """Adds the samples whose first and last bytes show that they are stored unchanged. Returns their indices, and the
    number of bytes read.
    """
    if not job.reads_again or not isinstance(job.source, FileSource):
        return set(), 0
    asked = [index for index in range(unit.start, unit.stop) if ends_may_do(job.settings, index)]
    if not asked or read_work_file(job.output, whole_note(unit.number)) is not None:
        return set(), 0
    labels, num_classes = job.source.labels, len(job.source.class_names)
    settled: set[int] = set()
    num_read = 0
    for max_head_bytes in (HEAD_BYTES, LONG_HEAD_BYTES):
        left: dict[int, LeftInSource] = {}
        longer: list[int] = []  # files that a longer head may settle
        for few in _chunks(asked, ENDS_BYTES // max_head_bytes):
            ends = job.source.ends(few, max_head_bytes)
            found = zip(few, leave_in_source(ends, job.settings), strict=True)
            left |= {index: image for index, image in found if image is not None and 0 <= labels[index] < num_classes}
            longer += [index for index, size in zip(few, ends.num_bytes, strict=True) if size > HEAD_BYTES + TAIL_BYTES]
            num_read += int(np.minimum(ends.num_bytes, ends.rows.shape[1]).clip(0).sum())
        if left:
            part.put_left(list(left), labels[list(left)].tolist(), list(left.values()))
        settled |= left.keys()
        asked = [index for index in longer if index not in left]
    return settled, num_read


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


class _Read(NamedTuple):
    sample: int
    label: int
    found: bytes | BadSample


def _batches(source: Source, indices: Iterable[int]) -> Iterator[list[_Read]]:
    """These samples in order, in batches of about `BATCH_BYTES`."""
    batch: list[_Read] = []
    num_bytes = 0
    for index in indices:
        sample = _read(source, index)
        batch.append(sample)
        num_bytes += len(sample.found) if isinstance(sample.found, bytes) else 0
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _read(source: Source, index: int) -> _Read:
    try:
        sample = read_sample(source, index)
    except UnreadableSample as error:
        return _Read(index, -1, BadSample(str(error)))
    if not 0 <= sample.label < len(source.class_names):
        return _Read(index, -1, BadSample(f"has label {sample.label}, expected 0..{len(source.class_names) - 1}"))
    return _Read(index, sample.label, sample.data)
