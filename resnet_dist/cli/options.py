"""What several commands share: their options, and the files that these name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from data_prep.redaction import redacted
from data_prep.runtime.environment import cluster_address, given_address
from resnet_dist.config.loading import load_profile, load_recipe
from resnet_dist.config.profile import Profile, absolute_paths
from resnet_dist.config.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
ProfileFile = Annotated[Path, typer.Option("--on", metavar="PROFILE", help="A profile's YAML file.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
ProfileSets = Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Override a key of the profile.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]


def load(recipe: Path, on: Path, sets: list[str], profile_sets: list[str]) -> tuple[Recipe, Profile]:
    profile = load_profile_file(on, profile_sets)
    return load_recipe(recipe, sets), profile


def load_profile_file(on: Path, profile_sets: list[str]) -> Profile:
    """The profile with every path absolute."""
    loaded = load_profile(on, profile_sets)
    profile = absolute_paths(loaded, Path.cwd())
    cluster_address(*given_address(profile.ray_address, os.environ))  # a wrong one before heavy libraries are imported
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given and given.rstrip("/") not in (profile.tracking_uri, loaded.tracking_uri):
        not_used, used = redacted(given), redacted(profile.tracking_uri)
        typer.echo(f"MLFLOW_TRACKING_URI ({not_used}) is not used: the profile's tracking_uri is {used}", err=True)
    return profile
