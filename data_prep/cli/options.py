"""Options that several commands share, and their last lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.converter.context import Progress
from data_prep.errors import UserError
from data_prep.runtime.stop import StopFlag
from data_prep.shown import shown
from data_prep.sources import SourceOptions

SourceKind = Annotated[
    str,
    typer.Option(
        "--source", metavar="NAME", help="Kind of source, for example image-folder or ilsvrc.", show_default=False
    ),
]
Input = Annotated[
    str | None, typer.Option("--input", metavar="PATH", help="Folder, file, glob or URL that the source reads.")
]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Exactly these classes, in this order: a name per line, or the training set's .beton."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]

_SOURCE_OPTIONS = {
    "labels": typer.Option(
        metavar="FILE",
        help="image-folder: the class of every image. hf-parquet, webdataset: the names of the classes.",
    ),
    "devkit": typer.Option(metavar="FILE", help="ilsvrc: the devkit, if not beside the images."),
    "class_order": typer.Option(
        metavar="text|number", help="How classes that are named by numbers are sorted into labels."
    ),
    "image_column": typer.Option(
        metavar="NAME", help="hf-parquet: the images' column. webdataset: the ending of their files."
    ),
    "label_column": typer.Option(
        metavar="NAME",
        help="hf-parquet, and the table of --labels: the labels' column. webdataset: the ending of their files, or key "
        "in .json.",
    ),
    "file_column": typer.Option(metavar="NAME", help="The table of --labels: the column of the files' names."),
    "folders_are": typer.Option(
        metavar="classes|splits", help="image-folder: what the folders of --input are, if ambiguous."
    ),
}
"""By the names of `sources.SourceOptions`."""


def takes_source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of sources, in place of its parameter `options: SourceOptions`."""
    declared = list(signature(command, eval_str=True).parameters.values())
    at = [parameter.name for parameter in declared].index("options")
    keyword = Parameter.POSITIONAL_OR_KEYWORD
    declared[at : at + 1] = [
        Parameter(name, keyword, default=None, annotation=Annotated[str | None, option])
        for name, option in _SOURCE_OPTIONS.items()
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        options = SourceOptions(**{name: given.pop(name) for name in _SOURCE_OPTIONS})
        command(**given, options=options)

    run.__signature__ = Signature(declared)  # type: ignore[attr-defined]  # which typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in declared}
    return run


def local_path(path: Path) -> Path:
    """Absolute. UserError for a URL, of which Path has made `s3:/bucket/...`."""
    scheme, slash, _ = str(path).partition(":/")
    if slash and scheme.isalnum() and not path.exists():
        raise UserError(f"{path}: a URL; `data-prep stage URL --to DIR` copies a beton to this machine first")
    return path.expanduser().absolute()


def echo(line: str) -> None:
    """Prints a line to stdout; it may contain untrusted file names."""
    typer.echo(shown(line, None))


def print_json(**values: Any) -> None:
    """Prints the last line of a command under `--json`."""
    print(json.dumps(values), flush=True)


def checked(stop: StopFlag, progress: Progress) -> Callable[[int, int], None]:
    """Call it after each range that is written: shows progress, and ends the work if a stop was requested."""

    def after_range(num_bytes: int, total: int) -> None:
        stop.check()
        progress.written(num_bytes, total)

    return after_range
