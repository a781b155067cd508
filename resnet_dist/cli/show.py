"""`resnet-dist show`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import AsJson, Sets
from resnet_dist.config.loading import load_recipe, model_of_name


def show(
    model: Annotated[str, typer.Argument(metavar="NET_OR_RECIPE", help="A net's name, or a recipe's YAML file.")],
    set_: Sets = [],  # noqa: B006 - typer reads the default, nothing writes it
    side: Annotated[int | None, typer.Option(min=1, help="Side of the image, px.  [default: the net's own]")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a net's layout: sizes, blocks, exact parameters, multiply-adds.

    Example: resnet-dist show resnet152 --set model.bottleneck_stride=1x1
    """
    from rich.console import Console

    from resnet_dist.launch.model_table import print_model
    from resnet_dist.models import summarise

    if model.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(model), set_)
        options, side = recipe.model.build_options(), side or recipe.data.eval.size
    else:
        options = model_of_name(model, set_).build_options() | {"num_classes": None}
    name = options.pop("name")
    summary = summarise(name, side=side, **options)
    if as_json:
        typer.echo(json.dumps({"name": name, "parameters": summary.parameters, "macs": summary.macs}))
        return
    print_model(name, summary, Console(width=None if sys.stdout.isatty() else 120))
