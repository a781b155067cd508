"""`resnet-dist new`: a recipe that fits a data set."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.config.loading import bare_profile, recipe_from_yaml
from resnet_dist.config.new_recipe import DataFacts, new_recipe, suggest_net
from resnet_dist.errors import UserError


def new(
    data: Annotated[Path, typer.Option(metavar="FOLDER/train.beton", help="Training images; val.beton is beside it.")],
    output: Annotated[Path, typer.Option(metavar="RECIPE.yaml", help="Recipe to write.")],
    net: Annotated[
        str | None, typer.Option(help="Such as resnet50.  [default: by the size and number of the images]")
    ] = None,
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
    from resnet_dist.models.registry import LAYOUTS
    from resnet_dist.models.resnet import CifarResNet
    from resnet_dist.training.schedule import plan_run

    name = net or suggest_net(facts)
    for_cifar = name in LAYOUTS and LAYOUTS[name].family is CifarResNet
    command = train_command(data, output)
    text, of_recipe = new_recipe(facts, name, None, for_cifar=for_cifar, command=command)
    recipe = recipe_from_yaml(text, str(output))
    require_net(recipe)
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
    )
    return facts, [] if val.exists() else [f"{val}: does not exist; `train` needs it"]


def train_command(data: Path, recipe: Path) -> str:
    """On this machine; with the profile's own data_root where that is the data's."""
    root, here = data.absolute().parent.parent, Path.cwd()
    words = ["resnet-dist", "train", str(recipe), "--on", "cluster/profiles/laptop.yaml"]
    if root != here / "data":
        words += ["--profile-set", f"data_root={root.relative_to(here) if root.is_relative_to(here) else root}"]
    return shlex.join(words)
