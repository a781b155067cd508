"""One conversion from beginning to end, without Ray: who encodes the units is the caller's choice (`EncodeUnits`)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.beton.files import write_text_atomically
from data_prep.beton.manifest import Manifest, load_manifest, manifest_path
from data_prep.convert.assemble import assemble
from data_prep.convert.config import ConvertSettings
from data_prep.convert.encode import ENCODING_VERSION
from data_prep.convert.plan import Plan, WorkUnit, make_plan
from data_prep.convert.progress import Progress
from data_prep.convert.stop import StopFlag
from data_prep.convert.unit import BadSampleReport, UnitReport, encode_unit
from data_prep.convert.work_folder import WorkFolder, remove_work, work_folder, work_path
from data_prep.errors import UserError
from data_prep.sources.base import Source

EncodeUnits = Callable[[Source, Plan, Sequence[WorkUnit], Path], Generator[UnitReport, None, None]]
"""Encodes units into parts in the folder, in any order; yields a report as each is finished, lets go when closed."""


@dataclass(frozen=True)
class Outcome:
    manifest: Manifest
    already_done: bool
    """The beton stood there whole, from an earlier run: nothing was done."""
    num_units_taken_over: int
    """Work units that an earlier, interrupted run had finished."""


def convert(
    source: Source,
    settings: ConvertSettings,
    output: Path,
    *,
    encode_units: EncodeUnits,
    progress: Progress,
    stop: StopFlag,
) -> Outcome:
    """Makes `output` and its manifest, or continues where an earlier run was stopped.

    UserError: nothing to convert, bad samples (all listed in a file), something else under the output's name, another
    process at it. Stopped: a signal came; the same call continues.
    """
    if output.suffix != ".beton":
        raise UserError(f"--output {output}: expected a name that ends in .beton")
    if len(source) == 0:
        raise UserError(f"{source.describe().location}: holds no samples")
    plan = make_plan(len(source), source.describe(), settings, _versions())
    finished = _finished_before(output, plan)
    if finished is not None:
        remove_work(output)  # a run killed between the manifest and its end left it
        return Outcome(finished, already_done=True, num_units_taken_over=0)
    with work_folder(output, plan) as work:
        taken_over = _encode_all(source, plan, work, output, encode_units, progress, stop)

        def after_page(pages: int, total: int) -> None:
            stop.check()
            progress.assembled(pages, total)

        manifest = assemble(plan, source.class_names, work.path, output, after_page)
        remove_work(output)
    return Outcome(manifest, already_done=False, num_units_taken_over=taken_over)


def encode_in_this_process(stop: StopFlag) -> EncodeUnits:
    """For small data and for tests: no Ray, one unit after the other."""

    def encode_units(
        source: Source, plan: Plan, units: Sequence[WorkUnit], folder: Path
    ) -> Generator[UnitReport, None, None]:
        for unit in units:
            stop.check()
            yield encode_unit(source, unit, plan.settings, plan.digest, folder)

    return encode_units


def bad_samples_path(output: Path) -> Path:
    """`train.beton` -> `train.bad-samples.tsv`."""
    return output.with_suffix(".bad-samples.tsv")


def _encode_all(
    source: Source,
    plan: Plan,
    work: WorkFolder,
    output: Path,
    encode_units: EncodeUnits,
    progress: Progress,
    stop: StopFlag,
) -> int:
    """Leaves every part whole in the work folder. Returns how many were there before."""
    finished = work.finished_units()
    samples = sum(len(unit) for unit in finished)
    if finished:
        progress.note(f"continuing: {samples:,} of {plan.num_samples:,} images were encoded by an earlier run")
    progress.encoded(samples, plan.num_samples, 0, 0)
    numbers = {unit.number for unit in finished}
    missing = [unit for unit in plan.units if unit.number not in numbers]
    stored_bytes = 0
    bad: list[BadSampleReport] = []
    with closing(encode_units(source, plan, missing, work.path)) as reports:
        for report in reports:
            stop.check()
            samples += len(report.unit)
            stored_bytes += report.stored_bytes
            bad += report.bad
            progress.encoded(samples, plan.num_samples, stored_bytes, len(bad))
    bad_list = bad_samples_path(output)
    bad_list.unlink(missing_ok=True)
    if bad:
        _refuse(sorted(bad, key=lambda report: report.index), plan, bad_list)
    return len(finished)


def _refuse(bad: Sequence[BadSampleReport], plan: Plan, bad_list: Path) -> None:
    lines = ["index\tkey\treason", *(f"{b.index}\t{b.key}\t{b.reason}" for b in bad)]
    write_text_atomically(bad_list, "\n".join(lines) + "\n")
    raise UserError(
        f"{plan.source.location}: {len(bad):,} of {plan.num_samples:,} images cannot be stored (first: {bad[0].key} "
        f"{bad[0].reason}); no beton was written; all are listed in {bad_list}; mend or remove them, then run the same "
        "command again"
    )


def _finished_before(output: Path, plan: Plan) -> Manifest | None:
    """The manifest, when the output stands whole and of this plan. UserError when something else has its name."""
    if manifest_path(output).exists():
        manifest = load_manifest(output)
        if manifest.source == asdict(plan.source) and manifest.settings == plan.settings.as_dict():
            return manifest
        raise UserError(
            f"{output}: exists and was made from another source or with other settings (see its manifest); "
            "remove it or choose another --output"
        )
    if output.exists() and not work_path(output).exists():
        raise UserError(f"{output}: exists without a manifest, so data-prep did not finish it; remove it first")
    return None


def _versions() -> dict[str, str]:
    """Of what decides the bytes of re-encoded images."""
    from PIL import features

    return {
        "encoding": ENCODING_VERSION,
        "pillow": importlib.metadata.version("pillow"),
        "libjpeg_turbo": features.version_feature("libjpeg_turbo") or "unknown",
    }
