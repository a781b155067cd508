"""One conversion from beginning to end: read and encode the units, lay the beton out, write its ranges, publish.

Who does the work is the caller's choice (`pool.Pool`); every decision is made here, from the plan and the parts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.digest import combine
from data_prep.beton.manifest import Manifest, describe_beton, require_size
from data_prep.beton.pages import BetonLayout, lay_out
from data_prep.beton.ranges import cut, num_ranges
from data_prep.convert.config import BadPolicy, ConvertSettings
from data_prep.convert.encode import encoder_versions
from data_prep.convert.open_output import open_output
from data_prep.convert.output import BAD_SAMPLES, MANIFEST, QUARANTINE, Output, Written
from data_prep.convert.part import BadSampleReport, Part, part_name
from data_prep.convert.place import PLACED_ROW, PlaceJob, PlaceTask, place_range
from data_prep.convert.plan import Plan, make_plan
from data_prep.convert.pool import Pool
from data_prep.convert.progress import Progress
from data_prep.convert.stop import StopFlag
from data_prep.convert.taken_over import finished_parts, is_part_there, whole_part
from data_prep.convert.unit import EncodeJob, encode_unit
from data_prep.errors import Fault, UserError
from data_prep.sources.base import Source, digest_of

PUBLISHING = "publishing"
"""Of the work: from now on what stands under the final name may be ours, without its manifest."""


@dataclass(frozen=True)
class Outcome:
    manifest: Manifest
    already_done: bool
    """The beton stood there whole, from an earlier run: nothing was done."""
    num_units_taken_over: int
    """Work units that an earlier, interrupted run had finished."""


@dataclass(frozen=True)
class _Means:
    """What every step needs."""

    source: Source
    plan: Plan
    output: Output
    pool: Pool
    progress: Progress
    stop: StopFlag


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
    plan = make_plan(len(source), source.describe(), settings, encoder_versions())
    with _told_where(place):
        finished = _finished_before(place, plan, bad_policy)
        if finished is not None:
            place.remove_work()  # a run killed between the manifest and its end left it
            return Outcome(finished, already_done=True, num_units_taken_over=0)
        with place.taken():
            means = _Means(source, plan, place, pool, progress, stop)
            taken_over = _encode_all(means, bad_policy)
            parts = _parts(means)
            bad = [report for part in parts for report in part.bad]
            _judge(bad, plan, bad_policy, place)
            rows = np.concatenate([part.rows for part in parts])
            stored = rows["size"] > 0
            if not stored.any():
                raise UserError(f"{plan.source.location}: none of its images can be stored")
            beton = lay_out(rows[stored], settings.page_bytes)
            manifest = _write(means, beton, _placed(rows, stored), bad, int(rows["untouched"].sum()), reopen)
            place.remove_work()
    return Outcome(manifest, already_done=False, num_units_taken_over=taken_over)


@contextmanager
def _told_where(output: Output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Fault(
            f"{output.shown}: cannot be written: {error.strerror or error}; mend that, then run the same command again"
        ) from None


def _encode_all(means: _Means, bad_policy: BadPolicy) -> int:
    """Leaves every part whole in the work folder. Returns how many were there before."""
    plan, output, progress = means.plan, means.output, means.progress
    finished = finished_parts(output, plan)
    if bad_policy.on_error == "fail":  # what was bad may have been mended, or could not be read for a passing reason
        finished = [part for part in finished if not part.bad]
    samples = sum(len(part.unit) for part in finished)
    if finished:
        progress.note(f"continuing: {samples:,} of {plan.num_samples:,} images were read by an earlier run")
    num_bad = sum(len(part.bad) for part in finished)
    source_bytes = 0
    by_node: Counter[str] = Counter()
    progress.encoded(samples, plan.num_samples, 0, num_bad, by_node)
    numbers = {part.unit.number for part in finished}
    missing = [unit for unit in plan.units if unit.number not in numbers]
    job = EncodeJob(means.source, plan.settings, plan.digest, output, _is_on_a_file_system(plan), plan.versions)
    with closing(means.pool.run(encode_unit, job, missing)) as reports:
        for report in reports:
            means.stop.check()
            if not is_part_there(output, report.unit):
                raise UserError(
                    f"{output.work_shown}: a worker wrote there, but this machine does not see it; choose an --output "
                    "on storage that all nodes of the cluster share"
                )
            samples += len(report.unit)
            source_bytes += report.source_bytes
            num_bad += report.num_bad
            by_node[report.node] += len(report.unit)
            progress.encoded(samples, plan.num_samples, source_bytes, num_bad, by_node)
    return len(finished)


def _parts(means: _Means) -> list[Part]:
    parts = []
    for unit in means.plan.units:
        part = whole_part(means.output, means.plan, unit)
        if part is None:
            means.output.remove(part_name(unit.number))
            raise Fault(
                f"{means.output.work_shown}: the part of {unit} was damaged; run the same command again to redo it"
            )
        parts.append(part)
    return parts


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
        f"{bad[0].key} {bad[0].reason}); no beton was written; all are listed in {output.name_of(BAD_SAMPLES)}; mend "
        "or remove them, or leave them out with --on-error quarantine --max-bad N, then run the same command again"
    )


def _as_table(bad: Sequence[BadSampleReport]) -> str:
    lines = ["index\tkey\treason", *(f"{b.index}\t{b.key}\t{' '.join(b.reason.split())}" for b in bad)]
    return "\n".join(lines) + "\n"


def _placed(rows: NDArray[np.void], stored: NDArray[np.bool_]) -> NDArray[np.void]:
    placed = np.zeros(int(stored.sum()), dtype=PLACED_ROW)
    placed["index"] = np.flatnonzero(stored)
    for name in ("check", "spill"):
        placed[name] = rows[name][stored]
    return placed


def _write(
    means: _Means,
    beton: BetonLayout,
    placed: NDArray[np.void],
    bad: Sequence[BadSampleReport],
    num_untouched: int,
    reopen: Callable[[], Source] | None,
) -> Manifest:
    """Writes all ranges out of sight, then publishes beton, list of what was left out, and manifest."""
    plan, output = means.plan, means.output
    layout_digest = digest_of([plan.digest, beton.front_matter, beton.table, placed.tobytes()]).partition(":")[2]
    target = output.begin(layout_digest, beton.total_bytes)
    written = _write_ranges(means, beton, placed, PlaceJob(means.source, output, target, layout_digest))
    if reopen is not None and _is_on_a_file_system(plan) and reopen().describe() != plan.source:
        raise Fault(
            f"{plan.source.location}: changed while it was being converted; no beton was written; run the same "
            "command again"
        )
    means.stop.check()
    output.require_taken()
    output.write_text(QUARANTINE, _as_table(bad) if bad else None)
    output.write(PUBLISHING, b"")
    output.publish(target, [part.receipt for part in written])
    manifest = describe_beton(
        beton,
        combine([chunk for part in written for chunk in part.chunks]),
        class_names=means.source.class_names,
        num_untouched=num_untouched,
        settings=plan.settings.as_dict(),
        source=asdict(plan.source),
        versions=plan.versions,
        quarantined=tuple(asdict(report) for report in bad),
    )
    output.write_text(MANIFEST, manifest.to_json())
    return manifest


def _write_ranges(means: _Means, beton: BetonLayout, placed: NDArray[np.void], job: PlaceJob) -> list[Written]:
    """In the order of the ranges."""
    tasks = _PlaceTasks(beton, placed, means.output.range_bytes(beton.total_bytes))
    written: dict[int, Written] = {}
    written_bytes = 0
    by_node: Counter[str] = Counter()
    with closing(means.pool.run(place_range, job, tasks)) as reports:
        for report in reports:
            means.stop.check()
            written[report.number] = report.written
            written_bytes += report.num_bytes
            by_node[report.node] += report.num_bytes
            means.progress.written(written_bytes, beton.total_bytes, by_node)
    return [written[number] for number in range(len(tasks))]


class _PlaceTasks(Sequence[PlaceTask]):
    """Cut when they are submitted: all at once would copy the tables of the whole beton."""

    def __init__(self, beton: BetonLayout, placed: NDArray[np.void], range_bytes: int) -> None:
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


def _is_on_a_file_system(plan: Plan) -> bool:
    """Cheap to read and to list again, its pages being in memory; anything else is made or fetched anew each time."""
    return Path(plan.source.location).is_absolute()


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
    if manifest.source != asdict(plan.source) or manifest.settings != plan.settings.as_dict():
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
