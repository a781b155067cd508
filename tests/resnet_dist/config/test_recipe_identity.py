"""A run belongs to a recipe: which changes make it another recipe, and what the message says."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from resnet_dist.config import recipe as recipe_module
from resnet_dist.config.base import without_recorded_defaults
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import RECORDED_DEFAULTS, Recipe, recipe_changes, recipe_hash

RECIPES = Path(__file__).parents[3] / "resnet_dist/recipes"
FIRST_HASHED = set(Path(__file__).with_name("first_hashed_keys.txt").read_text().split())
"""The keys of the first hashed recipes. Never add to them."""


def sections_of(annotation: Any) -> list[tuple[str, type[BaseModel]]]:
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return [(f"[]{path}", m) for arg in get_args(annotation) if arg is not ... for path, m in sections_of(arg)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for arg in get_args(annotation) for found in sections_of(arg)]
    return [("", annotation)] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def keys_of(model: type[BaseModel], path: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        key = f"{path}.{name}".removeprefix(".")
        found |= {key}.union(*(keys_of(section, key + end) for end, section in sections_of(field.annotation)))
    return found


def test_a_key_that_is_added_does_not_change_the_hash_of_recipes_that_do_not_set_it() -> None:
    """Add it to RECORDED_DEFAULTS, with the value at which a recipe means what it meant before."""
    recorded = {key for key in RECORDED_DEFAULTS if key in keys_of(Recipe)}
    in_new_sections = {key for key in keys_of(Recipe) if any(key.startswith(f"{section}.") for section in recorded)}
    assert keys_of(Recipe) - FIRST_HASHED == recorded | in_new_sections


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10_resnet20", "a3171a122042cb9b"),
        ("digits_resnet20", "eb0b3623df65f976"),
        ("resnet152_90ep", "51cd0bec8031b170"),
        ("resnet152_rsb_a2", "5c5031153b49713b"),
        ("resnet50_ffcv", "331fc10e7d986a5f"),
    ],
)
def test_runs_of_older_versions_keep_their_recipe_hash(name: str, expected: str) -> None:
    assert recipe_hash(load_recipe(RECIPES / f"{name}.yaml")) == expected


def test_a_new_key_is_hashed_only_where_it_is_not_at_its_recorded_default(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(RECIPES / "digits_resnet20.yaml")
    before = recipe_hash(recipe)
    monkeypatch.setattr(recipe_module, "RECORDED_DEFAULTS", {"optim.nesterov": recipe.optim.nesterov})
    assert recipe_hash(recipe) != before  # as if nesterov had not been hashed at first
    assert recipe_hash(recipe) == recipe_hash(load_recipe(RECIPES / "digits_resnet20.yaml"))
    other = load_recipe(RECIPES / "digits_resnet20.yaml", [f"optim.nesterov={not recipe.optim.nesterov}"])
    assert recipe_hash(other) != recipe_hash(recipe)


def test_recorded_defaults_are_left_out_wherever_they_are() -> None:
    tree = {"a": {"new": 0, "b": 0}, "list": [{"new": 1}, {"new": 2, "b": 1}], "new": 0}
    recorded = {"a.new": 0, "list[].new": 1, "section": None}
    assert without_recorded_defaults(tree, recorded) == {"a": {"b": 0}, "list": [{}, {"new": 2, "b": 1}], "new": 0}
    assert without_recorded_defaults({"section": None}, recorded) == {}


def test_changes_are_reported_by_key_and_value() -> None:
    before = {"optim": {"lr": 0.05, "name": "sgd"}, "data": {"mixing": None}, "old": 1}
    after = {"optim": {"lr": 0.02, "name": "sgd"}, "data": {"mixing": {"mixup_alpha": 0.1}}}
    assert recipe_changes(before, after) == [
        "optim.lr 0.05 -> 0.02",
        'data.mixing null -> {"mixup_alpha": 0.1}',
        "old 1 -> unset",
    ]
    assert recipe_changes(before, before) == []
