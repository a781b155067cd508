"""The `data-prep` command: words to calls. Heavy libraries are imported where they are used."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.beton.manifest import Manifest
from data_prep.convert.config import (
    DEFAULT_MAX_BAD,
    DEFAULT_QUALITY,
    DEFAULT_RAW_SHARE,
    BadPolicy,
    ConvertSettings,
)
from data_prep.convert.pool import Pool
from data_prep.convert.progress import Progress
from data_prep.convert.stop import StopFlag
from data_prep.errors import UserError
from data_prep.exit_codes import run_and_exit

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turns image data sets into .beton files that the ffcv Loader reads, and proves that they are whole.",
)

Labels = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="image-folder: the class of every image. webdataset: the names of the classes."),
]
Devkit = Annotated[str | None, typer.Option(metavar="FILE", help="ilsvrc: the devkit, if not beside the images.")]
ClassOrder = Annotated[
    str | None, typer.Option(metavar="text|number", help="image-folder: how numbered classes are sorted into labels.")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Option(metavar="NAME", help="Kind of source, for example image-folder or ilsvrc.", show_default=False),
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="FILE.beton", help="The beton, or s3://...; its manifest goes beside.", show_default=False
        ),
    ],
    input_: Annotated[
        str | None, typer.Option("--input", metavar="PATH", help="Folder, file, glob or URL that the source reads.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the source.  [default: the output's name, if train, val or test]")
    ] = None,
    labels: Labels = None,
    devkit: Devkit = None,
    class_order: ClassOrder = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Ray tasks at a time; 0: no Ray, in this process.  [default: all CPUs]")
    ] = None,
    encode: Annotated[
        str, typer.Option(help="original (the source's own JPEG bytes where possible), jpeg, raw or mixed.")
    ] = "original",
    raw_share: Annotated[
        float | None, typer.Option(help=f"mixed: share stored as raw pixels.  [default: {DEFAULT_RAW_SHARE}]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="mixed: which samples those are.  [default: 0]")] = None,
    max_side: Annotated[int | None, typer.Option(help="Shrink images whose longer side is longer, px.")] = None,
    quality: Annotated[
        int | None, typer.Option(help=f"JPEG quality of images encoded anew.  [default: {DEFAULT_QUALITY}]")
    ] = None,
    subsampling: Annotated[
        str | None, typer.Option(help="Their chroma subsampling: 4:4:4, 4:2:2 or 4:2:0.  [default: 4:4:4]")
    ] = None,
    exif: Annotated[str, typer.Option(help="An EXIF orientation: ignore, as published figures do, or apply.")] = (
        "ignore"
    ),
    check: Annotated[
        str, typer.Option(help="JPEGs: decode each to its end, or headers only, faster and blind to bit rot.")
    ] = "decode",
    on_error: Annotated[str, typer.Option(help="Bad samples: fail (list all, write nothing) or quarantine.")] = "fail",
    max_bad: Annotated[
        str | None, typer.Option(help=f"quarantine: most samples left out, N or N%.  [default: {DEFAULT_MAX_BAD}]")
    ] = None,
    page_mib: Annotated[int, typer.Option(help="Page of the beton, MiB; the largest image must fit in one.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Convert a data set, or go on where an interrupted conversion stands.

    The result is the same, byte for byte, whatever the number of workers and interruptions. With RAY_ADDRESS set the
    work runs on that cluster, else on a Ray of this machine.

    Example: data-prep convert --source image-folder --input imagenet --output data/imagenet/train.beton --max-side 500
    """
    from data_prep.convert.output import QUARANTINE, open_output
    from data_prep.convert.pool import ThisProcess
    from data_prep.convert.progress import progress_on
    from data_prep.convert.run import convert as run_conversion
    from data_prep.convert.stop import stop_on_signals
    from data_prep.sources import SourceOptions, open_source
    from data_prep.sources.base import Source
    from data_prep.sources.places import IS_URL
    from data_prep.sources.splits import requested_split

    started_s = time.monotonic()
    place = open_output(output if IS_URL.match(output) else Path(output).expanduser().absolute())
    settings = _settings(encode, raw_share, seed, max_side, quality, subsampling, page_mib, exif, check)
    bad_policy = _bad_policy(on_error, max_bad)

    options = SourceOptions(labels, devkit, class_order)

    def reopen() -> Source:
        return open_source(source, input_, requested_split(split, Path(output)), options)

    with stop_on_signals() as stop, progress_on(sys.stderr) as progress, ExitStack() as stack:
        opened = reopen()
        pool: Pool = ThisProcess(stop)
        if workers != 0:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            from data_prep.convert.driver import RayPool

            pool = stack.enter_context(RayPool(workers, os.environ.get("RAY_ADDRESS"), progress, stop))
        outcome = run_conversion(
            opened,
            settings,
            place,
            pool=pool,
            progress=progress,
            stop=stop,
            bad_policy=bad_policy,
            reopen=reopen,
        )
    manifest = outcome.manifest
    seconds = time.monotonic() - started_s
    if outcome.already_done:
        typer.echo(f"{place.shown}: already done, nothing to do")
    left_out = manifest.source["num_left_out"]
    typer.echo(
        f"{place.shown}: {manifest.num_samples:,} images of {manifest.num_classes} classes, "
        f"{manifest.num_untouched:,} with the source's own bytes, {manifest.beton_bytes / 1e6:,.1f} MB, {seconds:.1f} s"
        + (f"; {left_out:,} files of the source are no images by their name and were left out" if left_out else "")
    )
    if manifest.quarantined:
        typer.echo(f"{len(manifest.quarantined):,} bad samples were left out: {place.name_of(QUARANTINE)}")
    if manifest.source["label_checks"]:
        typer.echo(f"labels: {'; '.join(manifest.source['label_checks'])}")
    typer.echo(f"digest {manifest.digest}")
    if as_json:
        _print_json(
            ok=True,
            path=place.shown,
            digest=manifest.digest,
            num_samples=manifest.num_samples,
            num_quarantined=len(manifest.quarantined),
            num_classes=manifest.num_classes,
            num_untouched=manifest.num_untouched,
            beton_bytes=manifest.beton_bytes,
            already_done=outcome.already_done,
            num_units_taken_over=outcome.num_units_taken_over,
            seconds=round(seconds, 3),
        )


@app.command()
def inspect(
    source: Annotated[
        str,
        typer.Option(metavar="NAME", help="Kind of source, for example image-folder or ilsvrc.", show_default=False),
    ],
    input_: Annotated[
        str | None, typer.Option("--input", metavar="PATH", help="Folder, file, glob or URL that the source reads.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the source.")] = None,
    labels: Labels = None,
    devkit: Devkit = None,
    class_order: ClassOrder = None,
    headers: Annotated[int, typer.Option(min=1, help="Images whose headers are read, spread evenly.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Look at a data set before anything is written: counts, sizes, formats, class map, first samples, oddities.

    Example: data-prep inspect --source image-folder --input imagenet --split val
    """
    from data_prep.convert.progress import progress_on
    from data_prep.inspect.show import show
    from data_prep.inspect.survey import survey
    from data_prep.sources import SourceOptions, open_source
    from data_prep.sources.splits import SplitRequest

    request = SplitRequest(split, explicit=split is not None)
    with progress_on(sys.stderr) as progress:
        opened = open_source(source, input_, request, SourceOptions(labels, devkit, class_order))
        found = survey(opened, headers, on_header=progress.decoded)
    show(found, sys.stdout)
    if as_json:
        _print_json(ok=True, **found.as_dict())


@app.command()
def verify(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    decode: Annotated[str, typer.Option(metavar="all|N", help="Images to decode: all, or so many spread evenly.")] = (
        "1000"
    ),
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare as many samples with this source, encoded once more.")
    ] = None,
    input_: Annotated[str | None, typer.Option("--input", metavar="PATH", help="What that source reads.")] = None,
    split: Annotated[str | None, typer.Option(help="Its split.  [default: the beton's name]")] = None,
    labels: Labels = None,
    devkit: Devkit = None,
    class_order: ClassOrder = None,
    as_json: AsJson = False,
) -> None:
    """Check a beton against its manifest: size, digests, structure, counts, and that its images decode.

    Exit code 1 when something is wrong; each finding is one line on stderr.

    Example: data-prep verify data/imagenet/train.beton --decode all
    """
    from data_prep.beton.verify import verify as run_verification
    from data_prep.convert.compare import compare_with_source
    from data_prep.convert.progress import progress_on
    from data_prep.sources import SourceOptions, open_source
    from data_prep.sources.splits import requested_split

    count = _decode_count(decode)
    beton = beton.expanduser().absolute()
    options = SourceOptions(labels, devkit, class_order)
    opened = None if source is None else open_source(source, input_, requested_split(split, beton), options)
    with progress_on(sys.stderr) as progress:
        report = run_verification(beton, count, on_decoded=progress.decoded)
        problems = list(report.problems)
        if report.ok and opened is not None:
            problems += compare_with_source(beton, opened, count, on_compared=progress.decoded)
    manifest = report.manifest
    for problem in problems:
        print(f"data-prep: {beton}: {problem}", file=sys.stderr)
    if not problems:
        compared = "" if opened is None else f"; as many are what {source} gives"
        typer.echo(f"{beton}: whole; {manifest.num_samples:,} images, {report.num_decoded:,} of them decoded{compared}")
        typer.echo(f"digest {manifest.digest}")
    if as_json:
        _print_json(
            ok=not problems,
            path=str(beton),
            digest=manifest.digest,
            num_samples=manifest.num_samples,
            num_decoded=report.num_decoded,
            problems=problems,
        )
    if problems:
        raise typer.Exit(1)


Output = Annotated[Path, typer.Option(metavar="FILE.beton", help="The new beton.", show_default=False)]


@app.command()
def merge(
    betons: Annotated[list[Path], typer.Argument(metavar="FILE.beton...", show_default=False)],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Put betons of the same classes one behind the other. Nothing is encoded anew.

    Example: data-prep merge part1.beton part2.beton --output train.beton
    """
    from data_prep.convert.progress import progress_on
    from data_prep.convert.stop import stop_on_signals
    from data_prep.edit.merge import merge as run_merge

    output = output.expanduser().absolute()
    with stop_on_signals() as stop, progress_on(sys.stderr) as progress:
        manifest = run_merge(betons, output, _checked(stop, progress))
    _tell_made(output, manifest, as_json)


@app.command()
def subset(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    output: Output,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B,...|@FILE", help="Keep these; their labels are numbered anew.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Keep every k-th sample.")] = None,
    first: Annotated[int | None, typer.Option(help="Keep so many.")] = None,
    indices: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep those listed, one number a line.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a smaller beton of some samples of another. Nothing is encoded anew.

    Example: data-prep subset data/imagenet/train.beton --output tenth.beton --every 10
    """
    from data_prep.convert.progress import progress_on
    from data_prep.convert.stop import stop_on_signals
    from data_prep.edit.subset import Selection, read_indices
    from data_prep.edit.subset import subset as run_subset

    output = output.expanduser().absolute()
    selection = Selection(
        classes=_listed(classes), every=every, first=first, indices=None if indices is None else read_indices(indices)
    )
    with stop_on_signals() as stop, progress_on(sys.stderr) as progress:
        manifest = run_subset(beton, selection, output, _checked(stop, progress))
    _tell_made(output, manifest, as_json)


@app.command()
def stage(
    source: Annotated[str, typer.Argument(metavar="FILE.beton|URL", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder on this machine's own disk.", show_default=False)],
    wait_limit_s: Annotated[float, typer.Option(help="How long to wait for another process that is copying.")] = 7200.0,
    as_json: AsJson = False,
) -> None:
    """Copy a beton from shared or object storage to this machine, once, and print the copy's path.

    Every chunk is compared with the manifest; an interrupted copy goes on; processes that ask meanwhile wait.

    Example: data-prep stage s3://bucket/imagenet/train.beton --to /local/cache
    """
    from data_prep.beton.stage import stage as run_stage
    from data_prep.convert.progress import progress_on
    from data_prep.convert.stop import stop_on_signals

    with stop_on_signals() as stop, progress_on(sys.stderr) as progress:
        path = run_stage(source, to, wait_limit_s=wait_limit_s, on_copied=_checked(stop, progress), check=stop.check)
    typer.echo(str(path))
    if as_json:
        _print_json(ok=True, path=str(path))


def _checked(stop: StopFlag, progress: Progress) -> Callable[[int, int], None]:
    def after_range(num_bytes: int, total: int) -> None:
        stop.check()
        progress.written(num_bytes, total)

    return after_range


def _listed(option: str | None) -> tuple[str, ...]:
    """`A,B` or `@FILE` with one name per line."""
    if option is None:
        return ()
    if not option.startswith("@"):
        return tuple(name.strip() for name in option.split(",") if name.strip())
    try:
        return tuple(line.strip() for line in Path(option[1:]).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {option}: cannot be read: {error}") from None


def _tell_made(output: Path, manifest: Manifest, as_json: bool) -> None:
    typer.echo(
        f"{output}: {manifest.num_samples:,} images of {manifest.num_classes} classes, "
        f"{manifest.beton_bytes / 1e6:,.1f} MB"
    )
    typer.echo(f"digest {manifest.digest}")
    if as_json:
        _print_json(
            ok=True,
            path=str(output),
            digest=manifest.digest,
            num_samples=manifest.num_samples,
            num_classes=manifest.num_classes,
            beton_bytes=manifest.beton_bytes,
        )


def _settings(
    encode: str,
    raw_share: float | None,
    seed: int | None,
    max_side: int | None,
    quality: int | None,
    subsampling: str | None,
    page_mib: int,
    exif: str,
    check: str,
) -> ConvertSettings:
    if encode == "raw" and (quality is not None or subsampling is not None):
        raise UserError("--quality and --subsampling say how JPEGs are encoded; with --encode raw there are none")
    if encode != "mixed" and (raw_share is not None or seed is not None):
        raise UserError(f"--raw-share and --seed choose samples for --encode mixed, not for --encode {encode}")
    default_share = DEFAULT_RAW_SHARE if encode == "mixed" else 0.0
    return ConvertSettings(
        encode=encode,  # type: ignore[arg-type]  # ConvertSettings checks it
        max_side=max_side,
        quality=DEFAULT_QUALITY if quality is None else quality,
        subsampling=subsampling or "4:4:4",  # type: ignore[arg-type]
        page_bytes=page_mib << 20 if page_mib > 0 else 0,
        raw_share=default_share if raw_share is None else raw_share,
        seed=seed or 0,
        exif=exif,  # type: ignore[arg-type]
        check=check,  # type: ignore[arg-type]
    )


def _bad_policy(on_error: str, max_bad: str | None) -> BadPolicy:
    if on_error == "fail" and max_bad is not None:
        raise UserError(
            "--max-bad says how many samples --on-error quarantine may leave out; add that, or leave it out"
        )
    return BadPolicy(on_error, DEFAULT_MAX_BAD if max_bad is None else max_bad)  # type: ignore[arg-type]


def _decode_count(option: str) -> int | None:
    if option == "all":
        return None
    if not option.isdecimal():
        raise UserError(f"--decode {option}: expected all or a number")
    return int(option)


def main() -> None:
    """Runs the command line and exits."""
    run_and_exit(app, "data-prep")


def _print_json(**values: Any) -> None:
    print(json.dumps(values), flush=True)
