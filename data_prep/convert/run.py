"""One conversion from beginning to end: read and encode the units, lay the beton out, write its ranges, publish.

Who does the work is the caller's choice (`pool.Pool`); every decision is made here, from the plan and the parts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.contents import CONTENT, CONTENTS
from data_prep.beton.digest import combine, digest_bytes
from data_prep.beton.manifest import Manifest, class_names_problem, describe_beton, require_size
from data_prep.beton.pages import BetonLayout, lay_out
from data_prep.beton.ranges import cut, num_ranges
from data_prep.beton.splits_beside import shared_samples
from data_prep.convert.ahead import placed_rows
from data_prep.convert.config import BadPolicy, ConvertSettings
from data_prep.convert.encode import encoder_versions
from data_prep.convert.means import Means
from data_prep.convert.open_output import open_output
from data_prep.convert.output import BAD_SAMPLES, MANIFEST, QUARANTINE, Output
from data_prep.convert.part import ENDS_IN_SOURCE, BadSampleReport
from data_prep.convert.place import PlaceJob, PlaceTask, RangeReport, place_range
from data_prep.convert.plan import Plan, make_plan
from data_prep.convert.pool import Pool, Progress
from data_prep.convert.reading import Found, read_all
from data_prep.convert.stop import StopFlag
from data_prep.errors import Fault, UserError
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
