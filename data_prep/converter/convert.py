"""One conversion from beginning to end: read and encode the units, lay the beton out, write its ranges, publish.

Who does the work is the caller's choice (`pool.Pool`); every decision is made here, from the plan and the parts alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.contents import CONTENT, CONTENTS
from data_prep.beton.digest import combine, digest_bytes
from data_prep.beton.layout import BetonLayout, lay_out
from data_prep.beton.manifest import Manifest, class_names_problem, describe_beton, require_size
from data_prep.beton.ranges import cut, num_ranges
from data_prep.beton.splits_beside import shared_samples
from data_prep.converter.context import Means, Pool, Progress
from data_prep.converter.encode import encoder_versions
from data_prep.converter.output import (
    BAD_SAMPLES,
    MANIFEST,
    QUARANTINE,
    Output,
    names_like,
    open_output,
    read_work_file,
)
from data_prep.converter.plan import (
    ENDS_IN_SOURCE,
    PART_PREFIX,
    WHOLE_PREFIX,
    BadSampleReport,
    Part,
    Plan,
    WorkUnit,
    make_plan,
    part_name,
    read_part,
    whole_note,
)
from data_prep.converter.read import EncodeJob, UnitReport, encode_unit
from data_prep.converter.settings import BadPolicy, ConvertSettings
from data_prep.converter.write import (
    NOTE_PREFIX,
    ImageChanged,
    PlaceJob,
    PlaceTask,
    RangeReport,
    WriteAhead,
    place_range,
    placed_rows,
)
from data_prep.errors import Fault, UserError
from data_prep.runtime.stop import StopFlag
from data_prep.shown import few, shown
from data_prep.sources.base import Source, facts_of

PUBLISHING = "publishing"
"""Of the work: from now on what stands under the final name may be ours, without its manifest."""


@dataclass(frozen=True)
class Outcome:
    manifest: Manifest
    already_done: bool
    """The beton stood there whole, from an earlier run: nothing was done."""
    num_units_taken_over: int
    """Work units that an earlier, interrupted run had finished."""
    warnings: tuple[str, ...] = ()
    """Of classes that lost all their images, and of samples that are in another split too."""
    num_turned: int = 0
    """Of the images that were stored now, those that carry an EXIF orientation."""


def convert(
    source: Source,
    settings: ConvertSettings,
    output: Output | Path,
    *,
    pool: Pool,
    progress: Progress,
    stop: StopFlag,
    bad_policy: BadPolicy = BadPolicy(),  # noqa: B008  # frozen
    reopen: Callable[[], Source] | None = None,
) -> Outcome:
    """Makes `output` and its manifest, or continues where an earlier run was stopped.

    `reopen` opens the source anew: before the beton gets its name, the source must still describe itself as at first.
    UserError: nothing to convert, too many bad samples (all listed in a file), something else under the output's name,
    another process at it. Fault: no room, no permission, a source that changed. Stopped: a signal came; the same call
    continues. In none of these is there a file under the output's name.
    """
    place = open_output(output) if isinstance(output, Path) else output
    if len(source) == 0:
        raise UserError(f"{source.describe().location}: holds no samples")
    if (problem := class_names_problem(source.class_names)) is not None:
        raise UserError(f"{source.describe().location}: {problem}; rename it")
    plan = make_plan(len(source), source.describe(), settings, encoder_versions())
    with _told_where(place):
        finished = _finished_before(place, plan, bad_policy)
        if finished is not None:
            place.remove_work()  # a run killed between the manifest and its end left it
            warnings = (*_emptied(source, finished), *shared_samples(place.shown, finished))
            return Outcome(finished, already_done=True, num_units_taken_over=0, warnings=warnings)
        with place.taken():
            means = Means(source, plan, place, pool, progress, stop)
            found = read_all(means, bad_policy)
            bad = [report for part in found.parts for report in part.bad]
            _judge(bad, plan, bad_policy, place)
            rows = np.concatenate([part.rows for part in found.parts])
            if not (rows["size"] > 0).any():
                place.write_text(BAD_SAMPLES, _as_table(bad))
                raise UserError(
                    f"{plan.source.location}: none of its images can be stored (first: {shown(bad[0].key)} "
                    f"{shown(bad[0].reason)}); all are listed in {place.name_of(BAD_SAMPLES)}"
                )
            if found.changed is not None:
                raise found.changed
            manifest = _write(means, rows, found, bad, reopen)
            place.remove_work()
    warnings = (*_emptied(source, manifest), *shared_samples(place.shown, manifest))
    turned = int(rows["has_turn"].sum())
    return Outcome(
        manifest, already_done=False, num_units_taken_over=found.num_taken_over, warnings=warnings, num_turned=turned
    )


@contextmanager
def _told_where(output: Output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Fault(
            f"{output.shown}: cannot be written: {error.strerror or error}; fix that, then run the same command again"
        ) from None


def _judge(bad: Sequence[BadSampleReport], plan: Plan, policy: BadPolicy, output: Output) -> None:
    """UserError when there are more bad samples than may be left out; they are all listed in a file."""
    output.write_text(BAD_SAMPLES, None)
    limit = policy.limit(plan.num_samples)
    if len(bad) <= limit:
        return
    output.write_text(BAD_SAMPLES, _as_table(bad))
    allowed = f", --max-bad {policy.max_bad} allows {limit:,}" if policy.on_error == "quarantine" else ""
    raise UserError(
        f"{plan.source.location}: {len(bad):,} of {plan.num_samples:,} images cannot be stored{allowed} (first: "
        f"{shown(bad[0].key)} {shown(bad[0].reason)}); no beton was written; all are listed in "
        f"{output.name_of(BAD_SAMPLES)}; fix or remove them, or leave them out with --on-error quarantine --max-bad N, "
        "then run the same command again"
    )


def _emptied(source: Source, manifest: Manifest) -> list[str]:
    """A line when classes had images, and all of them were bad."""
    if not manifest.quarantined:
        return []
    had = set(np.unique(source.labels).tolist())
    names = [
        name
        for label, (name, count) in enumerate(zip(manifest.class_names, manifest.class_counts, strict=True))
        if not count and label in had
    ]
    return [f"classes of which every image was bad, so that none is left: {few(names)}"] if names else []


def _as_table(bad: Sequence[BadSampleReport]) -> str:
    lines = [
        "index\tkey\treason",
        *(f"{b.index}\t{shown(b.key, None)}\t{shown(' '.join(b.reason.split()), None)}" for b in bad),
    ]
    return "\n".join(lines) + "\n"


def _write(
    means: Means,
    rows: NDArray[np.void],
    found: Found,
    bad: Sequence[BadSampleReport],
    reopen: Callable[[], Source] | None,
) -> Manifest:
    """Writes what is not written out of sight, then publishes beton, list of what was left out, and manifest."""
    plan, output = means.plan, means.output
    beton = lay_out(rows[rows["size"] > 0], plan.settings.page_bytes)
    tasks = _Tasks(beton, placed_rows(rows, 0), output.range_bytes(beton.total_bytes))
    ahead = tasks.matching(found.written)
    target = found.target
    if target is None or len(ahead) < len(found.written):  # then these ranges are not the beton's
        target, ahead = output.begin(plan.digest, is_new=found.is_new or bool(found.written)), {}
    output.make_room(target, beton.total_bytes)
    reports = _write_ranges(means, tasks, PlaceJob(means.source, output, target), ahead)
    contents = tasks.contents(rows["content"][rows["size"] > 0], reports).tobytes()
    if reopen is not None and means.reads_again and reopen().describe() != plan.source:
        raise Fault(
            f"{plan.source.location}: changed while it was being converted; no beton was written; run the same "
            "command again"
        )
    means.stop.check()
    output.require_taken()
    manifest = describe_beton(
        beton,
        combine([chunk for report in reports for chunk in report.written.chunks]),
        class_names=means.source.class_names,
        num_untouched=int(rows["untouched"].sum()),
        settings=plan.settings.as_dict(),
        source=asdict(plan.source),
        versions=plan.versions,
        quarantined=tuple(asdict(report) for report in bad),
        samples_digest=digest_bytes(contents),
    )
    text = manifest.to_json()
    output.write_text(QUARANTINE, _as_table(bad) if bad else None)
    output.write_bytes(CONTENTS, contents)
    output.write(PUBLISHING, b"")
    output.publish(target, [report.written.receipt for report in reports])
    output.write_text(MANIFEST, text)
    return manifest


class _Tasks(Sequence[PlaceTask]):
    """Cut when they are asked for: all at once would copy the tables of the whole beton."""

    def __init__(self, beton: BetonLayout, placed: NDArray[np.void], range_bytes: int | None) -> None:
        self.total_bytes = beton.total_bytes
        self._beton = beton
        self._placed = placed
        self._range_bytes = range_bytes

    def __len__(self) -> int:
        return num_ranges(self._beton, self._range_bytes)

    def __getitem__(self, number: int) -> PlaceTask:  # type: ignore[override]  # no slices
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = cut(self._beton, number, self._range_bytes)
        return PlaceTask(part, self._placed[part.samples])

    def contents(self, known: NDArray[np.void], reports: Sequence[RangeReport]) -> NDArray[np.void]:
        """Of all samples: those that are `known` from reading the units, and those that were read with the ranges."""
        contents = known.copy()
        for report in reports:
            if report.written.contents:
                task = self[report.number]
                here = np.flatnonzero(task.samples["spill"] == ENDS_IN_SOURCE)
                contents[task.range.samples.start + here] = np.frombuffer(report.written.contents, dtype=CONTENT)[here]
        return contents

    def matching(self, written: Mapping[str, RangeReport]) -> dict[int, RangeReport]:
        """By number, what was written of just these ranges."""
        return {
            report.number: report
            for digest, report in written.items()
            if report.number < len(self) and self[report.number].digest() == digest
        }


def _write_ranges(means: Means, tasks: _Tasks, job: PlaceJob, ahead: Mapping[int, RangeReport]) -> list[RangeReport]:
    """Those that are not written ahead. In the order of the ranges."""
    reports = dict(ahead)
    written_bytes = sum(report.num_bytes for report in reports.values())
    by_node: Counter[str] = Counter()
    for report in reports.values():
        by_node[report.node] += report.num_bytes
    missing = (tasks[number] for number in range(len(tasks)) if number not in ahead)
    with closing(means.pool.run(place_range, job, missing)) as running:
        for report in running:
            means.stop.check()
            reports[report.number] = report
            written_bytes += report.num_bytes
            by_node[report.node] += report.num_bytes
            means.progress.written(written_bytes, tasks.total_bytes, by_node)
    return [reports[number] for number in range(len(tasks))]


def _finished_before(output: Output, plan: Plan, policy: BadPolicy) -> Manifest | None:
    """The manifest, when the output stands whole and of this plan. UserError when something else has its name."""
    text, num_bytes = output.read_text(MANIFEST), output.num_bytes()
    if text is None:
        if num_bytes is not None and not (output.has_work() and PUBLISHING in output.names()):
            raise UserError(
                f"{output.shown}: exists without a manifest, so data-prep did not finish it; remove it first"
            )
        return None
    manifest = Manifest.from_json(text, output.name_of(MANIFEST))
    require_size(output.shown, num_bytes, manifest)
    if facts_of(manifest.source) != facts_of(asdict(plan.source)) or not plan.settings.made(manifest.settings):
        raise UserError(
            f"{output.shown}: exists and was made from another source or with other settings (see its manifest); "
            "remove it or choose another --output"
        )
    if len(manifest.quarantined) > policy.limit(plan.num_samples):
        raise UserError(
            f"{output.shown}: exists and leaves out {len(manifest.quarantined):,} bad samples, more than asked for "
            "now; remove it, or use the --on-error and --max-bad that it was made with"
        )
    return manifest


# The first pass of a conversion: all units are read, and what of the beton is complete is written on the way.


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


# What an earlier, interrupted run of the same plan left: the parts that are whole.


PLAN_NAME = "plan"


def finished_parts(output: Output, plan: Plan, note: Callable[[str], object]) -> list[Part]:
    """The units that an earlier run finished; parts and notes of another plan are removed, which `note` is told."""
    before = read_work_file(output, PLAN_NAME)
    if before != plan.digest.encode():
        if before is not None:
            note("an unfinished conversion with other settings or files, or of another version, begins again")
        for stale in names_like(output, PART_PREFIX, NOTE_PREFIX, WHOLE_PREFIX):
            output.remove(stale)
        output.write(PLAN_NAME, plan.digest.encode())
    names = output.names()
    found = (whole_part(output, plan, unit) for unit in plan.units if part_name(unit.number) in names)
    return [part for part in found if part is not None]


def whole_part(output: Output, plan: Plan, unit: WorkUnit) -> Part | None:
    """None when it is not there, or not whole."""
    try:
        return read_part(output, plan.digest, unit)
    except Fault:
        return None


def is_part_there(output: Output, unit: WorkUnit) -> bool:
    try:
        return output.size_of(part_name(unit.number)) > 0
    except FileNotFoundError:
        return False
