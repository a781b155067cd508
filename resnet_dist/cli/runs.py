"""`resnet-dist runs`, `tracking ...` and `doctor`: runs in MLflow and in storage, and clusters, examined."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.shown import shown
from resnet_dist.cli.options import AsJson, ProfileSets, TrackingUri, load_profile_file, require_tracking_uri
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from resnet_dist.tracking.experiment import Difference, RunRow

tracking_app = typer.Typer(no_args_is_help=True, help="Bring runs and data sets to MLflow.")
_COLORS = {"FINISHED": "green", "RUNNING": "cyan", "FAILED": "red", "KILLED": "yellow"}


def runs(
    tracking_uri: TrackingUri = None,
    experiment: Annotated[str | None, typer.Option(help="Only the runs of this experiment.  [default: all]")] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="RUN RUN", help="Compare two runs, given by name or id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in MLflow, newest first, or compare two of them.

    Example: resnet-dist runs --tracking-uri sqlite:///runs/mlflow.db --compare demo demo2
    """
    from rich.console import Console

    from resnet_dist.tracking.experiment import differences, find_run, list_runs

    rows = list_runs(require_tracking_uri(tracking_uri), experiment)
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


def print_runs(rows: Sequence[RunRow], console: Console) -> None:
    """One line for each run, newest first; says so if there is none."""
    from rich.table import Table

    if not rows:
        console.print("no runs")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    # Only where it says more than top-1: where classes have different numbers of validation images.
    pairs = [(row.metrics.get("val/balanced_top1"), row.metrics.get("val/top1")) for row in rows]
    balanced = any(a is not None and b is not None and abs(a - b) > 0.005 for a, b in pairs)
    more = ("balanced %",) if balanced else ()
    for header in ("run", "status", "model", "top-1 %", *more, "loss", "images/s", "started", "id"):
        table.add_column(header, no_wrap=header != "run", overflow="fold")
    for row in rows:
        table.add_row(
            _plain(row.name),
            f"[{_COLORS.get(row.status, 'white')}]{row.status}[/]",
            _plain(row.params.get("model.name", "")),
            _number(row, "val/top1", ".2f"),
            *((_number(row, "val/balanced_top1", ".2f"),) if balanced else ()),
            _number(row, "train/loss", ".4f"),
            _number(row, "speed/images_per_s", ".0f"),
            time.strftime("%m-%d %H:%M", time.localtime(row.start_ms / 1000)),
            row.run_id[:8],
        )
    console.print(table)


def print_differences(first: RunRow, second: RunRow, found: Sequence[Difference], console: Console) -> None:
    from rich.table import Table

    table = Table("", title="what differs, and every metric's last value")
    for run in (first, second):
        table.add_column(_plain(run.name))
    for pair in found:
        table.add_row(*(_plain(text or "") for text in (pair.key, pair.first, pair.second)))
    console.print(table)


def _plain(text: str) -> Text:
    """The text without control characters. Names come from a server, and rich would read `[...]` in them as markup."""
    from rich.text import Text

    return Text(shown(text))


def _number(row: RunRow, key: str, form: str) -> str:
    return format(row.metrics[key], form) if key in row.metrics else ""


@tracking_app.command()
def record_data(
    betons: Annotated[
        list[str], typer.Argument(metavar="FILE.beton|URL...", help="Betons with their manifests beside them.")
    ],
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Record in MLflow how betons were made: digest, settings, source, counts; once for each digest.

    Later trainings on these betons link to the record.

    Example: resnet-dist tracking record-data data/train.beton s3://bucket/val.beton --tracking-uri http://mlflow:5000
    """
    from resnet_dist.tracking.datasets import record_beton

    uri = require_tracking_uri(tracking_uri)
    recorded = [record_beton(uri, beton) for beton in betons]
    if as_json:
        typer.echo(json.dumps([asdict(record) for record in recorded]))
        return
    for record in recorded:
        typer.echo(f"{record.beton}: {'recorded' if record.is_new else 'was recorded'} as run {record.run_id}")


@tracking_app.command()
def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run under the profile's storage: a folder or s3://...")],
    tracking_uri: TrackingUri = None,
) -> None:
    """Send to MLflow what it lacks of a run: metrics, model, registration, end status. Safe at any time.

    Example: resnet-dist tracking sync runs/demo --tracking-uri http://mlflow:5000
    """
    from resnet_dist.launch.publish import sync_run
    from resnet_dist.storage.locations import open_storage

    typer.echo(sync_run(open_storage(run), require_tracking_uri(tracking_uri), lambda line: typer.echo(line, err=True)))


def doctor(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run under the profile's storage: a folder or s3://...")
    ] = None,
    repair_: Annotated[
        bool, typer.Option("--repair", help="Remove RUN's damaged files and leftovers, which nothing needs.")
    ] = False,
    on: Annotated[
        Path | None, typer.Option("--on", metavar="PROFILE", help="Profile whose cluster to examine.")
    ] = None,
    profile_set: ProfileSets = [],
) -> None:
    """Examine a run's storage, or a cluster before a run.

    RUN: what is complete, what is damaged, and where the run would resume. --on PROFILE: versions, clocks, disks,
    shared paths, ports and network speed; with GPUs also the driver, their health and the speed between them.

    Example: resnet-dist doctor runs/demo

    Example: resnet-dist doctor --on cluster/profiles/laptop.yaml
    """
    if (run is None) == (on is None):
        raise UserError("give either a RUN, to examine its storage, or --on PROFILE, to examine a cluster")
    if on is not None:
        _examine_cluster(on, profile_set)
    elif run is not None:
        _examine_run(run, repairs=repair_)


def _examine_run(run: str, *, repairs: bool) -> None:
    from resnet_dist.doctor.run import examine, repair, verdict
    from resnet_dist.storage.locations import open_storage

    storage = open_storage(run)
    findings = examine(storage)
    for finding in findings:
        typer.echo(f"{finding.state:<9} {finding.name:<32} {finding.what}")
    for finding in repair(storage, findings) if repairs else []:
        typer.echo(f"removed   {finding.name}")
    typer.echo(verdict(findings))


def _examine_cluster(on: Path, profile_sets: list[str]) -> None:
    from resnet_dist.doctor.cluster import examine_cluster
    from resnet_dist.doctor.verdicts import Check

    def show(check: Check) -> None:
        typer.echo(f"{check.state:<9} {check.where:<16} {check.what}")

    if not examine_cluster(load_profile_file(on, profile_sets), show):
        typer.echo("the cluster is not fit for this profile: see the lines that begin with `bad`", err=True)
        raise typer.Exit(1)
