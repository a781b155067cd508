"""`resnet-dist train`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from resnet_dist.cli.options import AsJson, ProfileFile, ProfileSets, RecipeFile, Sets, load_profile_file
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.run_name import default_run_name
from resnet_dist.errors import Fault, UserError


def train(
    recipe: RecipeFile,
    on: ProfileFile,
    set_: Sets = [],
    profile_set: ProfileSets = [],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the run; the same name resumes the same run.  [default: RECIPE-HASH]"),
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="RUN[@EPOCH]",
            help="Continue this run's checkpoint as a new run: more epochs, another schedule. The recipe says how; "
            "needs a --name.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would run, start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe on a profile's hardware, or resume the run with that name.

    Example: resnet-dist train resnet_dist/recipes/digits_resnet20.yaml --on cluster/profiles/laptop.yaml
    """
    profile = load_profile_file(on, profile_set)
    if fork is not None:
        if name is None:
            raise UserError("--fork: the new run needs a --name of its own")
        set_ = [f"fork={json.dumps({'checkpoint': fork})}", *set_]
    loaded = load_recipe(recipe, set_)
    run_name = name or default_run_name(recipe, loaded)
    if dry_run:
        from resnet_dist.launch.preflight import describe_run

        typer.echo(describe_run(loaded, profile, run_name))
        return
    from resnet_dist.launch.train import train

    result = train(loaded, profile, run_name)
    if result.outcome == "diverged":
        raise Fault(
            f"training diverged: {result.reason} ({result.run_dir}); lower optim.lr or lengthen schedule.warmup, and "
            "use a new --name"
        )
    if result.outcome == "stopped":
        typer.echo(
            f"stopped after step {result.step}; the same command resumes from there ({result.run_dir})", err=True
        )
        raise typer.Exit(128 + (result.stop_signal or 0))  # the shell's convention: 130 for Ctrl-C, 143 for SIGTERM
    if as_json:
        typer.echo(json.dumps(asdict(result), sort_keys=True))
        return
    typer.echo(f"top-1 {result.metrics['val/top1']:.2f} % on the validation set after {result.step} steps")
    if result.reason:
        typer.echo(f"finished early: {result.reason}")
    typer.echo(f"run        {result.name}: MLflow run {result.run_id} at {result.tracking_uri}")
    typer.echo(f"model      {result.model_uri}")
    typer.echo(f"checkpoint {result.checkpoint}")
