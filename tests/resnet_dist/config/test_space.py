"""Search spaces: what is read, what is refused, and that every mistake is reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config.loading import load_space, read_tree, recipe_from_tree
from resnet_dist.config.space import sweep_hash
from resnet_dist.errors import UserError

SPACES = Path(__file__).parents[3] / "tune_spaces"
GOOD = """
base: recipe.yaml
proxy: {train.total_epochs: 3}
space:
  optim.lr: {kind: loguniform, low: 1e-3, high: 1}
  optim.weight_decay: {kind: loguniform, low: 1e-5, high: 1e-2}
search: {kind: random}
trials: 4
"""


def space_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def mistake(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_space(space_file(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", sorted(SPACES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_space_and_its_proxy_are_valid(file: Path) -> None:
    space = load_space(file)
    base = read_tree(file.parent / space.base)
    proxy = recipe_from_tree(base, space.proxy)
    assert proxy.train.total_epochs <= recipe_from_tree(base, {}).train.total_epochs


def test_exponents_are_numbers(tmp_path: Path) -> None:
    space = load_space(space_file(tmp_path, GOOD + "first_points: [{optim.lr: 1e-2}]"))
    assert space.space["optim.lr"].low == 1e-3  # type: ignore[union-attr]
    assert space.first_points == [{"optim.lr": 0.01}]


def test_stages_and_their_rates_can_be_searched(tmp_path: Path) -> None:
    stages = """
  optim.lr_factors.head: {kind: loguniform, low: 1, high: 100}
  optim.freeze: {kind: choice, values: [[], [stem, layer1]]}"""
    space = load_space(space_file(tmp_path, GOOD.replace("\nspace:", f"\nspace:{stages}")))
    assert {"optim.lr_factors.head", "optim.freeze"} < set(space.space)
    tree = read_tree(SPACES.parent / "resnet_dist/recipes/digits_resnet20.yaml")
    recipe = recipe_from_tree(tree, {"optim.lr_factors.head": 10, "optim.freeze": ["stem", "layer1"]})
    assert (recipe.optim.lr_factors, recipe.optim.freeze) == ({"head": 10}, ("stem", "layer1"))


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    text = """
base: recipe.yaml
proxy: {train.total_epoch: 3}
space:
  optim.weight_decai: {kind: loguniform, low: 1e-3, high: 1}
  optim.lr: {kind: loguniform, low: 1, high: 1e-3}
  optim.weight_decay: {kind: grid, values: []}
  optim.momentum: {kind: loguniformly, low: 1, high: 2}
metric: val/top2
trails: 4
"""
    message = mistake(tmp_path, text)
    assert "7 mistakes" in message
    for part in (
        "proxy.train.total_epoch: not a key of a recipe; did you mean train.total_epochs?",
        "space.optim.weight_decai: not a key of a recipe; did you mean optim.weight_decay?",
        "space.optim.lr: low (1) must be less than high (0.001)",
        "space.optim.weight_decay.values: ",
        "space.optim.momentum: ",
        "metric: should be 'val/top1'",
        "trails: unknown key; did you mean trials?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["trials=null"], "trials: is missing"),
        (["seeds=4", "race.max_seeds=3"], "race.max_seeds: 3 is less than seeds (4), which all points get"),
        (["space={}"], "space is empty"),
        (["search={kind: grid}"], "space.optim.lr: a grid needs kind grid, choice or derived"),
        (["space={optim.lr: {kind: grid, values: [1, 2]}}"], "kind grid needs search: {kind: grid}"),
        (["space={seed: {kind: choice, values: [1, 2]}}"], "set seeds to repeat every point"),
        (
            ["space={tau_epochs: {kind: uniform, low: 1, high: 2}, optim.weight_decay: {kind: choice, values: [1]}}"],
            "tau_epochs decides optim.weight_decay",
        ),
        (
            ["first_points=[{optim.momentum: 0.9}]"],
            "first_points: optim.momentum not among the free parameters of space",
        ),
        (["first_points=[{optim.lr: abc}]"], "first_points: optim.lr 'abc', expected a number"),
        (
            ["space={optim.name: {kind: choice, values: [sgd]}}", "first_points=[{optim.name: sdg}]"],
            "first_points: optim.name 'sdg', expected one of sgd",
        ),
        (
            [
                "space={optim.name: {kind: choice, values: [sgd, lamb]}, optim.momentum: {kind: uniform, low: 0.8, "
                "high: 0.9, when: {optim.name: [sgd, sdg]}}}"
            ],
            "space.optim.momentum.when: optim.name is never 'sdg', expected one of sgd, lamb",
        ),
        (
            [
                "space={lr_per_256: {kind: loguniform, low: 0.1, high: 1}, optim.weight_decay: {kind: derived, of: "
                "optim.lr}}"
            ],
            "space.optim.weight_decay.of: optim.lr is decided by lr_per_256; derive from lr_per_256",
        ),
        (
            [
                "space={optim.lr: {kind: loguniform, low: 0.1, high: 1}, optim.weight_decay: {kind: derived, of: "
                "optim.momentum}, optim.momentum: {kind: derived, of: optim.lr}}"
            ],
            "space.optim.weight_decay.of: optim.momentum is derived too and must be before it",
        ),
        (["scheduler={kind: asha, first_rung: 0.5, rungs: 3}"], "the last of 3 rungs would be at 4.5 of the schedule"),
        (
            ["space={optim: {lr: {kind: loguniform, low: 0.1, high: 1}}}"],
            "space.optim: kind is missing; keys of keys are",
        ),
        (
            ["search={kind: cma}", "space={optim.lr: {kind: choice, values: [1, 2]}}"],
            "cma searches numbers without conditions",
        ),
        (["resources={gpus: 2}"], "a light trial uses at most 1"),
        (["scheduler={kind: asha, grace_periodd: 3}"], "scheduler.grace_periodd: unknown key"),
        (
            ["space={optim.lr: {kind: derived, of: optim.momentun}, optim.weight_decay: {kind: choice, values: [1]}}"],
            "space.optim.lr.of: optim.momentun: not a key of a recipe",
        ),
    ],
)
def test_contradictory_settings_are_refused(tmp_path: Path, overrides: list[str], part: str) -> None:
    assert part in mistake(tmp_path, GOOD, *overrides)


def test_settings_that_may_change_during_a_sweep_are_not_in_its_hash(tmp_path: Path) -> None:
    file = space_file(tmp_path, GOOD)
    first = sweep_hash(load_space(file), {})
    for free in ("trials=9", "seeds=3", "race.max_seeds=9", "budget.epochs=7", "resources.cpus=2", "warm_start=[x]"):
        assert sweep_hash(load_space(file, [free]), {}) == first
    for fixed in ("metric=val/loss", "search.seed=1", "scheduler.kind=median", "proxy={}"):
        assert sweep_hash(load_space(file, [fixed]), {}) != first
    assert sweep_hash(load_space(file), {"seed": 1}) != first
