"""`data-prep merge` and `data-prep subset`: betons made of betons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.beton.manifest import Manifest
from data_prep.cli.options import AsJson, checked, local_path, print_json
from data_prep.errors import UserError

Output = Annotated[Path, typer.Option(metavar="FILE.beton", help="The new beton.", show_default=False)]


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

    output, betons = local_path(output), [local_path(beton) for beton in betons]
    with stop_on_signals() as stop, progress_on(sys.stderr) as progress:
        manifest = run_merge(betons, output, checked(stop, progress))
    _tell_made(output, manifest, as_json)


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

    output, beton = local_path(output), local_path(beton)
    selection = Selection(
        classes=_listed(classes), every=every, first=first, indices=None if indices is None else read_indices(indices)
    )
    with stop_on_signals() as stop, progress_on(sys.stderr) as progress:
        manifest = run_subset(beton, selection, output, checked(stop, progress))
    _tell_made(output, manifest, as_json)


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
    from data_prep.beton.splits_beside import shared_samples

    typer.echo(
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
