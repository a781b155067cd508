"""The commands on finished betons: `data-prep merge`, `subset`, `adopt`, `stage`, `verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.cli.options import (
    AsJson,
    Classes,
    SkipUnlisted,
    checked,
    echo,
    facts_of,
    local_path,
    takes_source_options,
)
from data_prep.cli.progress import progress_on_stderr
from data_prep.errors import UserError
from data_prep.runtime.stop import StopFlag
from data_prep.shown import few, shown
from data_prep.sources.base import NO_OPTIONS, SourceOptions

Output = Annotated[Path, typer.Option(metavar="FILE.beton", help="Beton to write.", show_default=False)]


def merge(
    betons: Annotated[
        list[Path], typer.Argument(metavar="FILE.beton...", help="Betons, in the order in which they are joined.")
    ],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Concatenate betons of the same classes, without re-encoding.

    Example: data-prep merge part1.beton part2.beton --output train.beton
    """
    from data_prep.beton.edit import merge as run_merge

    output, betons = local_path(output), [local_path(beton) for beton in betons]
    with StopFlag() as stop, progress_on_stderr() as progress:
        manifest = run_merge(betons, output, checked(stop, progress))
    _print_made(output, manifest, as_json)


def subset(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    output: Output,
    classes: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...|@FILE", help="Keep these classes, renumbered from 0; repeatable."),
    ] = None,
    every: Annotated[int | None, typer.Option(help="Keep every k-th sample.", metavar="K")] = None,
    first: Annotated[int | None, typer.Option(help="Keep the first N samples.", metavar="N")] = None,
    indices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the samples whose indices are in this file, one per line.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy some samples of a beton to a smaller one, without re-encoding.

    Example: data-prep subset data/imagenet/train.beton --output tenth.beton --every 10
    """
    from data_prep.beton.edit import Selection
    from data_prep.beton.edit import subset as run_subset

    output, beton = local_path(output), local_path(beton)
    selection = Selection(
        classes=read_classes(classes, beton) if classes else (),
        every=every,
        first=first,
        indices=None if indices is None else read_indices(indices),
    )
    with StopFlag() as stop, progress_on_stderr() as progress:
        manifest = run_subset(beton, selection, output, checked(stop, progress))
    _print_made(output, manifest, as_json)


def _print_made(output: Path, manifest: Manifest, as_json: bool) -> None:
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
        typer.echo(json.dumps({**facts_of(str(output), manifest), "warnings": warnings}))


MAX_DIGITS = 30
"""In an index: no beton has so many samples, and Python refuses to read numbers of more than 4,300 digits."""


def read_indices(path: Path) -> tuple[int, ...]:
    """One index per line. Raises UserError, naming the line, for anything else."""
    from data_prep.sources.files.find import storage_path
    from data_prep.sources.files.table import read_lines

    indices = []
    for number, (text,) in read_lines(storage_path(str(path))):
        if not (text.isascii() and text.isdecimal()) or len(text) > MAX_DIGITS:
            raise UserError(f"{path} line {number}: expected the index of a sample, found {shown(text, 40)}")
        indices.append(int(text))
    return tuple(indices)


def read_classes(options: Sequence[str], beton: Path) -> tuple[str, ...]:
    """The beton's classes that the options name: `A,B`, or `@FILE` with one per line; by name or by wnid.

    A name may contain commas. Raises UserError for a class that the beton does not have.
    """
    from data_prep.sources.files.find import storage_path
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
            names = [cells[0] for _, cells in read_lines(storage_path(option[1:]))]
        else:
            names = list(_split_at_commas(option, known))
        unknown = sorted(set(names) - known.keys())
        if unknown:
            raise UserError(f"--classes: {beton} has no class {few(unknown)}; it has {few(manifest.class_names)}")
        found += [known[name] for name in names]
    if options and not found:
        raise UserError(f"--classes: names no class; {beton} has {few(manifest.class_names)}")
    return tuple(dict.fromkeys(found))


def _split_at_commas(option: str, known: Collection[str]) -> Iterator[str]:
    """The longest known names, and the other pieces between commas."""
    pieces = option.split(",")
    while pieces:
        ends = range(len(pieces), 0, -1)
        count = next((end for end in ends if ",".join(pieces[:end]).strip() in known), 1)
        name = ",".join(pieces[:count]).strip()
        pieces = pieces[count:]
        if name:
            yield name


# --- adopt ------------------------------------------------------------------------------------------------------------


def adopt(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Names of the classes by label: a file with one per line, or another beton.  [default: the numbers]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the manifest of a beton that ffcv's own DatasetWriter made, after decoding all its images.

    The beton is not changed. It needs the fields image (RGB image) and label (whole number).

    Example: data-prep adopt imagenet/train.beton --classes wnids.txt
    """
    from data_prep.converter.adopt import adopt as run_adoption
    from data_prep.converter.source import read_class_list

    beton = local_path(beton)
    names = None if classes is None else read_class_list(classes)
    with StopFlag() as stop, progress_on_stderr() as progress:

        def decoded(count: int, total: int) -> None:
            stop.check()
            progress.decoded(count, total)

        manifest = run_adoption(beton, names, decoded)
    _print_made(beton, manifest, as_json)


# --- stage ------------------------------------------------------------------------------------------------------------


def stage(
    source: Annotated[str, typer.Argument(metavar="FILE.beton|URL", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder on a disk of this machine.", show_default=False)],
    wait_limit_s: Annotated[
        float, typer.Option(help="Seconds to wait while another process copies the same beton.")
    ] = 7200.0,
    as_json: AsJson = False,
) -> None:
    """Copy a beton from shared or object storage to this machine, once, and print the path of the copy.

    Every chunk is compared with the manifest. An interrupted copy resumes. Of several processes one copies, the others
    wait for it.

    Example: data-prep stage s3://bucket/imagenet/train.beton --to /local/cache
    """
    from data_prep.beton.stage import stage as run_stage

    with StopFlag() as stop, progress_on_stderr() as progress:
        path = run_stage(source, to, wait_limit_s=wait_limit_s, on_copied=checked(stop, progress), check=stop.check)
    typer.echo(str(path))
    if as_json:
        typer.echo(json.dumps({"ok": True, "path": str(path)}))


# --- verify -----------------------------------------------------------------------------------------------------------


@takes_source_options
def verify(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    decode: Annotated[str, typer.Option(metavar="all|N", help="How many images to decode, spread evenly.")] = ("1000"),
    source: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also re-encode the same number of samples from this source and compare."),
    ] = None,
    input_: Annotated[
        str | None, typer.Option("--input", metavar="PATH", help="Folder, file, glob or URL that the source reads.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the source.  [default: the beton's]")] = None,
    options: SourceOptions = NO_OPTIONS,
    classes: Classes = None,
    skip_unlisted: SkipUnlisted = False,
    as_json: AsJson = False,
) -> None:
    """Check a beton against its manifest: size, digests, structure, counts, and whether its images decode.

    Exit code 1 if anything is wrong; each finding is one line on stderr.

    Example: data-prep verify data/imagenet/train.beton --decode all
    """
    from data_prep.converter.verify import verify as run_verification

    count = _decode_count(decode)
    beton = local_path(beton)
    if source is None and ({input_, split, classes, *asdict(options).values()} != {None} or skip_unlisted):
        raise UserError("--input and other options of a source: add --source NAME to compare with that source")
    with progress_on_stderr() as progress:
        report = run_verification(
            beton,
            decode=count,
            source=source,
            input=input_,
            split=split,
            options=options,
            classes=classes,
            skip_unlisted=skip_unlisted,
            on_decoded=progress.decoded,
        )
    manifest = report.manifest
    for problem in report.problems:
        print(shown(f"data-prep: {beton}: {problem}", None), file=sys.stderr)
    if report.ok:
        compared = "" if source is None else f"; as many match {source}"
        echo(
            f"{beton}: complete: every byte has the digest in its manifest ({_algorithm(manifest)}); "
            f"{report.num_decoded:,} of its {manifest.num_samples:,} images decoded{compared}"
        )
        typer.echo(f"digest {manifest.digest}")
    if as_json:
        facts = {
            "ok": report.ok,
            "path": str(beton),
            "digest": manifest.digest,
            "protects_against": "forgery" if manifest.is_proof else "accidents",
            "num_samples": manifest.num_samples,
            "num_decoded": report.num_decoded,
            "problems": list(report.problems),
        }
        typer.echo(json.dumps(facts))
    if not report.ok:
        raise typer.Exit(1)


def _algorithm(manifest: Manifest) -> str:
    if manifest.is_proof:
        return manifest.algorithm
    return f"{manifest.algorithm}, which protects against accidents only: made by an earlier version"


def _decode_count(option: str) -> int | None:
    if option == "all":
        return None
    if not option.isdecimal():
        raise UserError(f"--decode {option}: expected all or a number")
    return int(option)
