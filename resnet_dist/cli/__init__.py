"""The `resnet-dist` command: words to calls. Heavy libraries are imported where they are used.

One module per group of commands; exit codes are those of `data_prep.runtime.exit_codes`.
"""

from __future__ import annotations

import os
import sys

import typer

from data_prep.runtime.exit_codes import run_and_exit
from resnet_dist.cli.bench import bench_app
from resnet_dist.cli.models import evaluate, export
from resnet_dist.cli.new import new
from resnet_dist.cli.recipes import plan, schedules, show, show_batch
from resnet_dist.cli.runs import doctor, runs, tracking_app
from resnet_dist.cli.study import study_app
from resnet_dist.cli.submit import PASSED_ON, submit
from resnet_dist.cli.train import train
from resnet_dist.cli.tune import tune_app
from resnet_dist.tracking.connection import configure_environment

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distributed training of ResNets whose results depend on the recipe alone.",
)
app.command()(new)
app.command()(train)
app.command(context_settings=PASSED_ON)(submit)
app.command()(evaluate)
app.command()(export)
app.command()(show)
app.command()(show_batch)
app.command()(schedules)
app.command()(plan)
app.command()(runs)
app.command()(doctor)
app.add_typer(tune_app, name="tune")
app.add_typer(tracking_app, name="tracking")
app.add_typer(bench_app, name="bench")
app.add_typer(study_app, name="study")


def main() -> None:
    """Runs the command line and exits."""
    for line in configure_environment(os.environ):
        print(f"resnet-dist: {line}", file=sys.stderr)
    run_and_exit(app, "resnet-dist")
