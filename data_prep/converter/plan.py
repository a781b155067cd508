"""The plan of a conversion: units of work, cut by index; and the file that reading one unit leaves, its part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.contents import CONTENT, NO_CONTENT
from data_prep.beton.digest import sample_digest
from data_prep.beton.manifest import MANIFEST_SCHEMA_VERSION
from data_prep.beton.statistics import NUM_SUMS, Stored, measure
from data_prep.converter.encode import Encoded, LeftInSource
from data_prep.converter.output import Output
from data_prep.converter.settings import ConvertSettings
from data_prep.errors import Fault
from data_prep.sources.base import Source, SourceDescription, digest_of, facts_of
from data_prep.strict_json import parse

UNIT_SAMPLES = 1024
"""About 112 MB of ImageNet's files: a few seconds of work, which a killed worker loses."""


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
class ConversionPlan:
    digest: str
    """Hex. Equal plans make equal betons; parts of another plan are never used."""
    units: tuple[WorkUnit, ...]
    settings: ConvertSettings
    source: SourceDescription
    versions: Mapping[str, str]
    """Versions of the libraries that encode images: parts of two versions must not be mixed."""

    @property
    def num_samples(self) -> int:
        return self.units[-1].stop


def make_plan(
    num_samples: int, source: SourceDescription, settings: ConvertSettings, versions: Mapping[str, str]
) -> ConversionPlan:
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
    return ConversionPlan(digest, units, settings, source, versions)


@dataclass(frozen=True)
class Job:
    """What all units and ranges of a conversion share. Sent to each worker once."""

    source: Source
    settings: ConvertSettings
    plan_digest: str
    output: Output
    versions: Mapping[str, str]
    """`encoder_versions()` of the driver."""
    reads_again: bool
    """The source is on a file system, so reading twice is cheap: unchanged bytes stay there until they are written."""


# --- parts ------------------------------------------------------------------------------------------------------------
#
# A part is: bytes of encoded images | one `PART_ROW` per sample | bad samples | trailer. Unchanged images from a file
# system are not in it: they are read again when their range is written, and compared with their digest. A part gets its
# name when it is complete. It is not fsynced: its digest shows what a power cut has damaged.

PART_ROW = np.dtype(
    [
        ("mode", "<u1"),
        ("untouched", "<u1"),
        ("is_rotated", "<u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i8"),
        ("size", "<u8"),
        ("check", "<u8"),
        ("spill", "<i8"),
        ("content", CONTENT),
    ]
)
"""`STORED_ROW`, and:

- `is_rotated`: the source carries an EXIF orientation.
- `size`: 0 for a sample that cannot be stored.
- `check`: `sample_digest` of the stored bytes; with `ENDS_IN_SOURCE` of the file's ends.
- `spill`: offset of the stored bytes in the part, or one of the two constants below.
- `content`: `content_of` the source's file, not known yet with `ENDS_IN_SOURCE`.
"""
IN_SOURCE = -1
"""The stored bytes are the source's own, and are still in the source."""
ENDS_IN_SOURCE = -2
"""The same, and only the ends of the file have been read."""

TRAILER = np.dtype(
    [
        ("magic", "S8"),
        ("plan", "S32"),
        ("unit", "<u8"),
        ("num_rows", "<u8"),
        ("spilled_bytes", "<u8"),
        ("bad_bytes", "<u8"),
        ("sums", "<i8", NUM_SUMS),
        ("digest", "S32"),
    ]
)
MAGIC = b"dp-part7"
MAX_BAD_BYTES = 64 << 20
PART_PREFIX = "unit-"
WHOLE_PREFIX = "whole-"
"""Suffix of a note that a unit's files must be read completely: one of them was not as expected when it was written."""


@dataclass(frozen=True)
class BadSampleReport:
    index: int
    key: str
    reason: str
    is_stored: bool = False
    """What could be decoded of it is in the beton."""

    def entry(self) -> dict[str, Any]:
        """For the manifest."""
        return {"index": self.index, "key": self.key, "reason": self.reason}


def part_name(unit_number: int) -> str:
    return f"{PART_PREFIX}{unit_number:06d}.part"


def whole_note(unit_number: int) -> str:
    return f"{WHOLE_PREFIX}{unit_number:06d}"


class PartWriter:
    """Takes the unit's samples, each once; `finish` writes rows and trailer. Holds one sample in memory."""

    def __init__(self, file: BinaryIO, plan_digest: str, unit: WorkUnit) -> None:
        self._file = file
        self._plan_digest = plan_digest
        self._unit = unit
        self._rows = np.zeros(len(unit), dtype=PART_ROW)
        self._spilled_bytes = 0
        self._bad: list[BadSampleReport] = []
        self._sums = np.zeros(NUM_SUMS, np.int64)

    def put(self, index: int, encoded: Encoded, label: int, content: bytes, *, spill: bool) -> None:
        """`spill`: store the bytes in the part; otherwise they are the source's own and will be read there again."""
        where = self._spilled_bytes if spill else IN_SOURCE
        shape = encoded.mode, encoded.untouched, encoded.is_rotated, encoded.width, encoded.height
        row = (*shape, label, len(encoded.data), sample_digest(encoded.data), where, content)
        self._rows[index - self._unit.start] = row
        if spill:
            self._file.write(encoded.data)
            self._spilled_bytes += len(encoded.data)

    def measure(self, encoded: Encoded) -> None:
        """Adds its pixels to the unit's sums."""
        self._sums += measure(Stored(encoded.data, encoded.mode, encoded.height, encoded.width))

    def put_left(self, indices: Sequence[int], labels: Sequence[int], left: Sequence[LeftInSource]) -> None:
        """Adds samples of whose files only the ends were read."""
        jpeg, is_untouched = layout.MODE_JPEG, True
        rows = [
            (
                *(jpeg, is_untouched, image.is_rotated, image.width, image.height, label),
                *(image.num_bytes, image.check, ENDS_IN_SOURCE, NO_CONTENT),
            )
            for image, label in zip(left, labels, strict=True)
        ]
        self._rows[np.subtract(indices, self._unit.start, dtype=np.int64)] = np.array(rows, dtype=PART_ROW)

    def put_bad(self, bad: BadSampleReport) -> None:
        self._bad.append(bad)

    def finish(self) -> None:
        rows = self._rows.tobytes()
        bad = json.dumps([asdict(b) for b in self._bad]).encode()
        trailer = np.zeros(1, dtype=TRAILER)
        trailer[0] = (
            MAGIC,
            self._plan_digest.encode(),
            self._unit.number,
            len(self._unit),
            self._spilled_bytes,
            len(bad),
            self._sums,
            _digest(rows, bad, self._sums.tobytes()),
        )
        for piece in (rows, bad, trailer.tobytes()):
            self._file.write(piece)


@dataclass(frozen=True)
class UnitPart:
    unit: WorkUnit
    rows: NDArray[np.void]
    bad: Sequence[BadSampleReport]
    """Also those of which something is stored."""
    sums: NDArray[np.int64]
    """The total of `statistics.measure` over those of its images that are measured."""


def read_part(output: Output, plan_digest: str, unit: WorkUnit) -> UnitPart:
    """A unit's part. Fault if it does not match its trailer; the images in it are checked when they are used."""
    name = part_name(unit.number)
    shown = f"{output.work_shown}/{name}"
    try:
        size, reader = output.size_of(name), output.reader(name)
        try:
            tail = reader.read_at(max(0, size - TRAILER.itemsize), TRAILER.itemsize)
            trailer = np.frombuffer(tail.ljust(TRAILER.itemsize, b"\0"), dtype=TRAILER)[0]
            start = min(int(trailer["spilled_bytes"]), size)
            rest = reader.read_at(start, max(0, size - TRAILER.itemsize - start))
        finally:
            reader.close()
    except OSError as error:
        raise Fault(f"{shown}: cannot be read: {error.strerror or error}") from None
    rows_bytes = len(unit) * PART_ROW.itemsize
    rows, bad = rest[:rows_bytes], rest[rows_bytes:]
    sums = trailer["sums"].astype(np.int64)
    expected = (MAGIC, plan_digest.encode(), unit.number, len(unit), len(bad), _digest(rows, bad, sums.tobytes()))
    found = tuple(trailer[name] for name in ("magic", "plan", "unit", "num_rows", "bad_bytes", "digest"))
    if found != expected or len(rows) != rows_bytes:
        raise Fault(f"{shown}: is damaged or of another conversion")
    try:
        reports = [BadSampleReport(**entry) for entry in parse(bad, max_bytes=MAX_BAD_BYTES)]
    except (ValueError, TypeError):
        raise Fault(f"{shown}: is damaged") from None
    return UnitPart(unit, np.frombuffer(rows, dtype=PART_ROW), reports, sums)


def _digest(*parts: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(b"".join(parts)).encode()
