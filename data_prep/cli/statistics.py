"""`data-prep statistics`: mean and deviation of a beton's pixels, for recipes with `mean: from_data`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.cli.options import AsJson, echo, local_path
from data_prep.cli.progress import progress_on_stderr
from data_prep.errors import UserError
from data_prep.runtime.stop import StopFlag


def statistics(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)], as_json: AsJson = False
) -> None:
    """Show mean and deviation of a beton's pixels, and add them to its manifest if they are not in it.

    `convert` computes them, except with --check headers. A recipe with data.mean: from_data takes them from there.

    Example: data-prep statistics data/flowers/train.beton
    """
    from data_prep.beton.files import cannot_be_written
    from data_prep.beton.manifest import manifest_path, write_manifest
    from data_prep.beton.reader import open_beton
    from data_prep.beton.statistics import measure_all

    beton = local_path(beton)
    with StopFlag() as stop, progress_on_stderr() as progress:
        reader = open_beton(beton)
        found = reader.manifest.statistics

        def on_measured(done: int, total: int) -> None:
            stop.check()
            progress.decoded(done, total)

        if not found:
            found = measure_all(len(reader), reader.stored, on_measured)
            if not found:
                raise UserError(f"{beton}: none of its images decodes; see `data-prep verify {beton}`")
            with cannot_be_written(str(manifest_path(beton))):
                write_manifest(beton, replace(reader.manifest, statistics=found))
    echo(f"{beton}: {describe(found)}")
    if as_json:
        typer.echo(json.dumps({"ok": True, "path": str(beton), **found}))


def describe(statistics: Mapping[str, Any]) -> str:
    mean, std = ([round(level, 3) for level in statistics[name]] for name in ("mean", "std"))
    return f"mean {mean}, deviation {std} (grey levels of R, G, B) over {statistics['num_images']:,} images"
