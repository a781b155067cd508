"""The first pass of a conversion: all units are read, and what of the beton is complete is written on the way.

So a file's bytes are still in memory when they are copied, however large the data set, and reading waits for a disk
while writing waits for another.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from data_prep.convert.ahead import WriteAhead
from data_prep.convert.config import BadPolicy
from data_prep.convert.means import Means
from data_prep.convert.part import Part, part_name, whole_note
from data_prep.convert.place import ImageChanged, PlaceJob, PlaceTask, RangeReport, place_range
from data_prep.convert.plan import WorkUnit
from data_prep.convert.taken_over import finished_parts, is_part_there, whole_part
from data_prep.convert.unit import EncodeJob, UnitReport, encode_unit
from data_prep.errors import Fault, UserError


@dataclass(frozen=True)
class Found:
    parts: list[Part]
    num_taken_over: int
    """Units that an earlier run had finished."""
    written: Mapping[str, RangeReport]
    """Ranges that are written already, by `PlaceTask.digest`."""
    target: str | None
    """What they are written to."""
    is_new: bool
    """Other samples may be bad than in an earlier run, so that its ranges lie elsewhere."""
    changed: ImageChanged | None
    """What the first range that could not be written for that says."""


@dataclass(frozen=True)
class _Job:
    encode: EncodeJob
    place: PlaceJob | None


def read_or_place(job: _Job, item: object) -> UnitReport | RangeReport | ImageChanged:
    if isinstance(item, WorkUnit):
        return encode_unit(job.encode, item)
    assert isinstance(item, PlaceTask)
    assert job.place is not None
    try:
        return place_range(job.place, item)
    except ImageChanged as error:  # there will be no beton, but all bad samples are listed first
        return error


def read_all(means: Means, policy: BadPolicy) -> Found:
    """Leaves every part whole in the work."""
    plan, output = means.plan, means.output
    before = finished_parts(output, plan, means.progress.note)
    # What was bad may have been mended, or could not be read for a passing reason.
    finished = [part for part in before if policy.on_error == "quarantine" or not part.bad]
    is_new = len(finished) < len(before) or _is_one_read_anew(means, finished)
    target, ahead = _write_ahead(means, is_new=is_new)
    reading = _Reading(means, policy.limit(plan.num_samples), finished, ahead)
    place = PlaceJob(means.source, output, target) if target is not None else None
    encode = EncodeJob(means.source, plan.settings, plan.digest, output, means.reads_again, plan.versions)
    with closing(means.pool.run(read_or_place, _Job(encode, place), reading.items())) as reports:
        for report in reports:
            means.stop.check()
            reading.take(report)
    return Found(reading.parts, len(finished), reading.written, target, is_new, reading.changed)


def _is_one_read_anew(means: Means, finished: list[Part]) -> bool:
    """Because something was wrong with a file when it was to be written."""
    names, numbers = means.output.names(), {part.unit.number for part in finished}
    return any(unit.number not in numbers and whole_note(unit.number) in names for unit in means.plan.units)


def _write_ahead(means: Means, *, is_new: bool) -> tuple[str | None, WriteAhead | None]:
    """What to write to, and which ranges. None where it is not known how much room there must be, or there is too
    little: that is told when it is known."""
    output, sizes, settings = means.output, means.source.sizes, means.plan.settings
    range_bytes = output.range_bytes(None)
    if range_bytes is None or sizes is None or settings.encode != "original":
        return None, None
    target = output.begin(means.plan.digest, is_new=is_new)
    if not output.has_room(target, 2 * int(sizes.sum())):  # images that are encoded anew lie in the parts, too
        return target, None
    return target, WriteAhead(means.plan.num_samples, settings.page_bytes, range_bytes)


@dataclass
class _Reading:
    """What there is to do next, as it depends on what was found so far."""

    means: Means
    limit: int
    """Of bad samples: with more of them there will be no beton."""
    finished: list[Part]
    ahead: WriteAhead | None
    parts: list[Part] = field(default_factory=list)
    """Of the units in order, as far as all before them are there."""
    written: dict[str, RangeReport] = field(default_factory=dict)
    changed: ImageChanged | None = None

    def __post_init__(self) -> None:
        self._there = {part.unit.number: part for part in self.finished}
        self._missing = deque(unit for unit in self.means.plan.units if unit.number not in self._there)
        self._num_reading = 0
        self._complete: deque[PlaceTask] = deque()
        self._samples = sum(len(part.unit) for part in self.finished)
        self._num_bad = sum(len(part.bad) for part in self.finished)
        self._source_bytes = 0
        self._written_bytes = 0
        self._read_by: Counter[str] = Counter()
        self._written_by: Counter[str] = Counter()
        total = self.means.plan.num_samples
        if self.finished:
            self.means.progress.note(f"continuing: {self._samples:,} of {total:,} images were read by an earlier run")
        self._show_read()
        self._advance()

    def items(self) -> Iterator[WorkUnit | PlaceTask | None]:
        while True:
            if self._complete:  # first, for their files are in memory now
                yield self._complete.popleft()
            elif self._missing:
                self._num_reading += 1
                yield self._missing.popleft()
            elif self._num_reading:
                yield None
            else:
                return

    def take(self, report: UnitReport | RangeReport | ImageChanged) -> None:
        if isinstance(report, ImageChanged):
            self.changed = self.changed or report
            return  # the other ranges may tell of more
        if isinstance(report, RangeReport):
            self.written[report.digest] = report
            self._written_bytes += report.num_bytes
            self._written_by[report.node] += report.num_bytes
            self.means.progress.written(self._written_bytes, None, self._written_by)
            return
        self._num_reading -= 1
        self._there[report.unit.number] = self._part(report.unit)
        self._samples += len(report.unit)
        self._source_bytes += report.source_bytes
        self._num_bad += report.num_bad
        self._read_by[report.node] += len(report.unit)
        self._show_read()
        self._advance()

    def _part(self, unit: WorkUnit) -> Part:
        output = self.means.output
        if not is_part_there(output, unit):
            raise UserError(
                f"{output.work_shown}: a worker wrote there, but this machine does not see it; choose an --output on "
                "storage that all nodes of the cluster share"
            )
        part = whole_part(output, self.means.plan, unit)
        if part is None:
            output.remove(part_name(unit.number))
            raise Fault(f"{output.work_shown}: the part of {unit} was damaged; run the same command again to redo it")
        return part

    def _advance(self) -> None:
        """Takes the parts that are next in order, and notes which ranges are complete with them."""
        while (part := self._there.pop(len(self.parts), None)) is not None:
            self.parts.append(part)
            if self.ahead is not None:
                self._complete.extend(self.ahead.add(part))
        if self._num_bad > self.limit:  # there will be no beton
            self.ahead = None
            self._complete.clear()

    def _show_read(self) -> None:
        self.means.progress.encoded(
            self._samples, self.means.plan.num_samples, self._source_bytes, self._num_bad, self._read_by
        )
