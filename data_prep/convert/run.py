"""One conversion from beginning to end: read and encode the units, lay the beton out, write its ranges, publish.

Who does the work is the caller's choice (`pool.Pool`); every decision is made here, from the plan and the parts alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.digest import FileDigest, combine
from data_prep.beton.files import publish, write_text_atomically
from data_prep.beton.manifest import (
    Manifest,
    describe_beton,
    load_manifest,
    manifest_path,
    write_manifest,
)
from data_prep.beton.pages import BetonLayout, lay_out
from data_prep.beton.ranges import create_sized, cut, num_ranges
from data_prep.beton.space import require_space
from data_prep.convert.config import BadPolicy, ConvertSettings
from data_prep.convert.encode import encoder_versions
from data_prep.convert.part import BadSampleReport, Part, part_path
from data_prep.convert.place import PLACED_ROW, PlaceJob, PlaceTask, machine, place_range
from data_prep.convert.plan import Plan, make_plan
from data_prep.convert.pool import Pool
from data_prep.convert.progress import Progress
from data_prep.convert.stop import StopFlag
from data_prep.convert.unit import EncodeJob, encode_unit
from data_prep.convert.work_folder import WorkFolder, remove_work, work_folder, work_path
from data_prep.errors import Fault, UserError
from data_prep.sources.base import Source, digest_of


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
    work: WorkFolder
    pool: Pool
    progress: Progress
    stop: StopFlag


def convert(
    source: Source,
    settings: ConvertSettings,
    output: Path,
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
    if output.suffix != ".beton":
        raise UserError(f"--output {output}: expected a name that ends in .beton")
    if len(source) == 0:
        raise UserError(f"{source.describe().location}: holds no samples")
    plan = make_plan(len(source), source.describe(), settings, encoder_versions())
    finished = _finished_before(output, plan, bad_policy)
    if finished is not None:
        remove_work(output)  # a run killed between the manifest and its end left it
        return Outcome(finished, already_done=True, num_units_taken_over=0)
    with work_folder(output, plan) as work:
        means = _Means(source, plan, work, pool, progress, stop)
        taken_over = _encode_all(means, bad_policy)
        parts = _parts(means)
        bad = [report for part in parts for report in part.bad]
        _judge(bad, plan, bad_policy, output)
        rows = np.concatenate([part.rows for part in parts])
        stored = rows["size"] > 0
        if not stored.any():
            raise UserError(f"{plan.source.location}: none of its images can be stored")
        beton = lay_out(rows[stored], settings.page_bytes)
        manifest = _write(means, beton, _placed(rows, stored), output, bad, int(rows["untouched"].sum()), reopen)
        remove_work(output)
    return Outcome(manifest, already_done=False, num_units_taken_over=taken_over)


def bad_samples_path(output: Path) -> Path:
    """`train.beton` -> `train.bad-samples.tsv`: why there is no beton."""
    return output.with_suffix(".bad-samples.tsv")


def quarantine_path(output: Path) -> Path:
    """`train.beton` -> `train.quarantine.tsv`: what is not in the beton."""
    return output.with_suffix(".quarantine.tsv")


def _encode_all(means: _Means, bad_policy: BadPolicy) -> int:
    """Leaves every part whole in the work folder. Returns how many were there before."""
    plan, folder, progress = means.plan, means.work.path, means.progress
    finished = means.work.finished_parts()
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
    job = EncodeJob(means.source, plan.settings, plan.digest, folder, _is_on_a_file_system(plan), plan.versions)
    with closing(means.pool.run(encode_unit, job, missing)) as reports:
        for report in reports:
            means.stop.check()
            if not part_path(folder, report.unit.number).exists():
                raise UserError(
                    f"{folder}: a worker wrote there, but this machine does not see it; choose an --output on storage "
                    "that all nodes of the cluster share"
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
        part = means.work.part(unit)
        if part is None:
            part_path(means.work.path, unit.number).unlink(missing_ok=True)
            raise Fault(f"{means.work.path}: the part of {unit} was damaged; run the same command again to redo it")
        parts.append(part)
    return parts


def _judge(bad: Sequence[BadSampleReport], plan: Plan, policy: BadPolicy, output: Path) -> None:
    """UserError when there are more bad samples than may be left out; they are all listed in a file."""
    bad_list = bad_samples_path(output)
    bad_list.unlink(missing_ok=True)
    limit = policy.limit(plan.num_samples)
    if len(bad) <= limit:
        return
    write_text_atomically(bad_list, _as_table(bad))
    allowed = f", --max-bad {policy.max_bad} allows {limit:,}" if policy.on_error == "quarantine" else ""
    raise UserError(
        f"{plan.source.location}: {len(bad):,} of {plan.num_samples:,} images cannot be stored{allowed} (first: "
        f"{bad[0].key} {bad[0].reason}); no beton was written; all are listed in {bad_list}; mend or remove them, or "
        "leave them out with --on-error quarantine --max-bad N, then run the same command again"
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
    output: Path,
    bad: Sequence[BadSampleReport],
    num_untouched: int,
    reopen: Callable[[], Source] | None,
) -> Manifest:
    """Writes all ranges under a temporary name, then publishes beton, list of what was left out, and manifest."""
    plan = means.plan
    layout_digest = digest_of([plan.digest, beton.front_matter, beton.table, placed.tobytes()]).partition(":")[2]
    target = means.work.target(layout_digest)
    try:
        require_space(target, beton.total_bytes)
        create_sized(target, beton.total_bytes)
        digest = _write_ranges(means, beton, placed, target, layout_digest)
        if reopen is not None and _is_on_a_file_system(plan) and reopen().describe() != plan.source:
            raise Fault(
                f"{plan.source.location}: changed while it was being converted; no beton was written; run the same "
                "command again"
            )
        _fsync(target)
        means.stop.check()
        quarantine = quarantine_path(output)
        if bad:
            write_text_atomically(quarantine, _as_table(bad))
        else:
            quarantine.unlink(missing_ok=True)
        publish(target, output)
        manifest = describe_beton(
            beton,
            digest,
            class_names=means.source.class_names,
            num_untouched=num_untouched,
            settings=plan.settings.as_dict(),
            source=asdict(plan.source),
            versions=plan.versions,
            quarantined=tuple(asdict(report) for report in bad),
        )
        write_manifest(output, manifest)
    except OSError as error:
        raise Fault(
            f"{output}: cannot be written: {error.strerror}; mend that, then run the same command again"
        ) from None
    return manifest


def _write_ranges(
    means: _Means, beton: BetonLayout, placed: NDArray[np.void], target: Path, layout_digest: str
) -> FileDigest:
    job = PlaceJob(means.source, means.work.path, target, layout_digest, machine())
    tasks = _PlaceTasks(beton, placed)
    chunks: dict[int, tuple[str, ...]] = {}
    written_bytes = 0
    with closing(means.pool.run(place_range, job, tasks)) as reports:
        for report in reports:
            means.stop.check()
            chunks[report.number] = report.chunks
            written_bytes += report.num_bytes
            means.progress.written(written_bytes, beton.total_bytes)
    return combine([chunk for number in range(len(tasks)) for chunk in chunks[number]])


class _PlaceTasks(Sequence[PlaceTask]):
    """Cut when they are submitted: all at once would copy the tables of the whole beton."""

    def __init__(self, beton: BetonLayout, placed: NDArray[np.void]) -> None:
        self._beton = beton
        self._placed = placed

    def __len__(self) -> int:
        return num_ranges(self._beton)

    def __getitem__(self, number: int) -> PlaceTask:  # type: ignore[override]  # no slices
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = cut(self._beton, number)
        return PlaceTask(part, self._placed[part.samples])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_on_a_file_system(plan: Plan) -> bool:
    """Cheap to read and to list again, its pages being in memory; anything else is made or fetched anew each time."""
    return Path(plan.source.location).is_absolute()


def _finished_before(output: Path, plan: Plan, policy: BadPolicy) -> Manifest | None:
    """The manifest, when the output stands whole and of this plan. UserError when something else has its name."""
    if manifest_path(output).exists():
        manifest = load_manifest(output)
        if manifest.source != asdict(plan.source) or manifest.settings != plan.settings.as_dict():
            raise UserError(
                f"{output}: exists and was made from another source or with other settings (see its manifest); "
                "remove it or choose another --output"
            )
        if len(manifest.quarantined) > policy.limit(plan.num_samples):
            raise UserError(
                f"{output}: exists and leaves out {len(manifest.quarantined):,} bad samples, more than asked for now; "
                "remove it, or use the --on-error and --max-bad that it was made with"
            )
        return manifest
    if output.exists() and not work_path(output).exists():
        raise UserError(f"{output}: exists without a manifest, so data-prep did not finish it; remove it first")
    return None
