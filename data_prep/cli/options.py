"""Options that several commands share, and what their last lines are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.converter.context import Progress
from data_prep.errors import UserError
from data_prep.runtime.stop import StopFlag
from data_prep.shown import shown

SourceKind = Annotated[
    str,
    typer.Option(
        "--source", metavar="NAME", help="Kind of source, for example image-folder or ilsvrc.", show_default=False
    ),
]
Input = Annotated[
    str | None, typer.Option("--input", metavar="PATH", help="Folder, file, glob or URL that the source reads.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="image-folder: the class of every image. hf-parquet, webdataset: the names of the classes.",
    ),
]
Devkit = Annotated[str | None, typer.Option(metavar="FILE", help="ilsvrc: the devkit, if not beside the images.")]
ClassOrder = Annotated[
    str | None,
    typer.Option(metavar="text|number", help="How classes that are named by numbers are sorted into labels."),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="hf-parquet: the images' column. webdataset: the ending of their files."),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="hf-parquet, and the table of --labels: the labels' column. webdataset: the ending of their files, or key "
        "in .json.",
    ),
]
FileColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="The table of --labels: the column of the files' names.")
]
FoldersAre = Annotated[
    str | None,
    typer.Option(metavar="classes|splits", help="image-folder: what the folders of --input are, where not clear."),
]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Exactly these classes, in this order: a name per line, or the training set's .beton."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]


def local_path(path: Path) -> Path:
    """Absolute. UserError for a URL, of which Path has made `s3:/bucket/...`."""
    scheme, slash, _ = str(path).partition(":/")
    if slash and scheme.isalnum() and not path.exists():
        raise UserError(f"{path}: a URL; `data-prep stage URL --to DIR` copies a beton to this machine first")
    return path.expanduser().absolute()


def echo(line: str) -> None:
    """To stdout; names of files, from outside, are in it."""
    typer.echo(shown(line, None))


def print_json(**values: Any) -> None:
    """What a command ends with under `--json`."""
    print(json.dumps(values), flush=True)


def checked(stop: StopFlag, progress: Progress) -> Callable[[int, int], None]:
    """To be called after each range that is written: shows it, and ends the work if it is to stop."""

    def after_range(num_bytes: int, total: int) -> None:
        stop.check()
        progress.written(num_bytes, total)

    return after_range
