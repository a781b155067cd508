"""`resnet-dist schedules`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import Sets
from resnet_dist.config.loading import load_recipe


def schedules(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes' YAML files.")],
    output: Annotated[Path, typer.Option("--output", metavar="PNG", help="File to draw to.")],
    set_: Sets = [],  # noqa: B006 - typer reads the default, nothing writes it
) -> None:
    """Draw the schedules of recipes side by side: learning rate and size of training images by epoch.

    Example: resnet-dist schedules resnet_dist/recipes/*.yaml --output docs/recipes.png
    """
    loaded = [(path, load_recipe(path, set_)) for path in recipes]
    from resnet_dist.launch.schedules import schedule_curve
    from resnet_dist.tracking.schedule_plot import draw_schedules

    typer.echo(str(draw_schedules([schedule_curve(path, recipe) for path, recipe in loaded], output)))
