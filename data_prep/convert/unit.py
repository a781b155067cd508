"""Encodes one work unit into its part file. Runs in a Ray worker or in the driver; done twice, the part is the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.convert.config import ConvertSettings
from data_prep.convert.encode import BadSample, encode
from data_prep.convert.part import PartWriter, part_path
from data_prep.convert.plan import WorkUnit
from data_prep.errors import Fault
from data_prep.sources.base import Source


@dataclass(frozen=True)
class BadSampleReport:
    index: int
    key: str
    reason: str


@dataclass(frozen=True)
class UnitReport:
    unit: WorkUnit
    stored_bytes: int
    bad: tuple[BadSampleReport, ...]
    """Not empty: the unit left no part, so that it is read again once the user has mended the source."""


def encode_unit(
    source: Source, unit: WorkUnit, settings: ConvertSettings, plan_digest: str, folder: Path
) -> UnitReport:
    """Fault when the part cannot be written; what is wrong with a sample stands in the report instead."""
    try:
        return _encode_unit(source, unit, settings, plan_digest, folder)
    except OSError as error:  # a source's own are reports by now
        raise Fault(
            f"{folder}: cannot be written: {error.strerror}; mend that, then run the same command again"
        ) from None


def _encode_unit(
    source: Source, unit: WorkUnit, settings: ConvertSettings, plan_digest: str, folder: Path
) -> UnitReport:
    bad: list[BadSampleReport] = []
    stored_bytes = 0
    with PartWriter(part_path(folder, unit), plan_digest, unit) as part:
        for index in range(unit.start, unit.stop):
            try:
                data, label = _read(source, index)
                encoded = encode(data, settings)
            except BadSample as error:
                bad.append(BadSampleReport(index, source.key(index), str(error)))
                continue
            part.append(
                encoded.data,
                mode=encoded.mode,
                untouched=encoded.untouched,
                height=encoded.height,
                width=encoded.width,
                label=label,
            )
            stored_bytes += len(encoded.data)
        if not bad:
            part.finish()
    return UnitReport(unit, stored_bytes, tuple(bad))


def _read(source: Source, index: int) -> tuple[bytes, int]:
    try:
        sample = source[index]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadSample(f"cannot be read: {reason}") from None
    if not 0 <= sample.label < len(source.class_names):
        raise BadSample(f"has label {sample.label}, expected 0..{len(source.class_names) - 1}")
    return sample.data, sample.label
