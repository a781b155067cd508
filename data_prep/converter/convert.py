"""A conversion from beginning to end: read the units, write each range once its images are known, name the beton.

Whichever pool does the work (`context.Pool`), all decisions are made here, from the plan and the parts alone.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.contents import CONTENT, CONTENTS, shared_samples
from data_prep.beton.digest import combine, digest_bytes
from data_prep.beton.files import cannot_be_written
from data_prep.beton.layout import lay_out
from data_prep.beton.manifest import MANIFEST, Manifest, class_names_problem, describe_beton, require_size
from data_prep.beton.paths import PATHS, pack_paths
from data_prep.beton.statistics import statistics_of
from data_prep.converter.context import Pool, Progress, ThisProcess
from data_prep.converter.encode import encoder_versions
from data_prep.converter.output import (
    BAD_SAMPLES,
    QUARANTINE,
    SALVAGED,
    Output,
    open_output,
    read_work_file,
)
from data_prep.converter.plan import (
    ENDS_IN_SOURCE,
    PART_PREFIX,
    WHOLE_PREFIX,
    BadSampleReport,
    ConversionPlan,
    Job,
    UnitPart,
    WorkUnit,
    make_plan,
    part_name,
    read_part,
    whole_note,
)
from data_prep.converter.read import UnitReport, read_unit
from data_prep.converter.settings import BadPolicy, ConvertSettings
from data_prep.converter.source import class_notes, open_named
from data_prep.converter.write import (
    NOTE_PREFIX,
    AllRanges,
    EarlyRanges,
    ImageChanged,
    RangeReport,
    WriteTask,
    write_rows,
    write_task,
)
from data_prep.errors import Fault, UserError
from data_prep.runtime.environment import cluster_address, given_address
from data_prep.runtime.stop import StopFlag
from data_prep.shown import few, shown
from data_prep.sources.base import NO_OPTIONS, Source, SourceOptions, facts_of
from data_prep.sources.splits import requested_split

PLAN_NAME = "plan"
"""A file in the work folder: the digest of the plan that the work belongs to."""
PUBLISHING = "publishing"
"""A file in the work folder: from now on a beton without a manifest may be this conversion's."""


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`."""

    path: str
    """Path or URL of the beton."""
    manifest: Manifest
    already_done: bool
    """The beton was already complete, from an earlier run: nothing was done."""
    source: Source
    num_units_resumed: int = 0
    """Units of work that an earlier, interrupted run had finished."""
    num_rotated: int = 0
    """Number of stored images with an EXIF orientation."""
    notes: tuple[str, ...] = ()
    """How the source was understood, and which splits beside the output have other classes."""
    warnings: tuple[str, ...] = ()
    """Warnings about classes that lost all their images, and about samples that are in another split too."""


def convert(
    source: str | Source,
    output: str | Path,
    *,
    input: str | None = None,
    split: str | None = None,
    options: SourceOptions = NO_OPTIONS,
    classes: str | None = None,
    skip_unlisted: bool = False,
    settings: ConvertSettings = ConvertSettings(),  # noqa: B008 - frozen
    bad_policy: BadPolicy = BadPolicy(),  # noqa: B008 - frozen
    workers: int | Pool | None = 0,
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> ConvertReport:
    """Makes a beton and its manifest, or resumes where an earlier run was stopped.

    The bytes are the same whatever the number of workers and of interruptions. The beton gets its name when it is
    complete; after an exception there is no file of that name.

    >>> import data_prep, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outcome = data_prep.convert("synthetic", f"{folder}/train.beton", input="n=5,size=32..64")
    >>> outcome.manifest.num_samples, outcome.manifest.mode_counts["jpeg"]
    (5, 5)

    Args:
        source: a kind of source (`image-folder`, `ilsvrc`, `digits`, ...), which the next five arguments describe, or
            an open one. A kind is listed again before the beton gets its name: it must not have changed.
        output: `FILE.beton`, or `s3://bucket/name.beton`.
        input: the folder, file, glob or URL to read.
        split: the split to read; `all`: everything. None: the one in the output's name (`train.beton`).
        options: options that only some sources have.
        classes: a file with a class name per line, or a beton: exactly these classes, in this order.
        skip_unlisted: leave out images of other classes; otherwise they are an error.
        settings: how images are stored.
        bad_policy: what to do about samples that cannot be stored.
        workers: Ray tasks at a time, on the cluster of RAY_ADDRESS or a local Ray; None: one per CPU. 0: no Ray, in
            this process. Or a pool of the caller's.
        progress: shows how far it is.
        stop: checked between pieces of work.

    Raises:
        UserError: there is nothing to convert; too many samples are bad (all are listed in a file beside the output);
            the output's name is taken, or another process is writing it; the training set beside it has other classes.
        Fault: no space, no permission, a source that changed.
        Interrupted: `stop` was set; the same call resumes.
    """
    progress, stop = progress or Progress(), stop or StopFlag()
    place = open_output(output)
    reopen: Callable[[], Source] | None = None
    if isinstance(source, str):
        request = requested_split(split, Path(output))
        reopen = partial(open_named, source, input, request, options, classes, skip_unlisted=skip_unlisted)
        source = reopen()
    with open_pool(workers, progress, stop) as pool:
        return convert_opened(
            source, place, reopen, pool, settings=settings, bad_policy=bad_policy, progress=progress, stop=stop
        )


def convert_opened(
    source: Source,
    place: Output,
    reopen: Callable[[], Source] | None,
    pool: Pool,
    *,
    settings: ConvertSettings,
    bad_policy: BadPolicy,
    progress: Progress,
    stop: StopFlag,
) -> ConvertReport:
    """As `convert`. `reopen`: lists the source again before the beton gets its name."""
    if len(source) == 0:
        raise UserError(f"{source.description.location}: holds no samples")
    if (problem := class_names_problem(source.class_names)) is not None:
        raise UserError(f"{source.description.location}: {problem}; rename it")
    notes = (*source.notes, *class_notes(source.class_names, place))
    for note in notes:
        progress.log(shown(f"note: {note}", None))
    settings = replace(settings, salvage=settings.salvage or bad_policy.on_error == "reencode")
    plan = make_plan(len(source), source.description, settings, encoder_versions())
    with cannot_be_written(place.shown):
        finished = _finished_before(place, plan, bad_policy)
        resumed = rotated = 0
        if finished is not None:
            place.remove_work()  # left by a run that was killed after it wrote the manifest
            manifest = finished if finished.paths_digest else _with_paths(finished, source, place)
        else:
            with place.owned():
                conversion = _Conversion(source, plan, place, bad_policy, progress)
                with closing(pool.run(do_item, conversion.job, conversion.items())) as reports:
                    for report in reports:
                        stop.check()
                        conversion.take(report)
                manifest = conversion.finish(reopen, stop)
                place.remove_work()
            resumed, rotated = conversion.num_resumed, conversion.num_rotated
    return ConvertReport(
        path=place.shown,
        manifest=manifest,
        already_done=finished is not None,
        source=source,
        num_units_resumed=resumed,
        num_rotated=rotated,
        notes=notes,
        warnings=(*_emptied(source, manifest), *shared_samples(place.shown, manifest)),
    )


def open_pool(workers: int | Pool | None, progress: Progress, stop: StopFlag) -> Pool:
    """The pool that `convert`'s argument means, to be entered."""
    if workers == 0:
        return ThisProcess(stop)
    if workers is not None and not isinstance(workers, int):
        return workers
    from data_prep.converter.ray_pool import RayPool

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return RayPool(workers, cluster_address(*given_address(None, os.environ)), progress, stop)


def _finished_before(output: Output, plan: ConversionPlan, policy: BadPolicy) -> Manifest | None:
    """The manifest, if the output is complete and belongs to this plan. UserError if its name is taken."""
    text, num_bytes = output.read_text(MANIFEST), output.num_bytes()
    if text is None:
        if num_bytes is not None and PUBLISHING not in output.names():
            raise UserError(
                f"{output.shown}: exists without a manifest, so data-prep did not finish it; remove it first"
            )
        return None
    manifest = Manifest.from_json(text, output.name_of(MANIFEST))
    require_size(output.shown, num_bytes, manifest)
    settings = plan.settings
    if not manifest.quarantined and not manifest.salvaged:  # nothing was damaged, so it does not matter
        settings = replace(settings, salvage=manifest.settings.get("salvage", False))
    if facts_of(manifest.source) != facts_of(asdict(plan.source)) or not settings.made(manifest.settings):
        raise UserError(
            f"{output.shown}: exists and was made from another source or with other settings (see its manifest); "
            "remove it or choose another --output"
        )
    if len(manifest.quarantined) > policy.limit(plan.num_samples):
        raise UserError(
            f"{output.shown}: exists and leaves out {len(manifest.quarantined):,} bad samples, more than allowed "
            "now; remove it, or use the --on-error and --max-bad that it was made with"
        )
    return manifest


def _with_paths(finished: Manifest, source: Source, output: Output) -> Manifest:
    """Adds the source paths to a beton of an earlier version, which did not write them."""
    left_out = {entry["index"] for entry in finished.quarantined}
    packed, digest = pack_paths(source.key(index) for index in range(len(source)) if index not in left_out)
    manifest = replace(finished, paths_digest=digest)
    output.write_bytes(PATHS, packed)
    output.write_text(MANIFEST, manifest.to_json())
    return manifest


def _emptied(source: Source, manifest: Manifest) -> list[str]:
    """A warning if all images of some classes were bad."""
    if not manifest.quarantined:
        return []
    had = set(np.unique(source.labels).tolist())
    names = [
        name
        for label, (name, count) in enumerate(zip(manifest.class_names, manifest.class_counts, strict=True))
        if not count and label in had
    ]
    return [f"classes of which every image was bad, so that none is left: {few(names)}"] if names else []


def do_item(job: Job, item: object) -> UnitReport | RangeReport | ImageChanged:
    """Does one piece of work, in a worker."""
    if isinstance(item, WorkUnit):
        return read_unit(job, item)
    assert isinstance(item, WriteTask)
    try:
        return write_task(job, item)
    except ImageChanged as error:  # returned: there will be no beton, but the driver lists all bad samples first
        return error


class _Conversion:
    """Decides what to do next, from the results so far.

    Units are read in any order; their parts are taken in order, and a range is written as soon as its images are known.
    When all is read, bad samples are judged, the beton is laid out, and the ranges that are missing are written.
    """

    def __init__(
        self, source: Source, plan: ConversionPlan, output: Output, policy: BadPolicy, progress: Progress
    ) -> None:
        # Other data than files would be made or fetched again at each read, so their bytes go into the parts.
        reads_again = Path(plan.source.location).is_absolute()
        self.job = Job(source, plan.settings, plan.digest, output, plan.versions, reads_again)
        self._plan, self._output, self._policy, self._progress = plan, output, policy, progress

        before = _finished_parts(output, plan, progress.log)
        # Bad samples may be repaired by now, or could not be read for a temporary reason.
        kept = [part for part in before if policy.on_error != "fail" or not part.bad]
        names = output.names()
        self._found = {part.unit.number: part for part in kept}
        self._missing = deque(unit for unit in plan.units if unit.number not in self._found)
        # Other samples may be bad now. Then ranges of an earlier run, or of its orphaned workers, have other bytes.
        self._is_new = len(kept) < len(before) or any(whole_note(unit.number) in names for unit in self._missing)
        self.num_resumed = len(kept)

        self._parts: list[UnitPart] = []  # in order, up to the first unit that is not read yet
        self._target: str | None = None
        self._early = self._early_ranges()
        self._complete: deque[WriteTask] = deque()
        self._ranges: AllRanges | None = None
        self._reports: dict[int, RangeReport] = {}  # by range number
        self._changed: ImageChanged | None = None
        self._num_running = 0

        self._samples_read = sum(len(part.unit) for part in kept)
        self._num_bad = len(_left_out(kept))
        self._source_bytes = self._written_bytes = 0
        self._read_by: Counter[str] = Counter()
        self._written_by: Counter[str] = Counter()
        if kept:
            progress.log(f"resuming: {self._samples_read:,} of {plan.num_samples:,} images were read by an earlier run")
        self._show_read()
        self._advance()

    @property
    def num_rotated(self) -> int:
        return int(sum(part.rows["is_rotated"].sum() for part in self._parts))

    def _early_ranges(self) -> EarlyRanges | None:
        """None if the space needed is not known, or there is too little: then everything is read first."""
        sizes, settings, range_bytes = self.job.source.sizes, self._plan.settings, self._output.range_bytes(None)
        if range_bytes is None or sizes is None or settings.encode != "original":
            return None
        self._target = self._output.begin(self._plan.digest, is_new=self._is_new)
        if not self._output.has_space(self._target, 2 * int(sizes.sum())):  # encoded images are also in the parts
            return None
        return EarlyRanges(self._target, self._plan.num_samples, settings.page_bytes, range_bytes)

    def items(self) -> Iterator[WorkUnit | WriteTask | None]:
        """Units to read and ranges to write, for `Pool.run`."""
        for item in chain(self._items_to_read(), self._items_to_write()):
            self._num_running += item is not None
            yield item

    def _items_to_read(self) -> Iterator[WorkUnit | WriteTask | None]:
        while self._complete or self._missing or self._num_running:
            if self._complete:  # first: their files are still in memory
                yield self._complete.popleft()
            else:
                yield self._missing.popleft() if self._missing else None

    def _items_to_write(self) -> Iterator[WriteTask]:
        """The ranges that were not written while units were read."""
        rows = self._judged_rows()
        beton = lay_out(rows[rows["size"] > 0], self._plan.settings.page_bytes)
        is_moved = self._early is not None and self._early.pages_start != beton.pages_start
        if is_moved:  # with the samples left out, the tables need one page less: all images move
            self._reports.clear()
            self._written_bytes = 0
            self._written_by.clear()
        if self._target is None or is_moved:
            self._target = self._output.begin(self._plan.digest, is_new=self._is_new or is_moved)
        self._output.reserve(self._target, beton.total_bytes)
        range_bytes = self._output.range_bytes(beton.total_bytes)
        assert range_bytes is not None
        self._ranges = AllRanges(self._target, beton, write_rows(rows, 0), range_bytes)
        for number in range(len(self._ranges)):
            if number not in self._reports:
                yield self._ranges.task(number)

    def take(self, report: UnitReport | RangeReport | ImageChanged) -> None:
        self._num_running -= 1
        if isinstance(report, ImageChanged):
            if self._ranges is not None:
                raise report
            self._changed = self._changed or report  # reported when all bad samples are listed
        elif isinstance(report, RangeReport):
            self._reports[report.number] = report
            self._written_bytes += report.num_bytes
            self._written_by[report.node] += report.num_bytes
            total = None if self._ranges is None else self._ranges.beton.total_bytes
            self._progress.written(self._written_bytes, total, self._written_by)
        else:
            self._found[report.unit.number] = self._part(report.unit)
            self._samples_read += len(report.unit)
            self._source_bytes += report.source_bytes
            self._num_bad += report.num_bad
            self._read_by[report.node] += len(report.unit)
            self._show_read()
            self._advance()

    def _part(self, unit: WorkUnit) -> UnitPart:
        output, name = self._output, part_name(unit.number)
        try:
            is_there = output.size_of(name) > 0
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise UserError(
                f"{output.work_shown}: a worker wrote there, but this machine does not see it; choose an --output on "
                "storage that all nodes of the cluster share"
            )
        part = _whole_part(output, self._plan, unit)
        if part is None:
            output.remove(name)
            raise Fault(f"{output.work_shown}: the part of {unit} was damaged; run the same command again to redo it")
        return part

    def _advance(self) -> None:
        """Takes the parts that are next in order, and queues the ranges that they complete."""
        while (part := self._found.pop(len(self._parts), None)) is not None:
            self._parts.append(part)
            if self._early is not None:
                self._complete.extend(self._early.add(part))
        if self._num_bad > self._policy.limit(self._plan.num_samples):  # there will be no beton
            self._early = None
            self._complete.clear()

    def _show_read(self) -> None:
        total = self._plan.num_samples
        self._progress.encoded(self._samples_read, total, self._source_bytes, self._num_bad, self._read_by)

    def _judged_rows(self) -> NDArray[np.void]:
        """The `PART_ROW`s of all samples. UserError if too many are bad, which are then listed in a file; ImageChanged
        if one changed while ranges were written."""
        plan, output, policy, bad = self._plan, self._output, self._policy, _left_out(self._parts)
        limit = policy.limit(plan.num_samples)
        rows = np.concatenate([part.rows for part in self._parts])
        is_refused, is_empty = len(bad) > limit, not (rows["size"] > 0).any()
        output.write_text(BAD_SAMPLES, _as_table(bad) if is_refused or is_empty else None)
        if is_refused:
            allowed = f", --max-bad {policy.max_bad} allows {limit:,}" if policy.on_error != "fail" else ""
            raise UserError(
                f"{plan.source.location}: {len(bad):,} of {plan.num_samples:,} images cannot be stored{allowed} "
                f"(first: {shown(bad[0].key)} {shown(bad[0].reason)}); no beton was written; all are listed in "
                f"{output.name_of(BAD_SAMPLES)}; fix or remove them, or leave them out with --on-error quarantine "
                "--max-bad N, or keep what decodes of damaged JPEGs with --on-error reencode, then run the same "
                "command again"
            )
        if is_empty:
            raise UserError(
                f"{plan.source.location}: none of its images can be stored (first: {shown(bad[0].key)} "
                f"{shown(bad[0].reason)}); all are listed in {output.name_of(BAD_SAMPLES)}"
            )
        if self._changed is not None:
            raise self._changed
        return rows

    def finish(self, reopen: Callable[[], Source] | None, stop: StopFlag) -> Manifest:
        """Gives the beton, the list of what was left out, and the manifest their names, the manifest last."""
        plan, output, ranges, target = self._plan, self._output, self._ranges, self._target
        assert ranges is not None
        assert target is not None
        reports = [self._reports[number] for number in range(len(ranges))]
        contents = self._contents(ranges, reports).tobytes()
        if reopen is not None and self.job.reads_again and reopen().description != plan.source:
            raise Fault(
                f"{plan.source.location}: changed while it was being converted; no beton was written; run the same "
                "command again"
            )
        stop.check()
        output.require_owned()
        left_out = _left_out(self._parts)
        salvaged = [report for part in self._parts for report in part.bad if report.is_stored]
        is_stored = np.concatenate([part.rows["size"] > 0 for part in self._parts])
        paths, paths_digest = pack_paths(map(self.job.source.key, np.flatnonzero(is_stored).tolist()))
        manifest = describe_beton(
            ranges.beton,
            combine([chunk for report in reports for chunk in report.written.chunks]),
            class_names=self.job.source.class_names,
            num_untouched=int(sum(part.rows["untouched"].sum() for part in self._parts)),
            settings=plan.settings.as_dict(),
            source=asdict(plan.source),
            versions=plan.versions,
            quarantined=tuple(report.entry() for report in left_out),
            salvaged=tuple(report.entry() for report in salvaged),
            samples_digest=digest_bytes(contents),
            paths_digest=paths_digest,
            statistics=statistics_of(np.sum([part.sums for part in self._parts], axis=0)),
        )
        text = manifest.to_json()
        output.write_text(QUARANTINE, _as_table(left_out) if left_out else None)
        output.write_text(SALVAGED, _as_table(salvaged) if salvaged else None)
        output.write_bytes(CONTENTS, contents)
        output.write_bytes(PATHS, paths)
        output.write(PUBLISHING, b"")
        output.complete(target, [report.written.receipt for report in reports])
        output.write_text(MANIFEST, text)
        return manifest

    def _contents(self, ranges: AllRanges, reports: Sequence[RangeReport]) -> NDArray[np.void]:
        """The digest of each stored sample's file: from its unit, or from its range if it was first read there."""
        contents = np.concatenate([part.rows["content"][part.rows["size"] > 0] for part in self._parts])
        for report in reports:
            if report.written.contents:
                task = ranges.task(report.number)
                here = np.flatnonzero(task.samples["spill"] == ENDS_IN_SOURCE)
                contents[task.range.samples.start + here] = np.frombuffer(report.written.contents, dtype=CONTENT)[here]
        return contents


def _left_out(parts: Sequence[UnitPart]) -> list[BadSampleReport]:
    return [report for part in parts for report in part.bad if not report.is_stored]


def _as_table(bad: Sequence[BadSampleReport]) -> str:
    lines = [
        "index\tkey\treason",
        *(f"{b.index}\t{shown(b.key, None)}\t{shown(' '.join(b.reason.split()), None)}" for b in bad),
    ]
    return "\n".join(lines) + "\n"


def _finished_parts(output: Output, plan: ConversionPlan, note: Callable[[str], object]) -> list[UnitPart]:
    """The units that an earlier run finished. Parts and notes of another plan are removed, with a line to `note`."""
    before = read_work_file(output, PLAN_NAME)
    if before != plan.digest.encode():
        if before is not None:
            note("an unfinished conversion with other settings or files, or of another version, begins again")
        for name in sorted(output.names()):
            if name.startswith((PART_PREFIX, NOTE_PREFIX, WHOLE_PREFIX)):
                output.remove(name)
        output.write(PLAN_NAME, plan.digest.encode())
    names = output.names()
    found = (_whole_part(output, plan, unit) for unit in plan.units if part_name(unit.number) in names)
    return [part for part in found if part is not None]


def _whole_part(output: Output, plan: ConversionPlan, unit: WorkUnit) -> UnitPart | None:
    """None if it is missing or incomplete."""
    try:
        return read_part(output, plan.digest, unit)
    except Fault:
        return None
