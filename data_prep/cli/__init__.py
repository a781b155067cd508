"""The `data-prep` command. Heavy libraries are imported where they are used.

One module per group of commands; exit codes are those of `data_prep.runtime.exit_codes`.
"""

from __future__ import annotations

import typer

from data_prep.cli.betons import adopt, merge, stage, subset, verify
from data_prep.cli.convert import convert
from data_prep.cli.inspect import inspect
from data_prep.cli.look import extract, list_, show
from data_prep.cli.statistics import statistics
from data_prep.runtime.exit_codes import run_and_exit

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Convert image data sets to .beton files for the ffcv Loader, and verify them.",
)
for command in (convert, inspect, verify, show, extract, statistics, merge, subset, stage, adopt):
    app.command()(command)
app.command("list")(list_)


def main() -> None:
    """Runs the command line and exits."""
    run_and_exit(app, "data-prep")
