"""`data-prep convert`."""

from __future__ import annotations

import json
import re
import time
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.beton.files import BETON
from data_prep.cli.options import (
    AsJson,
    Classes,
    Input,
    SkipUnlisted,
    SourceKind,
    echo,
    facts_of,
    takes_source_options,
)
from data_prep.cli.progress import progress_on_stderr
from data_prep.converter.settings import (
    DEFAULT_MAX_BAD,
    DEFAULT_QUALITY,
    DEFAULT_RAW_SHARE,
    BadPolicy,
    ConvertSettings,
)
from data_prep.errors import UserError
from data_prep.runtime.stop import StopFlag
from data_prep.sources.base import NO_OPTIONS, SourceOptions

if TYPE_CHECKING:
    from data_prep.converter.convert import ConvertReport
    from data_prep.converter.split import SplitRule


@takes_source_options
def convert(
    source: SourceKind,
    output: Annotated[
        str,
        typer.Option(
            metavar="FILE.beton|FOLDER/",
            help="Beton to write, a file or s3://...; its manifest is put beside it. A folder: for train.beton and "
            "val.beton.",
            show_default=False,
        ),
    ],
    input_: Input = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the source, or all.  [default: as the output's name says]")
    ] = None,
    val_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Divide each class into train and val: an image is val if a hash of its path is below SHARE (expect "
            "0.2 of a class, not exactly 0.2), so images added later do not move others. Equal files are on one side. "
            "A class of two images or more has one on each side at least.",
        ),
    ] = None,
    split_seed: Annotated[
        int | None, typer.Option(help="--val-share: another seed draws other images.  [default: 0]")
    ] = None,
    split_from: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Divide as this table of files and splits (train, val, test) says."),
    ] = None,
    options: SourceOptions = NO_OPTIONS,
    classes: Classes = None,
    skip_unlisted: SkipUnlisted = False,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Ray tasks at a time; 0: in this process, without Ray.  [default: one per CPU]"),
    ] = None,
    encode: Annotated[
        str, typer.Option(help="original (keep the source's JPEG bytes where possible), jpeg, raw or mixed.")
    ] = "original",
    raw_share: Annotated[
        float | None,
        typer.Option(help=f"mixed: share of the images stored as raw pixels.  [default: {DEFAULT_RAW_SHARE}]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="mixed: seed that selects those images.  [default: 0]")] = None,
    max_side: Annotated[
        int | None, typer.Option(help="Shrink larger images until their longer side has this length, px.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help=f"JPEG quality of re-encoded images.  [default: {DEFAULT_QUALITY}]")
    ] = None,
    subsampling: Annotated[
        str | None,
        typer.Option(help="Chroma subsampling of re-encoded images: 4:4:4, 4:2:2 or 4:2:0.  [default: 4:4:4]"),
    ] = None,
    exif: Annotated[str, typer.Option(help="EXIF orientation: ignore it, as published results do, or apply it.")] = (
        "ignore"
    ),
    background: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B",
            help="Colour behind transparent pixels, 0..255 each.  [default: the alpha channel is dropped]",
        ),
    ] = None,
    check: Annotated[
        str,
        typer.Option(
            help="JPEGs: decode each one completely, or read only the headers: faster, but misses damaged pixels."
        ),
    ] = "decode",
    on_error: Annotated[
        str,
        typer.Option(
            help="Bad samples: fail (list them all, write nothing), quarantine (leave them out), or reencode (keep "
            "what decodes of damaged JPEGs, leave out the others).",
        ),
    ] = "fail",
    max_bad: Annotated[
        str | None,
        typer.Option(help=f"quarantine, reencode: leave out at most N samples, or N%.  [default: {DEFAULT_MAX_BAD}]"),
    ] = None,
    page_mib: Annotated[
        int, typer.Option(help="Size of the beton's pages, MiB; the largest image must fit in one.")
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Convert a data set, or resume an interrupted conversion.

    The result is the same, byte for byte, for any number of workers and interruptions. If RAY_ADDRESS is set, the work
    runs on that cluster, otherwise on a local Ray.

    Example: data-prep convert --source image-folder --input imagenet --output data/imagenet/train.beton --max-side 500
    """
    from data_prep.converter.convert import convert as run_conversion
    from data_prep.converter.split import convert_splits
    from data_prep.native import is_built

    started_s = time.monotonic()
    rule = _split_rule(output, val_share, split_seed, split_from)
    with StopFlag() as stop, progress_on_stderr() as progress:
        arguments: dict[str, Any] = {
            "input": input_,
            "split": split,
            "options": options,
            "classes": classes,
            "skip_unlisted": skip_unlisted,
            "settings": _settings(
                encode, raw_share, seed, max_side, quality, subsampling, page_mib, exif, background, check
            ),
            "bad_policy": _bad_policy(on_error, max_bad),
            "workers": workers,
            "progress": progress,
            "stop": stop,
        }
        if rule is None:
            outcomes = {"": run_conversion(source, output, **arguments)}
        else:
            outcomes = convert_splits(source, output, rule, **arguments)
    if not is_built():
        typer.echo(
            "the C extension is not built from these sources, so converting takes twice as long; run make setup",
            err=True,
        )
    seconds = round(time.monotonic() - started_s, 3)
    for outcome in outcomes.values():
        _print_outcome(outcome, exif, seconds)
    if as_json:
        facts = {name: {**_facts(outcome), "seconds": seconds} for name, outcome in outcomes.items()}
        typer.echo(json.dumps(facts[""] if rule is None else {"ok": True, "path": output, "splits": facts}))


def _print_outcome(outcome: ConvertReport, exif: str, seconds: float) -> None:
    from data_prep.converter.output import QUARANTINE, SALVAGED, open_output

    manifest = outcome.manifest
    if outcome.already_done:
        echo(f"{outcome.path}: already done, nothing to do")
    echo(
        f"{outcome.path}: {manifest.num_samples:,} images of {manifest.num_classes} classes, split "
        f"{manifest.source['split']}, {manifest.num_untouched:,} with the source's own bytes, "
        f"{manifest.beton_bytes / 1e6:,.1f} MB, {seconds:.1f} s"
    )
    if outcome.num_rotated:
        ignored = "ignored, as torchvision does with JPEGs; --exif apply turns them upright"
        done = "applied" if exif == "apply" else ignored
        echo(f"{outcome.num_rotated:,} images have an EXIF orientation, which was {done}")
    if manifest.quarantined:
        listed = open_output(outcome.path).name_of(QUARANTINE)
        echo(f"{len(manifest.quarantined):,} bad samples were left out: {listed}")
    if manifest.salvaged:
        listed = open_output(outcome.path).name_of(SALVAGED)
        echo(f"{len(manifest.salvaged):,} damaged JPEGs were encoded again from what decodes of them: {listed}")
    if manifest.source["label_checks"]:
        echo(f"labels: {'; '.join(manifest.source['label_checks'])}")
    typer.echo(f"digest {manifest.digest}")
    for warning in outcome.warnings:
        typer.echo(f"data-prep: warning: {warning}", err=True)


def _facts(outcome: ConvertReport) -> dict[str, Any]:
    """For the line of JSON."""
    manifest = outcome.manifest
    return {
        **facts_of(outcome.path, manifest),
        "num_quarantined": len(manifest.quarantined),
        "num_salvaged": len(manifest.salvaged),
        "num_untouched": manifest.num_untouched,
        "already_done": outcome.already_done,
        "warnings": list(outcome.warnings),
        "num_units_taken_over": outcome.num_units_resumed,
        "notes": list(outcome.notes),
    }


def require_settings(**options: Any) -> None:
    """UserError for options, by the names of `convert`'s arguments, that would be refused for any source."""
    from data_prep.sources import require_known

    require_known(options["source"])
    for check in (_settings, _bad_policy, _split_rule):
        check(**{key: options[key] for key in signature(check).parameters})


def _split_rule(
    output: str, val_share: float | None, split_seed: int | None, split_from: str | None
) -> SplitRule | None:
    """None: one beton is to be made."""
    from data_prep.converter.split import SplitRule

    if split_seed is not None and val_share is None:
        raise UserError("--split-seed draws the images of --val-share; add that")
    rule = SplitRule(val_share, split_seed or 0, split_from)
    if output.endswith(BETON):
        if rule.is_given:
            option = "--val-share" if split_from is None else "--split-from"
            raise UserError(
                f"--output {output}: {option} makes train.beton and val.beton; give a folder for both, such as "
                f"{output.rpartition('/')[0] or '.'}/"
            )
        return None
    if not rule.is_given and not output.endswith("/") and not Path(output).expanduser().is_dir():
        raise UserError(
            f"--output {output}: expected a name that ends in {BETON}, or a folder, {output}/, for train.beton and "
            "val.beton"
        )
    return rule


def _settings(
    encode: str,
    raw_share: float | None,
    seed: int | None,
    max_side: int | None,
    quality: int | None,
    subsampling: str | None,
    page_mib: int,
    exif: str,
    background: str | None,
    check: str,
) -> ConvertSettings:
    if encode == "raw" and (quality is not None or subsampling is not None):
        raise UserError("--quality and --subsampling are for JPEGs; --encode raw writes none")
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
        background=None if background is None else _colour(background),
        check=check,  # type: ignore[arg-type]
    )


def _colour(text: str) -> tuple[int, int, int]:
    parts = re.fullmatch(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*", text, re.ASCII)
    if parts is None or max(map(int, parts.groups())) > 255:
        raise UserError(f"--background {text}: expected R,G,B, each 0..255, such as 255,255,255")
    red, green, blue = map(int, parts.groups())
    return red, green, blue


def _bad_policy(on_error: str, max_bad: str | None) -> BadPolicy:
    if on_error == "fail" and max_bad is not None:
        raise UserError(
            "--max-bad limits what --on-error quarantine or reencode leaves out; add one of them, or omit --max-bad"
        )
    return BadPolicy(on_error, DEFAULT_MAX_BAD if max_bad is None else max_bad)  # type: ignore[arg-type]
