"""Reads one work unit into its part file. Runs in a Ray worker or in the driver; done twice, the part is the same."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.beton.contents import content_of
from data_prep.converter.encode import (
    BadSample,
    LeftInSource,
    encode_all,
    encoder_versions,
    ends_may_do,
    leave_in_source,
)
from data_prep.converter.output import Output, read_work_file
from data_prep.converter.plan import BadSampleReport, PartWriter, WorkUnit, part_name, whole_note
from data_prep.converter.settings import ConvertSettings
from data_prep.errors import Fault, UserError
from data_prep.sources.base import Source, SourceWithEnds, UnreadableSample, read_sample
from data_prep.sources.files.places import HEAD_BYTES, TAIL_BYTES

BATCH_BYTES = 1 << 20
"""Files that are read before they are encoded together.

Of 4 MiB, malloc of a fresh process gives the memory back to the system after every batch and gets it anew, page by
page: 12 page faults an image instead of 8, and a tenth more CPU where nothing is decoded.
"""

LONG_HEAD_BYTES = 32 << 10
"""Of the files whose headers do not end within `HEAD_BYTES`."""
ENDS_BYTES = 4 << 20
"""Of ends that are held at a time."""


@dataclass(frozen=True)
class EncodeJob:
    """What all units of a conversion share. Sent to each worker once."""

    source: Source
    settings: ConvertSettings
    plan_digest: str
    output: Output
    reads_again: bool
    """The source can be read a second time at little cost: its own bytes are left there until their place is known."""
    versions: Mapping[str, str]
    """`encoder_versions()` of the driver."""


@dataclass(frozen=True)
class UnitReport:
    unit: WorkUnit
    source_bytes: int
    """That were read."""
    num_bad: int
    node: str
    """Host name of the worker's machine."""


def encode_unit(job: EncodeJob, unit: WorkUnit) -> UnitReport:
    """Fault when the part cannot be written; what is wrong with a sample stands in the part instead.

    UserError when this machine's libraries are not the driver's, for then its bytes might not be the same.
    """
    here = encoder_versions()
    if here != job.versions:
        what = ", ".join(f"{name} {here[name]}, not {v}" for name, v in job.versions.items() if here[name] != v)
        raise UserError(f"{socket.gethostname()}: has other libraries than the driver ({what}); install the same ones")
    try:
        return _encode_unit(job, unit)
    except OSError as error:  # a source's own are reports by now
        raise Fault(
            f"{job.output.work_shown}: cannot be written: {error.strerror or error}; fix that, then run the same "
            "command again"
        ) from None


class _Seen(NamedTuple):
    sample: int
    label: int
    found: bytes | BadSample


def _encode_unit(job: EncodeJob, unit: WorkUnit) -> UnitReport:
    num_bad = 0
    with job.output.writing(part_name(unit.number)) as file:
        part = PartWriter(file, job.plan_digest, unit)
        left, source_bytes = _leave_in_source(job, unit, part)
        for batch in _batches(job.source, (index for index in range(unit.start, unit.stop) if index not in left)):
            read = {seen.sample: seen.found for seen in batch if isinstance(seen.found, bytes)}
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
        part.finish()
    return UnitReport(unit, source_bytes, num_bad, socket.gethostname())


def _leave_in_source(job: EncodeJob, unit: WorkUnit, part: PartWriter) -> tuple[set[int], int]:
    """Puts into the part what is told by its ends. Returns which samples these are, and the bytes that were read."""
    if not job.reads_again or not isinstance(job.source, SourceWithEnds):
        return set(), 0
    asked = [index for index in range(unit.start, unit.stop) if ends_may_do(job.settings, index)]
    if not asked or read_work_file(job.output, whole_note(unit.number)) is not None:
        return set(), 0
    labels, num_classes = job.source.labels, len(job.source.class_names)
    left: set[int] = set()
    num_read = 0
    for max_head_bytes in (HEAD_BYTES, LONG_HEAD_BYTES):
        told: dict[int, LeftInSource] = {}
        longer: list[int] = []  # those of which a longer head may tell more
        for few in _chunks(asked, ENDS_BYTES // max_head_bytes):
            ends = job.source.ends(few, max_head_bytes)
            found = zip(few, leave_in_source(ends, job.settings), strict=True)
            told |= {index: image for index, image in found if image is not None and 0 <= labels[index] < num_classes}
            longer += [index for index, size in zip(few, ends.num_bytes, strict=True) if size > HEAD_BYTES + TAIL_BYTES]
            num_read += int(np.minimum(ends.num_bytes, ends.rows.shape[1]).clip(0).sum())
        if told:
            part.put_left(list(told), labels[list(told)].tolist(), list(told.values()))
        left |= told.keys()
        asked = [index for index in longer if index not in told]
    return left, num_read


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _batches(source: Source, indices: Iterable[int]) -> Iterator[list[_Seen]]:
    """These samples in order; what was read of them is together up to `BATCH_BYTES`, but at least one sample."""
    batch: list[_Seen] = []
    num_bytes = 0
    for index in indices:
        seen = _read(source, index)
        batch.append(seen)
        num_bytes += len(seen.found) if isinstance(seen.found, bytes) else 0
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _read(source: Source, index: int) -> _Seen:
    try:
        sample = read_sample(source, index)
    except UnreadableSample as error:
        return _Seen(index, -1, BadSample(str(error)))
    if not 0 <= sample.label < len(source.class_names):
        return _Seen(index, -1, BadSample(f"has label {sample.label}, expected 0..{len(source.class_names) - 1}"))
    return _Seen(index, sample.label, sample.data)
