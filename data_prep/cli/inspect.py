"""`data-prep inspect`: what a source contains, on a terminal or in a log."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from data_prep.cli.options import (
    AsJson,
    Classes,
    Input,
    SkipUnlisted,
    SourceKind,
    takes_source_options,
)
from data_prep.cli.progress import progress_on_stderr
from data_prep.shown import shown
from data_prep.sources.base import NO_OPTIONS, SourceOptions


@takes_source_options
def inspect(
    source: SourceKind,
    input_: Input = None,
    split: Annotated[str | None, typer.Option(help="Split of the source.")] = None,
    options: SourceOptions = NO_OPTIONS,
    classes: Classes = None,
    skip_unlisted: SkipUnlisted = False,
    headers: Annotated[int, typer.Option(min=1, help="How many images to read the headers of, spread evenly.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Survey a data set before it is converted: counts, sizes, formats, classes, first samples, anything odd.

    Example: data-prep inspect --source image-folder --input imagenet --split val
    """
    from data_prep.converter.source import open_named
    from data_prep.converter.survey import survey
    from data_prep.sources.splits import SplitRequest

    request = SplitRequest(split, explicit=split is not None)
    with progress_on_stderr() as progress:
        opened = open_named(source, input_, request, options, classes, skip_unlisted=skip_unlisted)
        found = survey(opened, headers, on_header=progress.decoded)
    show(found, sys.stdout)
    if as_json:
        typer.echo(json.dumps({"ok": True, **found.as_dict()}))


# --- the survey on a terminal or in a log -----------------------------------------------------------------------------


if TYPE_CHECKING:
    from data_prep.converter.survey import Header, Spread, Survey

MAX_CLASSES_SHOWN = 20
WIDTH = 160
"""Columns where there is no terminal."""
NUM_ENDS_SHOWN = 5
"""With more classes, only this many of the first and last."""


def show(survey: Survey, stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False, width=None if stream.isatty() else WIDTH)
    facts = Table.grid(padding=(0, 2))
    for name, value in describe(survey).items():
        facts.add_row(name, shown(value, None))
    first = Table("label", "class", "bytes", "image", "first samples", box=None, padding=(0, 2, 0, 0))
    for header in survey.first:
        class_name = survey.class_names[header.label]
        values = (str(header.label), class_name, f"{header.num_bytes:,}", _image(header), header.key)
        first.add_row(*map(shown, values))
    classes = Table("label", "class", "samples", box=None, padding=(0, 2, 0, 0))
    for row in class_rows(survey):
        classes.add_row(*map(shown, row))
    for table in (facts, classes, first):
        for column in table.columns:
            column.overflow = "fold"
        console.print(table, markup=False)
        console.print()
    for finding in survey.findings:
        console.print(f"finding: {finding}", markup=False)
    if not survey.findings:
        console.print("nothing odd was found", markup=False)


def describe(survey: Survey) -> dict[str, str]:
    """Name -> value of every fact, in order."""
    source = survey.source
    read = f"of {survey.num_headers:,} headers read"
    counts = survey.class_counts
    facts = {
        "source": f"{source['name']} {source['location']}",
        "split": str(source["split"]),
        "samples": f"{survey.num_samples:,}",
        "classes": f"{len(counts):,}, of {min(counts):,} to {max(counts):,} samples",
        "file bytes": _spread(survey.file_bytes) + ("" if survey.file_bytes_of_all else f" ({read})"),
        "height px": _spread(survey.heights),
        "width px": _spread(survey.widths),
        "formats": _shares(survey.formats),
        "modes": _shares(survey.modes),
        "stored as is": f"{survey.num_passed_through:,} {read} are JPEGs that ffcv decodes",
        "EXIF rotation": f"{survey.num_rotated:,} {read}",
    }
    if source["label_checks"]:
        facts["labels"] = "; ".join(source["label_checks"])
    return facts


def class_rows(survey: Survey) -> list[tuple[str, str, str]]:
    """Label, name and count; of many classes only the ends."""
    rows = [
        (str(label), name, f"{count:,}")
        for label, (name, count) in enumerate(zip(survey.class_names, survey.class_counts, strict=True))
    ]
    if len(rows) <= MAX_CLASSES_SHOWN:
        return rows
    return [*rows[:NUM_ENDS_SHOWN], ("...", "...", "..."), *rows[-NUM_ENDS_SHOWN:]]


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "unknown"
    return f"{spread.min:,} to {spread.max:,}, median {spread.median:,.0f}, mean {spread.mean:,.0f}"


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in counts.items()) or "none"


def _image(header: Header) -> str:
    return header.problem or f"{header.file_format} {header.mode} {header.width} x {header.height}"
