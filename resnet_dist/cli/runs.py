"""`resnet-dist runs` and `resnet-dist tracking ...`: the MLflow side of runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import AsJson
from resnet_dist.errors import UserError

tracking_app = typer.Typer(no_args_is_help=True, help="The MLflow side of a run.")


def runs(
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Only this experiment.  [default: all]")] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="RUN RUN", help="Two runs, by name or id, side by side.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs that MLflow has, newest first, or compare two.

    Example: resnet-dist runs --tracking-uri sqlite:///runs/mlflow.db --compare demo demo2
    """
    from rich.console import Console

    from resnet_dist.launch.run_table import print_differences, print_runs
    from resnet_dist.tracking.listing import differences, find_run, list_runs
    from resnet_dist.tracking.uris import absolute_tracking_uri

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise UserError("--tracking-uri: give the MLflow to list, for example sqlite:///runs/mlflow.db")
    rows = list_runs(absolute_tracking_uri(uri, Path.cwd()), experiment)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if compare is not None:
        first, second = (find_run(rows, name) for name in compare)
        found = differences(first, second)
        if as_json:
            typer.echo(json.dumps([asdict(pair) for pair in found]))
            return
        print_differences(first, second, found, console)
        return
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    print_runs(rows, console)


@tracking_app.command()
def record_data(
    betons: Annotated[list[str], typer.Argument(metavar="FILE.beton|URL...", show_default=False)],
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Record in MLflow how betons were made: digest, settings, source, counts. Once for each digest.

    Trainings on them that start later link to it.

    Example: resnet-dist tracking record-data data/train.beton s3://bucket/val.beton --tracking-uri http://mlflow:5000
    """
    from resnet_dist.launch.preparation import record_beton
    from resnet_dist.tracking.uris import absolute_tracking_uri

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise UserError("--tracking-uri: give the MLflow to record in, for example sqlite:///runs/mlflow.db")
    recorded = [record_beton(absolute_tracking_uri(uri, Path.cwd()), beton) for beton in betons]
    if as_json:
        typer.echo(json.dumps([asdict(record) for record in recorded]))
        return
    for record in recorded:
        typer.echo(f"{record.beton}: {'recorded' if record.is_new else 'was recorded'} as run {record.run_id}")


@tracking_app.command()
def sync(
    run: Annotated[str, typer.Argument(help="The run under the profile's storage: a folder or s3://.")],
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            help="The MLflow server, or sqlite file, that the run belongs to.  [default: $MLFLOW_TRACKING_URI]"
        ),
    ] = None,
) -> None:
    """Bring to MLflow what it does not have of a run: metrics, model, registration, end. Harmless at any time.

    Example: resnet-dist tracking sync runs/demo --tracking-uri http://mlflow:5000
    """
    from resnet_dist.launch.completion import sync_run
    from resnet_dist.storage.location import open_storage
    from resnet_dist.tracking.uris import absolute_tracking_uri

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise UserError("--tracking-uri: give the MLflow that the run belongs to, for example sqlite:///runs/mlflow.db")
    storage, uri = open_storage(run), absolute_tracking_uri(uri, Path.cwd())
    typer.echo(sync_run(storage, uri, lambda line: typer.echo(line, err=True)))
