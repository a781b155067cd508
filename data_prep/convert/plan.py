"""What is to be done, as a pure function of source and settings: work units, and a hash that names the conversion.

Units are cut by sample index, never by the number of workers, so a unit finished by any earlier run can be taken over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from data_prep.beton.manifest import MANIFEST_SCHEMA_VERSION
from data_prep.convert.config import ConvertSettings
from data_prep.sources.base import SourceDescription, digest_of, facts_of

UNIT_SAMPLES = 1024
"""About 112 MB of ImageNet's files: some seconds of work, lost at most once by a killed worker."""


@dataclass(frozen=True)
class WorkUnit:
    """The samples start..stop-1."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"samples {self.start}..{self.stop - 1}"


@dataclass(frozen=True)
class Plan:
    digest: str
    """Hex. Equal plans make equal betons; parts of another plan are never used."""
    units: tuple[WorkUnit, ...]
    settings: ConvertSettings
    source: SourceDescription
    versions: Mapping[str, str]
    """Of the libraries that decide re-encoded bytes: parts of two versions must not be mixed."""

    @property
    def num_samples(self) -> int:
        return self.units[-1].stop


def make_plan(
    num_samples: int, source: SourceDescription, settings: ConvertSettings, versions: Mapping[str, str]
) -> Plan:
    """`num_samples` must be at least 1."""
    units = tuple(
        WorkUnit(number, start, min(start + UNIT_SAMPLES, num_samples))
        for number, start in enumerate(range(0, num_samples, UNIT_SAMPLES))
    )
    what = {
        "source": facts_of(asdict(source)),
        "settings": settings.as_dict(),
        "versions": dict(versions),
        "num_samples": num_samples,
        "unit_samples": UNIT_SAMPLES,
        "manifest": MANIFEST_SCHEMA_VERSION,
    }
    digest = digest_of([json.dumps(what, sort_keys=True)]).partition(":")[2]
    return Plan(digest, units, settings, source, versions)
