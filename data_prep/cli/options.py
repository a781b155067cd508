"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.beton.manifest import Manifest
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
Input = Annotated[str | None, typer.Option("--input", metavar="PATH", help="Folder, file, glob or URL to read.")]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Use exactly these classes, in this order: a file with one name per line (or name, tab, label), or a "
        "data set's .beton or manifest.",
    ),
]
SkipUnlisted = Annotated[
    bool, typer.Option("--skip-unlisted", help="Leave out images of classes that --classes does not list.")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]

_SOURCE_OPTIONS = {
    "labels": typer.Option(
        metavar="FILE",
        help="image-folder: a table with the class of every image. hf-parquet, webdataset: a file of class names.",
    ),
    "devkit": typer.Option(metavar="FILE", help="ilsvrc: the devkit, if it is not beside the images."),
    "class_order": typer.Option(metavar="text|number", help="How to sort classes whose names are numbers."),
    "image_column": typer.Option(
        metavar="NAME", help="hf-parquet: the column of the images. webdataset: the suffix of the image files."
    ),
    "label_column": typer.Option(
        metavar="NAME",
        help="hf-parquet and the table of --labels: the column of the labels. webdataset: the suffix of the label "
        "files, or a key in .json.",
    ),
    "file_column": typer.Option(metavar="NAME", help="The table of --labels: the column of the file names."),
    "folders_are": typer.Option(
        metavar="classes|splits", help="image-folder: what the folders in --input are, if that is ambiguous."
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
    """An absolute path. Raises UserError for a URL, which Path has turned into `s3:/bucket/...`."""
    scheme, slash, _ = str(path).partition(":/")
    if slash and scheme.isalnum() and not path.exists():
        raise UserError(f"{path}: a URL; `data-prep stage URL --to FOLDER` copies a beton to this machine first")
    return path.expanduser().absolute()


def echo(line: str) -> None:
    """Prints a line that may contain untrusted file names."""
    typer.echo(shown(line, None))


def facts_of(path: str, manifest: Manifest) -> dict[str, Any]:
    """How the JSON line about a beton that was written begins."""
    return {
        "ok": True,
        "path": path,
        "digest": manifest.digest,
        "num_samples": manifest.num_samples,
        "num_classes": manifest.num_classes,
        "beton_bytes": manifest.beton_bytes,
    }


def checked(stop: StopFlag, progress: Progress) -> Callable[[int, int], None]:
    """To be called after each range that is written: shows progress, and ends the work if a stop was requested."""

    def after_range(num_bytes: int, total: int) -> None:
        stop.check()
        progress.written(num_bytes, total)

    return after_range
