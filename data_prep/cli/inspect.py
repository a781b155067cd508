"""`data-prep inspect`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from data_prep.cli.options import (
    AsJson,
    Classes,
    ClassOrder,
    Devkit,
    FileColumn,
    FoldersAre,
    ImageColumn,
    Input,
    LabelColumn,
    Labels,
    SourceKind,
    print_json,
)


def inspect(
    source: SourceKind,
    input_: Input = None,
    split: Annotated[str | None, typer.Option(help="Split of the source.")] = None,
    labels: Labels = None,
    devkit: Devkit = None,
    class_order: ClassOrder = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    file_column: FileColumn = None,
    folders_are: FoldersAre = None,
    classes: Classes = None,
    headers: Annotated[int, typer.Option(min=1, help="Images whose headers are read, spread evenly.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Look at a data set before anything is written: counts, sizes, formats, class map, first samples, oddities.

    Example: data-prep inspect --source image-folder --input imagenet --split val
    """
    from data_prep.cli.opening import Asked
    from data_prep.convert.progress import progress_on
    from data_prep.inspect.show import show
    from data_prep.inspect.survey import survey
    from data_prep.sources import SourceOptions
    from data_prep.sources.splits import SplitRequest

    request = SplitRequest(split, explicit=split is not None)
    options = SourceOptions(labels, devkit, class_order, image_column, label_column, file_column, folders_are)
    with progress_on(sys.stderr) as progress:
        opened = Asked(source, input_, request, options, classes).open()
        found = survey(opened, headers, on_header=progress.decoded)
    show(found, sys.stdout)
    if as_json:
        print_json(ok=True, **found.as_dict())
