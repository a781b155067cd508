"""The commands on finished betons: `data-prep merge`, `subset`, `stage`, `verify`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.cli.options import (
    AsJson,
    Classes,
    checked,
    echo,
    local_path,
    print_json,
    takes_source_options,
)
from data_prep.errors import UserError
from data_prep.shown import few, shown
from data_prep.sources.base import NO_OPTIONS, SourceOptions

Output = Annotated[Path, typer.Option(metavar="FILE.beton", help="The new beton.", show_default=False)]


def merge(
    betons: Annotated[list[Path], typer.Argument(metavar="FILE.beton...", show_default=False)],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Concatenate betons of the same classes. Nothing is encoded again.

    Example: data-prep merge part1.beton part2.beton --output train.beton
    """
    from data_prep.beton.edit import merge as run_merge
    from data_prep.cli.progress import progress_on
    from data_prep.runtime.stop import StopFlag

    output, betons = local_path(output), [local_path(beton) for beton in betons]
    with StopFlag() as stop, progress_on(sys.stderr) as progress:
        manifest = run_merge(betons, output, checked(stop, progress))
    _tell_made(output, manifest, as_json)


def subset(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    output: Output,
    classes: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...|@FILE", help="Keep these classes, labels from 0 again; may be repeated."),
    ] = None,
    every: Annotated[int | None, typer.Option(help="Keep every k-th sample.", metavar="K")] = None,
    first: Annotated[int | None, typer.Option(help="Keep the first N samples.", metavar="N")] = None,
    indices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep only these samples, one index per line.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a smaller beton from some samples of another. Nothing is encoded again.

    Example: data-prep subset data/imagenet/train.beton --output tenth.beton --every 10
    """
    from data_prep.beton.edit import Selection
    from data_prep.beton.edit import subset as run_subset
    from data_prep.cli.progress import progress_on
    from data_prep.runtime.stop import StopFlag

    output, beton = local_path(output), local_path(beton)
    selection = Selection(
        classes=read_classes(classes, beton) if classes else (),
        every=every,
        first=first,
        indices=None if indices is None else read_indices(indices),
    )
    with StopFlag() as stop, progress_on(sys.stderr) as progress:
        manifest = run_subset(beton, selection, output, checked(stop, progress))
    _tell_made(output, manifest, as_json)


def _tell_made(output: Path, manifest: Manifest, as_json: bool) -> None:
    from data_prep.beton.contents import shared_samples

    echo(
        f"{output}: {manifest.num_samples:,} images of {manifest.num_classes} classes, "
        f"{manifest.beton_bytes / 1e6:,.1f} MB"
    )
    typer.echo(f"digest {manifest.digest}")
    warnings = shared_samples(str(output), manifest)
    for warning in warnings:
        typer.echo(f"data-prep: warning: {warning}", err=True)
    if as_json:
        print_json(
            ok=True,
            path=str(output),
            digest=manifest.digest,
            num_samples=manifest.num_samples,
            num_classes=manifest.num_classes,
            beton_bytes=manifest.beton_bytes,
            warnings=warnings,
        )


MAX_DIGITS = 30
"""Of an index; no beton has so many samples, and Python refuses numbers of more than 4,300."""


def read_indices(path: Path) -> tuple[int, ...]:
    """One id per line. UserError, naming the line, for an invalid one."""
    from data_prep.sources.files.find import place_of
    from data_prep.sources.files.table import read_lines

    indices = []
    for number, (text,) in read_lines(place_of(str(path))):
        if not (text.isascii() and text.isdecimal()) or len(text) > MAX_DIGITS:
            raise UserError(f"{path} line {number}: expected the number of a sample, found {shown(text, 40)}")
        indices.append(int(text))
    return tuple(indices)


def read_classes(options: Sequence[str], beton: Path) -> tuple[str, ...]:
    """The classes of the beton that options name: `A,B`, or `@FILE` with one a line; names, or wnids that it knows.

    A name may hold commas. UserError for a class that the beton does not have.
    """
    from data_prep.sources.files.find import place_of
    from data_prep.sources.files.table import read_lines

    manifest = load_manifest(beton)
    wnids = {
        wnid: manifest.class_names[label]
        for wnid, label in dict(manifest.source.get("label_map") or {}).items()
        if type(label) is int and 0 <= label < manifest.num_classes
    }
    known = {**wnids, **{name: name for name in manifest.class_names}}
    found: list[str] = []
    for option in options:
        if option.startswith("@") and option not in known:
            asked = [cells[0] for _, cells in read_lines(place_of(option[1:]))]
        else:
            asked = list(_cut_at_commas(option, known))
        unknown = sorted(set(asked) - known.keys())
        if unknown:
            raise UserError(f"--classes: {beton} has no class {few(unknown)}; it has {few(manifest.class_names)}")
        found += [known[name] for name in asked]
    if options and not found:
        raise UserError(f"--classes: names no class; {beton} has {few(manifest.class_names)}")
    return tuple(dict.fromkeys(found))


def _cut_at_commas(option: str, known: Collection[str]) -> Iterator[str]:
    """The longest known names, and the remaining text between commas."""
    pieces = option.split(",")
    while pieces:
        ends = range(len(pieces), 0, -1)
        count = next((end for end in ends if ",".join(pieces[:end]).strip() in known), 1)
        name = ",".join(pieces[:count]).strip()
        pieces = pieces[count:]
        if name:
            yield name


# --- stage ------------------------------------------------------------------------------------------------------------


def stage(
    source: Annotated[str, typer.Argument(metavar="FILE.beton|URL", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder on this machine's own disk.", show_default=False)],
    wait_limit_s: Annotated[float, typer.Option(help="How long to wait for another process that is copying.")] = 7200.0,
    as_json: AsJson = False,
) -> None:
    """Copy a beton from shared or object storage to this machine, once, and print the copy's path.

    Every chunk is compared with the manifest; an interrupted copy resumes; processes that ask meanwhile wait.

    Example: data-prep stage s3://bucket/imagenet/train.beton --to /local/cache
    """
    from data_prep.beton.stage import stage as run_stage
    from data_prep.cli.progress import progress_on
    from data_prep.runtime.stop import StopFlag

    with StopFlag() as stop, progress_on(sys.stderr) as progress:
        path = run_stage(source, to, wait_limit_s=wait_limit_s, on_copied=checked(stop, progress), check=stop.check)
    typer.echo(str(path))
    if as_json:
        print_json(ok=True, path=str(path))


# --- verify -----------------------------------------------------------------------------------------------------------


if TYPE_CHECKING:
    from data_prep.beton.manifest import Manifest


@takes_source_options
def verify(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    decode: Annotated[str, typer.Option(metavar="all|N", help="Images to decode: all, or a number, spread evenly.")] = (
        "1000"
    ),
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare as many samples with this source, encoded again.")
    ] = None,
    input_: Annotated[str | None, typer.Option("--input", metavar="PATH", help="What that source reads.")] = None,
    split: Annotated[str | None, typer.Option(help="Its split.  [default: the beton's]")] = None,
    options: SourceOptions = NO_OPTIONS,
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Check a beton against its manifest: size, digests, structure, counts, and that its images decode.

    Exit code 1 when something is wrong; each finding is one line on stderr.

    Example: data-prep verify data/imagenet/train.beton --decode all
    """
    from data_prep.cli.progress import progress_on
    from data_prep.converter.verify import verify as run_verification

    count = _decode_count(decode)
    beton = local_path(beton)
    if source is None and {input_, split, classes, *asdict(options).values()} != {None}:
        raise UserError("--input and other options of a source: add --source NAME to compare with that source")
    with progress_on(sys.stderr) as progress:
        report = run_verification(
            beton,
            decode=count,
            source=source,
            input=input_,
            split=split,
            options=options,
            classes=classes,
            on_decoded=progress.decoded,
        )
    manifest = report.manifest
    for problem in report.problems:
        print(shown(f"data-prep: {beton}: {problem}", None), file=sys.stderr)
    if report.ok:
        compared = "" if source is None else f"; as many match {source}"
        echo(
            f"{beton}: whole: every byte has the digest that its manifest says ({_kind_shown(manifest)}); "
            f"{report.num_decoded:,} of its {manifest.num_samples:,} images decoded{compared}"
        )
        typer.echo(f"digest {manifest.digest}")
    if as_json:
        print_json(
            ok=report.ok,
            path=str(beton),
            digest=manifest.digest,
            protects_against="forgery" if manifest.is_proof else "accidents",
            num_samples=manifest.num_samples,
            num_decoded=report.num_decoded,
            problems=list(report.problems),
        )
    if not report.ok:
        raise typer.Exit(1)


def _kind_shown(manifest: Manifest) -> str:
    if manifest.is_proof:
        return manifest.algorithm
    return f"{manifest.algorithm}, which protects against accidents only: made by an earlier version"


def _decode_count(option: str) -> int | None:
    if option == "all":
        return None
    if not option.isdecimal():
        raise UserError(f"--decode {option}: expected all or a number")
    return int(option)
