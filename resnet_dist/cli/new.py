"""`resnet-dist new`: a recipe that fits a data set."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.options import TrackingUri, given_tracking_uri
from resnet_dist.config.loading import bare_profile, recipe_from_yaml
from resnet_dist.config.new_recipe import DataFacts, StartFacts, new_recipe, suggest_net
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.weights.source import Weights


def new(
    data: Annotated[Path, typer.Option(metavar="FOLDER/train.beton", help="Training images; val.beton is beside it.")],
    output: Annotated[Path, typer.Option(metavar="RECIPE.yaml", help="Recipe to write.")],
    net: Annotated[
        str | None, typer.Option(help="Such as resnet50.  [default: by the size and number of the images]")
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="WEIGHTS",
            help="Start from these instead of from nothing: torchvision:NAME.ENTRY, timm:NAME.TAG, a .pth or "
            ".safetensors file, a run, a checkpoint, or models:/NAME/VERSION.",
        ),
    ] = None,
    tracking_uri: TrackingUri = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
) -> None:
    """Write a commented recipe that fits a data set and is ready to run.

    Example: resnet-dist new --data data/digits/train.beton --output digits.yaml
    """
    if output.exists() and not force:
        raise UserError(f"--output {output}: already exists; give another name, or --force to replace it")
    facts, warnings = read_facts(data)
    from data_prep.beton.files import write_text_atomically
    from resnet_dist.launch.preflight import require_net
    from resnet_dist.models.registry import LAYOUTS, build_model
    from resnet_dist.models.resnet import CifarResNet
    from resnet_dist.training.schedule import plan_run
    from resnet_dist.weights.keys import match_keys
    from resnet_dist.weights.published import is_published
    from resnet_dist.weights.source import read_weights

    uri = given_tracking_uri(tracking_uri)
    weights = None if from_ is None or is_published(from_) else read_weights(from_, uri)
    start = None if from_ is None else start_facts(from_, weights, facts)
    name = net or (start.net if start else None) or suggest_net(facts)
    if start and start.net not in (None, name):
        raise UserError(f"--net {name}: {from_} is of a {start.net}; leave --net out, or give weights of a {name}")
    for_cifar = name in LAYOUTS and LAYOUTS[name].family is CifarResNet
    command = train_command(data, output)
    text, of_recipe = new_recipe(facts, name, start, for_cifar=for_cifar, command=command)
    recipe = recipe_from_yaml(text, str(output))
    require_net(recipe)
    if weights is not None:
        match_keys(weights.state, build_model(**recipe.model.build_options()), weights.name)
    plan_run(recipe, bare_profile((), workers=1, cpus_per_worker=1), facts.num_images)
    write_text_atomically(output, text)
    for warning in [*warnings, *of_recipe]:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{output}: {name} for {facts.num_images:,} images of {len(facts.class_names):,} classes")
    typer.echo(f"next  {command}")


def read_facts(train: Path) -> tuple[DataFacts, list[str]]:
    """The facts of `train` and of the val.beton beside it, and warnings. Raises UserError."""
    import numpy as np

    from data_prep.beton.reader import open_beton

    dataset = train.absolute().parent.name
    if train.name != "train.beton" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", dataset):
        raise UserError(
            f"--data {train}: give FOLDER/train.beton; the folder's name is the data set's: letters, digits, '.', '_' "
            "and '-'"
        )
    beton, val = open_beton(train), train.with_name("val.beton")
    manifests = [beton.manifest, *([open_beton(val).manifest] if val.exists() else [])]
    facts = DataFacts(
        dataset=dataset,
        class_names=manifests[0].class_names,
        class_counts=manifests[0].class_counts,
        short_side=int(np.median(np.minimum(beton.heights, beton.widths))),
        smallest_side=min(min(m.min_height, m.min_width) for m in manifests),
        largest_side=max(max(m.max_height, m.max_width) for m in manifests),
        has_statistics=bool(manifests[0].statistics),
    )
    return facts, [] if val.exists() else [f"{val}: does not exist; `train` needs it"]


def start_facts(source: str, weights: Weights | None, data: DataFacts) -> StartFacts:
    """What the weights say about themselves. `weights`: None for published ones, which are not downloaded for this."""
    from resnet_dist.config.recipe import FROM_DATA
    from resnet_dist.models.resnet import chosen_options
    from resnet_dist.weights.published import published

    if weights is None:
        known = published(source)
        return StartFacts(
            source,
            net=known.model["name"],
            net_options=chosen_options(known.model),
            same_classes=len(data.class_names) == known.model["num_classes"],
            mean=known.mean,
            std=known.std,
            size=known.size,
            resize=known.resize,
            interpolation=known.interpolation,
        )
    if weights.recipe is None:
        return StartFacts(source)
    of_run = weights.recipe
    assert of_run.data.mean != FROM_DATA and of_run.data.std != FROM_DATA, "a run's recipe is resolved"  # noqa: PT018
    return StartFacts(
        source,
        net=of_run.model.name,
        net_options=chosen_options(of_run.model.build_options()),
        same_classes=weights.class_names == tuple(data.class_names),
        mean=of_run.data.mean,
        std=of_run.data.std,
        size=of_run.data.eval.size,
        resize=of_run.data.eval.resize,
        interpolation=of_run.data.eval.interpolation,
    )


def train_command(data: Path, recipe: Path) -> str:
    """On this machine; with the profile's own data_root where that is the data's."""
    root, here = data.absolute().parent.parent, Path.cwd()
    words = ["resnet-dist", "train", str(recipe), "--on", "cluster/profiles/laptop.yaml"]
    if root != here / "data":
        words += ["--profile-set", f"data_root={root.relative_to(here) if root.is_relative_to(here) else root}"]
    return shlex.join(words)
