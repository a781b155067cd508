"""`resnet-dist train`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer

from resnet_dist.cli.options import AsJson, ProfileFile, ProfileSets, RecipeFile, Sets, load_profile_file
from resnet_dist.config.loading import load_recipe, recipe_from_tree
from resnet_dist.config.recipe import Recipe
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
            help="Continue this run's checkpoint as a new run: more epochs, another schedule, a cooldown. The recipe "
            "says how; needs a --name.",
        ),
    ] = None,
    overfit_batch: Annotated[
        bool,
        typer.Option(
            "--overfit-batch",
            help="Train on the first global batch alone, 200 steps (or train.max_steps) at optim.lr, without what "
            "keeps the loss up: its loss must fall to almost 0. The run has a name of its own and registers no model.",
        ),
    ] = False,
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
    if overfit_batch:
        loaded = overfitting(loaded)
    run_name = name or f"{'overfit-' if overfit_batch else ''}{default_run_name(recipe, loaded)}"
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
    if overfit_batch:
        typer.echo(require_overfit(result.metrics, loaded, result.step), err=as_json)
    if as_json:
        typer.echo(json.dumps(asdict(result), sort_keys=True))
        return
    typer.echo(f"top-1 {result.metrics['val/top1']:.2f} % on the validation set after {result.step} steps")
    if result.reason:
        typer.echo(f"finished early: {result.reason}")
    typer.echo(f"run        {result.name}: MLflow run {result.run_id} at {result.tracking_uri}")
    typer.echo(f"model      {result.model_uri}")
    typer.echo(f"checkpoint {result.checkpoint}")


_OVERFIT_STEPS = 200
_SMALL_LOSS = 0.05
"""Of the loss of a net that finds all classes equally likely."""


def overfitting(recipe: Recipe) -> Recipe:
    """The recipe for a run on its first global batch alone: without what keeps the loss up (mixing, smoothing, masks of
    layers), at a constant learning rate, evaluated at the end only."""
    steps = recipe.train.max_steps or _OVERFIT_STEPS
    return recipe_from_tree(
        recipe.model_dump(mode="json"),
        {
            "data.overfit_batch": True,
            "data.mixing": None,
            "data.progressive_size": None,
            "data.augmentation_repeats": 1,
            "model.drop_path": 0.0,
            "model.dropout": 0.0,
            "model.shortcut_dropout": 0.0,
            "train.label_smoothing": 0.0,
            "train.ema": None,
            "train.early_stop": None,
            "train.bn_statistics_steps": None,
            "train.max_steps": steps,
            "train.total_epochs": max(steps, recipe.train.total_epochs),
            "schedule": {"kind": "linear", "final_factor": 1.0},
            "eval.every_epochs": max(steps, recipe.train.total_epochs),
        },
    )


def require_overfit(metrics: Mapping[str, float], recipe: Recipe, steps: int) -> str:
    """Says that the net learnt its one batch. Raises Fault if it did not."""
    loss, wrong = metrics["train/loss"], metrics["train/top1_error"]
    start = math.log(recipe.model.num_classes if recipe.train.loss.kind == "cross_entropy" else 2)
    reached = (
        f"after {steps} steps on one batch of {recipe.train.global_batch_size} images the loss is {loss:.3g}, "
        f"{100 * loss / start:.1f} % of an untrained net's, and {wrong:.3g} % of them are wrong"
    )
    if not (loss <= _SMALL_LOSS * start and wrong == 0):
        raise Fault(
            f"does not overfit: {reached}; try more steps (--set train.max_steps=1000) and another optim.lr, then look "
            "at labels, data.mean and data.std"
        )
    return f"overfits, as it should: {reached}"
