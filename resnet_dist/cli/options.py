"""Options that several commands share, and what is read from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from data_prep.redaction import redacted
from data_prep.runtime.environment import cluster_address, given_address
from resnet_dist.config.loading import load_profile
from resnet_dist.config.profile import Profile, absolute_paths, absolute_tracking_uri
from resnet_dist.errors import UserError

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
ProfileFile = Annotated[Path, typer.Option("--on", metavar="PROFILE", help="A profile's YAML file.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
ProfileSets = Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Override a key of the profile.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow server or sqlite file.  [default: $MLFLOW_TRACKING_URI]")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]


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


def given_tracking_uri(option: str | None) -> str | None:
    """That of --tracking-uri or of the environment, with an absolute path. Raises UserError for a wrong one."""
    uri = option or os.environ.get("MLFLOW_TRACKING_URI")
    return absolute_tracking_uri(uri, Path.cwd()) if uri else None


def require_tracking_uri(option: str | None) -> str:
    uri = given_tracking_uri(option)
    if uri is None:
        raise UserError(
            "--tracking-uri: is missing; give an MLflow server or file, for example sqlite:///runs/mlflow.db"
        )
    return uri


def numbers(option: str, text: str, at_least: int) -> tuple[int, ...]:
    """`8,20` as numbers. Raises UserError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < at_least or len(set(found)) < len(found):
        raise UserError(f"{option} {text}: give different whole numbers from {at_least} on, separated by commas")
    return found
