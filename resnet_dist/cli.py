"""The `resnet-dist` command: words to calls, and ends to exit codes. Heavy libraries are imported where they are used.

Exit codes: 0 done, 2 the user's mistake (one line on stderr), 1 anything else, 130/143 stopped after a checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.config.loading import load_profile, load_recipe
from resnet_dist.config.profile import Profile, absolute_paths
from resnet_dist.config.recipe import Recipe, recipe_hash
from resnet_dist.errors import Fault, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distributed training of ResNets whose results depend on the recipe alone.",
)
tracking_app = typer.Typer(no_args_is_help=True, help="The MLflow side of a run.")
app.add_typer(tracking_app, name="tracking")
bench_app = typer.Typer(no_args_is_help=True, help="Measure parts of the system beside their peers, paired in one run.")
app.add_typer(bench_app, name="bench")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
ProfileFile = Annotated[Path, typer.Option("--on", metavar="PROFILE", help="A profile's YAML file.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
ProfileSets = Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Override a key of the profile.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]


def _load(recipe: Path, on: Path, sets: list[str], profile_sets: list[str]) -> tuple[Recipe, Profile]:
    from resnet_dist.tracking.uris import absolute_tracking_uri

    profile = absolute_paths(load_profile(on, profile_sets), Path.cwd())
    profile = profile.model_copy(update={"tracking_uri": absolute_tracking_uri(profile.tracking_uri, Path.cwd())})
    return load_recipe(recipe, sets), profile


@app.command()
def train(
    recipe: RecipeFile,
    on: ProfileFile,
    set_: Sets = [],  # noqa: B006 - typer reads the default, nothing writes it
    profile_set: ProfileSets = [],  # noqa: B006
    name: Annotated[
        str | None,
        typer.Option(help="The run's name; the same name goes on with the same run.  [default: RECIPE-HASH]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would run, start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on a profile's hardware, or go on where it stands.

    Example: resnet-dist train resnet_dist/recipes/digits_resnet20.yaml --on cluster/profiles/laptop.yaml
    """
    loaded, profile = _load(recipe, on, set_, profile_set)
    run_name = name or f"{recipe.stem}-{recipe_hash(loaded)[:8]}"
    if dry_run:
        from resnet_dist.launch.dry_run import describe_run

        typer.echo(describe_run(loaded, profile, run_name))
        return
    from resnet_dist.launch.train import Stopped, train

    result = train(loaded, profile, run_name)
    if isinstance(result, Stopped):
        typer.echo(
            f"stopped after step {result.step}; the same command goes on from there ({result.run_dir})", err=True
        )
        raise typer.Exit(result.exit_code)
    if as_json:
        typer.echo(json.dumps(asdict(result), sort_keys=True))
        return
    typer.echo(f"top-1 {result.metrics['val/top1']:.2f} % on the validation set after {result.step} steps")
    typer.echo(f"run        {result.name}: MLflow run {result.run_id} at {result.tracking_uri}")
    typer.echo(f"model      {result.model_uri}")
    typer.echo(f"checkpoint {result.checkpoint}")


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT_OR_MODEL_URI", help="A checkpoint's folder, a run's folder, or an MLflow model URI."
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="FILE.beton", help="The beton to evaluate on.")],
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file of a model URI.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Loader and compute threads.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint or a logged model exactly: every sample once.

    Example: resnet-dist evaluate runs/demo/epoch=012-step=00000132 --data data/digits/val.beton
    """
    from resnet_dist.launch.evaluate import evaluate_on
    from resnet_dist.tracking.uris import absolute_tracking_uri

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    metrics = evaluate_on(model, data, absolute_tracking_uri(uri, Path.cwd()) if uri else None, threads)
    if as_json:
        typer.echo(json.dumps(metrics, sort_keys=True))
        return
    typer.echo(f"top-1 {metrics['val/top1']:.2f} %  top-5 {metrics['val/top5']:.2f} %  loss {metrics['val/loss']:.6f}")


@app.command()
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
def sync(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder under the profile's storage.")],
    tracking_uri: Annotated[str, typer.Option(help="The MLflow server, or sqlite file, that the run belongs to.")],
) -> None:
    """Send what a run could not send while its MLflow server was away.

    Example: resnet-dist tracking sync runs/demo --tracking-uri http://mlflow:5000
    """
    from resnet_dist.tracking.sync import sync as sync_run
    from resnet_dist.tracking.uris import absolute_tracking_uri

    typer.echo(str(sync_run(run_dir, absolute_tracking_uri(tracking_uri, Path.cwd()))))


@bench_app.command("loader")
def bench_loader(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", help="JPEGs of the size that interests you.")],
    threads: Annotated[int, typer.Option(min=1, help="Loader threads of every peer.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of every peer, in turns.")] = 5,
) -> None:
    """Our loader against stock FFCV, torchvision and, where it is installed, DALI, as a Markdown table.

    Example: resnet-dist bench loader data/imagenet/val.beton --threads 2
    """
    from resnet_dist.bench.loader import bench_loader as measure

    typer.echo(measure(beton, num_threads=threads, rounds=rounds))


@app.command()
def doctor(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder under the profile's storage.")],
    mend: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged or left over; nothing needs it.")
    ] = False,
) -> None:
    """Look through a run's storage: what is whole, what is not, and where the run would go on.

    Example: resnet-dist doctor runs/demo
    """
    from resnet_dist.launch.doctor import examine, repair, verdict

    findings = examine(run_dir)
    for finding in findings:
        typer.echo(f"{finding.state:<9} {finding.path.name:<32} {finding.what}")
    for finding in repair(findings) if mend else []:
        typer.echo(f"removed   {finding.path.name}")
    typer.echo(verdict(findings))


def main() -> None:
    """Runs the command line and exits; see the module's docstring for the exit codes."""
    try:
        sys.exit(app(standalone_mode=False, prog_name="resnet-dist"))
    except typer.TyperException as error:
        _fail(error.exit_code, error.format_message() or "see --help")
    except (typer.Abort, KeyboardInterrupt):
        _fail(130, "interrupted")
    except UserError as error:
        _fail(2, str(error))
    except Fault as error:
        _fail(1, str(error))
    except Exception as error:  # noqa: BLE001 - the last line of defence: the cause in one line, the rest in a file
        with tempfile.NamedTemporaryFile("w", prefix="resnet-dist-", suffix=".log", delete=False) as log:
            traceback.print_exception(error, file=log)
        _fail(1, f"unexpected {type(error).__name__}: {error}; the whole story is in {log.name}")


def _fail(code: int, message: str) -> None:
    print(f"resnet-dist: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
