"""`data-prep stage`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.cli.options import AsJson, checked, print_json


def stage(
    source: Annotated[str, typer.Argument(metavar="FILE.beton|URL", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder on this machine's own disk.", show_default=False)],
    wait_limit_s: Annotated[float, typer.Option(help="How long to wait for another process that is copying.")] = 7200.0,
    as_json: AsJson = False,
) -> None:
    """Copy a beton from shared or object storage to this machine, once, and print the copy's path.

    Every chunk is compared with the manifest; an interrupted copy resumes; processes that ask meanwhile wait.

    Example: data-prep stage s3://bucket/imagenet/train.beton --to /local/cache
    """
    from data_prep.beton.stage import stage as run_stage
    from data_prep.convert.progress import progress_on
    from data_prep.convert.stop import stop_on_signals

    with stop_on_signals() as stop, progress_on(sys.stderr) as progress:
        path = run_stage(source, to, wait_limit_s=wait_limit_s, on_copied=checked(stop, progress), check=stop.check)
    typer.echo(str(path))
    if as_json:
        print_json(ok=True, path=str(path))
