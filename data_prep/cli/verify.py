"""`data-prep verify`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.cli.options import (
    AsJson,
    Classes,
    ClassOrder,
    Devkit,
    FileColumn,
    FoldersAre,
    ImageColumn,
    LabelColumn,
    Labels,
    echo,
    local_path,
    print_json,
)
from data_prep.errors import UserError
from data_prep.shown import shown

if TYPE_CHECKING:
    from data_prep.beton.manifest import Manifest


def verify(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    decode: Annotated[str, typer.Option(metavar="all|N", help="Images to decode: all, or so many spread evenly.")] = (
        "1000"
    ),
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare as many samples with this source, encoded once more.")
    ] = None,
    input_: Annotated[str | None, typer.Option("--input", metavar="PATH", help="What that source reads.")] = None,
    split: Annotated[str | None, typer.Option(help="Its split.  [default: the beton's]")] = None,
    labels: Labels = None,
    devkit: Devkit = None,
    class_order: ClassOrder = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    file_column: FileColumn = None,
    folders_are: FoldersAre = None,
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Check a beton against its manifest: size, digests, structure, counts, and that its images decode.

    Exit code 1 when something is wrong; each finding is one line on stderr.

    Example: data-prep verify data/imagenet/train.beton --decode all
    """
    from data_prep.beton.manifest import load_manifest
    from data_prep.beton.verify import verify as run_verification
    from data_prep.cli.opening import Asked
    from data_prep.convert.compare import compare_with_source
    from data_prep.convert.progress import progress_on
    from data_prep.sources import SourceOptions
    from data_prep.sources.splits import SplitRequest

    count = _decode_count(decode)
    beton = local_path(beton)
    options = SourceOptions(labels, devkit, class_order, image_column, label_column, file_column, folders_are)
    opened = None
    if source is None and {input_, split, classes, *asdict(options).values()} != {None}:
        raise UserError("--input and other options of a source: --source NAME says which; add it to compare with that")
    if source is not None:
        name = load_manifest(beton).source.get("split") if split is None else split
        opened = Asked(source, input_, SplitRequest(name, explicit=name is not None), options, classes).open()
    with progress_on(sys.stderr) as progress:
        report = run_verification(beton, count, on_decoded=progress.decoded)
        problems = list(report.problems)
        if report.ok and opened is not None:
            problems += compare_with_source(beton, opened, count, on_compared=progress.decoded)
    manifest = report.manifest
    for problem in problems:
        print(shown(f"data-prep: {beton}: {problem}", None), file=sys.stderr)
    if not problems:
        compared = "" if opened is None else f"; as many are what {source} gives"
        echo(
            f"{beton}: whole: every byte has the digest that its manifest says ({_kind_shown(manifest)}); "
            f"{report.num_decoded:,} of its {manifest.num_samples:,} images decoded{compared}"
        )
        typer.echo(f"digest {manifest.digest}")
    if as_json:
        print_json(
            ok=not problems,
            path=str(beton),
            digest=manifest.digest,
            protects_against="forgery" if manifest.is_proof else "accidents",
            num_samples=manifest.num_samples,
            num_decoded=report.num_decoded,
            problems=problems,
        )
    if problems:
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
