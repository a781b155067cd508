"""The name of a run, which is also that of its folder, its MLflow run and its job."""

from __future__ import annotations

import re
from pathlib import Path

from resnet_dist.config.recipe import Recipe, recipe_hash
from resnet_dist.errors import UserError

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def require_run_name(name: str) -> None:
    if not _RUN_NAME.fullmatch(name):
        raise UserError(f"--name {name}: use letters, digits, '.', '_' and '-' only, at most 128")


def as_run_name(text: str) -> str:
    """A text as part of a name: other characters become dashes."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def default_run_name(file: Path, recipe: Recipe) -> str:
    """`file`: the recipe's. A changed recipe gets another name, so it never resumes the run of the one before."""
    return f"{file.stem}-{recipe_hash(recipe)[:8]}"
