"""Reads one work unit into its part file. Runs in a Ray worker or in the driver; done twice, the part is the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data_prep.convert.config import ConvertSettings
from data_prep.convert.encode import BadSample, encode_all, encoder_versions
from data_prep.convert.output import Output
from data_prep.convert.part import BadSampleReport, PartWriter, part_name
from data_prep.convert.plan import WorkUnit
from data_prep.errors import Fault, UserError
from data_prep.sources.base import Sample, Source

BATCH_BYTES = 1 << 20
"""Files that are read before they are encoded together.

Of 4 MiB, malloc of a fresh process gives the memory back to the system after every batch and gets it anew, page by
page: 12 page faults an image instead of 8, and a tenth more CPU where nothing is decoded.
"""


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
            f"{job.output.work_shown}: cannot be written: {error.strerror or error}; mend that, then run the same "
            "command again"
        ) from None


def _encode_unit(job: EncodeJob, unit: WorkUnit) -> UnitReport:
    source_bytes = num_bad = 0
    with job.output.writing(part_name(unit.number)) as file:
        part = PartWriter(file, job.plan_digest, unit)
        for batch in _batches(job.source, unit):
            read = {index: sample for index, sample in batch if isinstance(sample, Sample)}
            stored = dict(zip(read, encode_all([s.data for s in read.values()], list(read), job.settings), strict=True))
            source_bytes += sum(len(sample.data) for sample in read.values())
            for index, sample in batch:
                result = sample if isinstance(sample, BadSample) else stored[index]
                if isinstance(result, BadSample):
                    part.append_bad(BadSampleReport(index, job.source.key(index), str(result)))
                    num_bad += 1
                else:
                    part.append(result, read[index].label, spill=not (result.untouched and job.reads_again))
        part.finish()
    return UnitReport(unit, source_bytes, num_bad, socket.gethostname())


def _batches(source: Source, unit: WorkUnit) -> Iterator[list[tuple[int, Sample | BadSample]]]:
    """The unit's samples with their indices, in order; together up to `BATCH_BYTES`, but at least one."""
    batch: list[tuple[int, Sample | BadSample]] = []
    num_bytes = 0
    for index in range(unit.start, unit.stop):
        try:
            sample = _read(source, index)
            num_bytes += len(sample.data)
            batch.append((index, sample))
        except BadSample as error:
            batch.append((index, error))
        if num_bytes >= BATCH_BYTES or index + 1 == unit.stop:
            yield batch
            batch, num_bytes = [], 0


def _read(source: Source, index: int) -> Sample:
    try:
        sample = source[index]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadSample(f"cannot be read: {reason}") from None
    if not 0 <= sample.label < len(source.class_names):
        raise BadSample(f"has label {sample.label}, expected 0..{len(source.class_names) - 1}")
    return sample
