"""From a space to points, and from a point to a recipe."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config.loading import read_tree
from resnet_dist.config.recipe import recipe_changes
from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.points import (
    Builder,
    contains,
    coordinates_of,
    grid_points,
    lr_of,
    lr_per_256_of,
    planned_points,
    position,
    random_point,
    require_buildable,
    tau_epochs_of,
    weight_decay_of,
)
from resnet_dist.sweeps.prepare import require_rungs_fit

ROOT = Path(__file__).parents[3]
IMAGENET_TRAIN = 1_281_167
positive = st.floats(1e-4, 10)


def a_space(space: dict[str, Any], **more: Any) -> Space:
    return Space.model_validate({"base": "b", "space": space, "trials": 8, **more})


MIXED = a_space(
    {
        "optim.lr": {"kind": "loguniform", "low": 0.01, "high": 1},
        "optim.momentum": {"kind": "uniform", "low": 0.8, "high": 0.95},
        "train.total_epochs": {"kind": "quniform", "low": 3, "high": 9, "step": 3},
        "schedule.kind": {"kind": "choice", "values": ["cosine", "step"]},
        "schedule.milestone_fractions": {
            "kind": "choice",
            "values": [[0.5], [0.3, 0.6]],
            "when": {"schedule.kind": "step"},
        },
    }
)


@given(seed=st.integers(0, 99), index=st.integers(0, 999))
def test_a_random_point_is_in_its_space(seed: int, index: int) -> None:
    point = random_point(MIXED, seed, index)
    assert contains(MIXED, point)
    assert 0.01 <= point["optim.lr"] <= 1
    assert point["train.total_epochs"] in (3, 6, 9)
    assert ("schedule.milestone_fractions" in point) == (point["schedule.kind"] == "step")


@pytest.mark.parametrize("search", ["random", "sobol"])
@given(few=st.integers(1, 20), more=st.integers(0, 20))
def test_a_longer_sweep_begins_with_the_shorter_one(search: str, few: int, more: int) -> None:
    space = a_space({"optim.lr": {"kind": "loguniform", "low": 0.01, "high": 1}}, search={"kind": search})
    longer = planned_points(space, few + more)
    assert longer is not None
    assert len(longer) == few + more
    assert planned_points(space, few) == longer[:few]


def test_a_grid_is_every_combination_and_inactive_ones_once() -> None:
    space = a_space(
        {
            "optim.lr": {"kind": "grid", "low": 0.01, "high": 1, "num": 3, "log": True},
            "schedule.kind": {"kind": "choice", "values": ["cosine", "step"]},
            "schedule.gamma": {"kind": "grid", "values": [0.1, 0.2], "when": {"schedule.kind": "step"}},
        },
        search={"kind": "grid"},
    )
    kinds = [{"schedule.kind": "cosine"}, *({"schedule.kind": "step", "schedule.gamma": g} for g in (0.1, 0.2))]
    assert grid_points(space) == [{"optim.lr": lr, **kind} for lr, kind in itertools.product([0.01, 0.1, 1.0], kinds)]


def test_a_points_position_is_what_it_was_drawn_from() -> None:
    space = a_space(
        {
            "optim.lr": {"kind": "loguniform", "low": 0.01, "high": 100},
            "a": {"kind": "uniform", "low": 1, "high": 3},
            "b": {"kind": "quniform", "low": 2, "high": 6, "step": 2},
            "c": {"kind": "choice", "values": ["step", "cosine"]},
            "d": {"kind": "uniform", "low": 0, "high": 1, "when": {"c": "step"}},
        }
    )
    point = {"optim.lr": 1.0, "a": 1.5, "b": 6, "c": "cosine"}
    assert position(space, point) == pytest.approx((0.5, 0.25, 1, 0, 1, 0))
    grid = a_space({"optim.lr": {"kind": "grid", "values": [0.01, 0.1, 1]}}, search={"kind": "grid"}, trials=None)
    assert [position(grid, point) for point in grid_points(grid)] == [(0,), (0.5,), (1,)]


def test_first_points_come_first_and_once() -> None:
    point = {"optim.lr": 0.1}
    grid = {"optim.lr": {"kind": "grid", "values": [0.01, 0.1, 1.0]}}
    space = a_space(grid, search={"kind": "grid"}, first_points=[point])
    assert planned_points(space, 3) == [point, {"optim.lr": 0.01}, {"optim.lr": 1.0}]


@pytest.mark.parametrize("kind", ["random", "sobol", "grid"])
def test_no_point_is_planned_twice_however_it_is_written(kind: str) -> None:
    """0.1 and "1e-1" are one recipe, and one recipe ends in the same bits."""
    values = {"optim.nesterov": [True, False], "optim.lr": [0.1, "1e-1", 0.2]}
    choices = {key: {"kind": "choice", "values": listed} for key, listed in values.items()}
    space = a_space(choices, search={"kind": kind}, trials=None if kind == "grid" else 6)
    points = planned_points(space, 6, builder(space).key) or []
    recipes = [builder(space).proxy(point) for point in points]
    expected = itertools.product([False, True], [0.1, 0.2])
    assert sorted((r.optim.nesterov, r.optim.lr) for r in recipes) == list(expected)
    assert planned_points(space, 2, builder(space).key) == points[:2]


@given(lr_per_256=positive, tau=positive, batch=st.integers(1, 4096), momentum=st.floats(0, 0.99))
def test_coordinates_lead_back(lr_per_256: float, tau: float, batch: int, momentum: float) -> None:
    lr = lr_of(lr_per_256, global_batch_size=batch)
    decay = weight_decay_of(tau, lr=lr, momentum=momentum, steps_per_epoch=7)
    assert lr_per_256_of(lr, global_batch_size=batch) == pytest.approx(lr_per_256)
    assert tau_epochs_of(decay, lr=lr, momentum=momentum, steps_per_epoch=7) == pytest.approx(tau)


@pytest.mark.parametrize(
    ("lr", "momentum", "decay", "batch", "lr_over_256", "tau"),
    [
        (0.1, 0.9, 1e-4, 256, 0.1, 2.0),  # He et al. 2015
        (2.0, 0.875, 3.05175e-5, 2048 // 2, 0.5, 1.64),
        (0.5, 0.9, 2e-5, 1024, 0.125, 8.0),  # torchvision V2
    ],
)
def test_published_recipes_have_the_published_coordinates(
    lr: float, momentum: float, decay: float, batch: int, lr_over_256: float, tau: float
) -> None:
    steps = IMAGENET_TRAIN // batch
    assert lr_per_256_of(lr, global_batch_size=batch) == pytest.approx(lr_over_256)
    assert tau_epochs_of(decay, lr=lr, momentum=momentum, steps_per_epoch=steps) == pytest.approx(tau, rel=0.01)


def builder(space: Space, num_base_samples: int | None = 2_560) -> Builder:
    return Builder(space, read_tree(ROOT / "resnet_dist/recipes/digits_resnet20.yaml"), 1_280, num_base_samples)


COORDINATES = a_space(
    {
        "lr_per_256": {"kind": "loguniform", "low": 0.03, "high": 1},
        "tau_epochs": {"kind": "loguniform", "low": 1, "high": 15},
    },
    proxy={"train.total_epochs": 3, "model.name": "resnet8"},
)


def test_a_trial_has_the_proxys_overrides_and_the_result_has_not() -> None:
    point = {"lr_per_256": 0.4, "tau_epochs": 2.0}
    trial, full = builder(COORDINATES).proxy(point, seed_number=2), builder(COORDINATES).full(point)
    assert (trial.train.total_epochs, trial.model.name, trial.seed) == (3, "resnet8", 2)
    assert (full.train.total_epochs, full.model.name, full.seed) == (15, "resnet20", 0)
    assert (trial.optim.lr, full.optim.lr) == (0.2, 0.2)
    # 10 steps an epoch in the proxy, 20 in the whole: tau is kept, so the decay halves.
    assert (trial.optim.weight_decay, full.optim.weight_decay) == (0.025, 0.0125)
    assert coordinates_of(full, 2_560)["tau_epochs"] == pytest.approx(2.0)


def test_a_derived_key_follows_another() -> None:
    space = a_space(
        {
            "train.total_epochs": {"kind": "choice", "values": [4, 16]},
            "optim.lr": {"kind": "derived", "of": "train.total_epochs", "factor": 0.2, "power": -0.5},
        }
    )
    assert builder(space).proxy({"train.total_epochs": 16}).optim.lr == pytest.approx(0.05)


def test_a_point_that_no_recipe_can_take_is_named() -> None:
    space = a_space({"schedule.kind": {"kind": "choice", "values": ["cosine", "step"]}})
    with pytest.raises(UserError, match=r"the trial of schedule.kind step: .*milestone_fractions: is missing"):
        require_buildable(builder(space), [{"schedule.kind": "cosine"}, {"schedule.kind": "step"}], "space.yaml")


def test_a_short_schedule_keeps_the_recipe_and_shortens_all_that_depends_on_its_length() -> None:
    space = a_space(
        {"optim.lr": {"kind": "loguniform", "low": 0.01, "high": 1}},
        proxy={"train.total_epochs": 9, "schedule.warmup": {"epochs": 3, "start_factor": 0.1}},
    )
    whole = builder(space).proxy({"optim.lr": 0.2})
    short = builder(space).short({"optim.lr": 0.2}, 3, "tau")
    assert set(recipe_changes(whole.model_dump(mode="json"), short.model_dump(mode="json"))) == {
        "eval.every_epochs 1 -> 3",
        "schedule.warmup.epochs 3.0 -> 1.0",
        "train.total_epochs 9 -> 3",
    }
    tau_share = builder(space).short({"optim.lr": 0.2}, 3, "tau_share")
    assert tau_share.optim.lr == whole.optim.lr
    assert tau_share.optim.weight_decay == pytest.approx(3 * whole.optim.weight_decay)


@pytest.mark.parametrize(
    ("scheduler", "proxy", "mistake"),
    [
        ({"kind": "halving", "rungs": [1, 3, 9]}, {}, None),
        ({"kind": "halving", "rungs": [1, 3]}, {}, "the last of its rungs, 3 epochs, must be the trials'"),
        ({"kind": "halving", "rungs": [1, 9]}, {"train.max_steps": 20}, "train.max_steps or a fork"),
        ({"kind": "halving", "rungs": [1, 9]}, {"schedule": {"kind": "plateau"}}, "schedule.kind plateau"),
        ({"kind": "annealed", "rungs": [0.11, 0.33]}, {}, None),
        ({"kind": "annealed", "rungs": [0.05, 0.11]}, {}, "two of its rungs are at epoch 1 of 9"),
        ({"kind": "annealed"}, {"fork": {"checkpoint": "r", "schedule": "rest"}}, "not with fork.schedule: rest"),
        ({"kind": "record", "cooldowns": [0.11], "shorts": [1, 3]}, {}, None),
        ({"kind": "record", "shorts": [3, 9]}, {}, "fewer epochs than the trials' 9, got 9"),
    ],
)
def test_rungs_that_the_trials_cannot_have(
    scheduler: dict[str, Any], proxy: dict[str, Any], mistake: str | None
) -> None:
    space = a_space(
        {"optim.lr": {"kind": "loguniform", "low": 0.01, "high": 1}},
        scheduler=scheduler,
        proxy={"train.total_epochs": 9, **proxy},
    )
    recipe = builder(space).proxy({"optim.lr": 0.2})
    if mistake is None:
        require_rungs_fit(space, recipe, 9.0)
    else:
        with pytest.raises(UserError, match=re.escape(mistake)):
            require_rungs_fit(space, recipe, 9.0)
