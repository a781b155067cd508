"""Every shipped recipe is valid and documented with its variants, its net builds, and its schedule is its source's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

import resnet_dist
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import Recipe, steps_per_epoch, train_size
from resnet_dist.models import build_model
from resnet_dist.training.model import build_optimizer
from resnet_dist.training.schedule import lr_at

FOLDER = Path(resnet_dist.__file__).parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
DOCUMENT = FOLDER.parents[1] / "docs" / "recipes.md"
NUM_TRAIN_SAMPLES = {"digits": 1_442, "cifar10": 50_000, "imagenet": 1_281_167, "my_pictures": 5_000}


def head_of(path: Path) -> str:
    return path.read_text().split("\n\n")[0]


def variants(path: Path) -> list[list[str]]:
    """The overrides that the head comment offers: of `a=b|c` each."""
    lines = re.findall(r"^# +(--set (?:.*\\\n# +)*.*)$", head_of(path), flags=re.MULTILINE)
    found = []
    for line in lines:
        sets = [word for word in shlex.split(line.replace("\\\n#", " ")) if word != "--set"]
        choices = [
            [f"{key}={value}" for value in values.split("|")] for key, _, values in (s.partition("=") for s in sets)
        ]
        found += [list(choice) for choice in product(*choices)]
    return found


VARIANTS = [(path, sets) for path in RECIPES for sets in variants(path)]


def rates_of(recipe: Recipe) -> Callable[[float], float]:
    """The rate at a time in epochs, while no plateau was met."""
    per_epoch = steps_per_epoch(NUM_TRAIN_SAMPLES[recipe.data.dataset], recipe.train.global_batch_size)
    total = per_epoch * recipe.train.total_epochs

    def rate(epoch: float) -> float:
        step = min(round(epoch * per_epoch), total - 1)
        return lr_at(step, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=per_epoch, total_steps=total)

    return rate


def require_buildable(recipe: Recipe) -> None:
    with torch.device("meta"):
        build_optimizer(build_model(**recipe.model.build_options()), recipe.optim)
    rates_of(recipe)(0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    recipe, head = load_recipe(path), head_of(path)
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"resnet-dist train resnet_dist/recipes/{path.name} --on " in head
    assert all(f"\n# {word}" in head for word in ("Hardware", "Time", "Expected"))
    assert head.count("--set ") >= len(re.findall(r"--set \w", path.read_text()))  # none hidden further down
    require_buildable(recipe)
    peak = max(rates_of(recipe)(epoch / 4) for epoch in range(4 * min(recipe.train.total_epochs, 20)))
    assert peak == pytest.approx(recipe.optim.lr, rel=1e-6)
    if recipe.schedule.kind != "plateau":
        assert 0 < rates_of(recipe)(recipe.train.total_epochs) <= 0.011 * recipe.optim.lr


@pytest.mark.parametrize(("path", "sets"), VARIANTS, ids=[f"{p.stem}-{' '.join(s)}" for p, s in VARIANTS])
def test_the_variants_that_a_head_comment_offers(path: Path, sets: list[str]) -> None:
    require_buildable(load_recipe(path, sets))


def test_variants_are_found() -> None:
    assert len(VARIANTS) > 40
    assert [
        "model.name=resnet1202",
        "schedule.warmup={epochs: 1.0256, start_factor: 0.1, shape: constant}",
    ] in variants(FOLDER / "cifar10_resnet20.yaml")


# What a recipe's source says: (epoch, rate), and the images' sizes by epoch where they change.
POINTS = {
    # torchvision: --lr 0.1 --lr-step-size 30 --lr-gamma 0.1
    "resnet152_90ep": [(0, 0.1), (29.999, 0.1), (30, 0.01), (60, 0.001), (90, 0.001)],
    # He et al. 2015, section 3.4
    "resnet152_paper": [(0, 0.1), (119, 0.1)],
    # He et al. 2015, section 4.2: 32k and 48k of 64k steps
    "cifar10_resnet20": [(0, 0.1), (81.99, 0.1), (82, 0.01), (122.99, 0.01), (123, 0.001), (164, 0.001)],
    # Goyal et al. 2017, sections 2.2 and 5.1
    "resnet50_goyal": [(0, 0.1), (2.5, 1.65), (5, 3.2), (29.99, 3.2), (30, 0.32), (60, 0.032), (80, 0.0032)],
    # torchvision: --lr 0.5 --lr-warmup-epochs 5 --lr-warmup-decay 0.01 --epochs 600, cosine over the 595 others
    "resnet152_torchvision_v2": [(0, 0.005), (2.5, 0.2525), (5, 0.5), (302.5, 0.25), (600, 0.0)],
    # --lr 5e-3 --warmup-lr 1e-4 --warmup-epochs 5 --min-lr 1e-6
    "resnet152_rsb_a2": [(0, 1e-4), (5, 5e-3), (152.5, (5e-3 + 1e-6) / 2), (300, 1e-6)],
    "resnet152_rsb_a3": [(0, 1e-4), (5, 8e-3), (52.5, (8e-3 + 1e-6) / 2), (100, 1e-6)],
    # ffcv-imagenet's get_cyclic_lr: [0, 2, epochs] -> [1e-4, 1, 0] * 1.7
    "resnet50_ffcv": [(0, 1.7e-4), (1, 0.85), (2, 1.7), (45, 0.85), (88, 0.0)],
    "resnet152_ffcv": [(0, 1.7e-4), (2, 1.7), (45, 0.85), (88, 0.0)],
    # what `resnet-dist new --from` writes for 5,000 pictures
    "finetune_resnet50": [(0, 0.0), (1, 0.005), (15.5, 0.0025), (30, 0.0)],
    "finetune_resnet152": [(0, 0.0), (1, 0.005), (15.5, 0.0025), (30, 0.0)],
    # Model Garden: 1560 of 109,200 steps of warm-up to 1.6; its cosine begins at step 0, ours after the warm-up
    "resnet152_rs": [(0, 0.0), (2.5, 0.8), (5, 1.6), (177.5, 0.8), (350, 0.0)],
}


@pytest.mark.parametrize("name", POINTS)
def test_the_schedule_is_its_sources(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    rate = rates_of(recipe)
    slack = 1.5e-3 * recipe.optim.lr  # a step more or less; the last step is not at the end
    assert [rate(epoch) for epoch, _ in POINTS[name]] == pytest.approx([lr for _, lr in POINTS[name]], abs=slack)


def test_steps_of_the_sources() -> None:
    for name, sets, steps in (
        ("cifar10_resnet20", [], 63_960),  # of 64,000
        ("resnet152_paper", [], 600_480),  # up to 60 x 10^4
        ("resnet50_ffcv", [], 88 * 312),  # the rate in its log after the first epoch
        ("resnet152_rs", [], 350 * 312),
        ("resnet152_90ep", [], 90 * 5_004),
    ):
        recipe = load_recipe(FOLDER / f"{name}.yaml", sets)
        per_epoch = steps_per_epoch(NUM_TRAIN_SAMPLES[recipe.data.dataset], recipe.train.global_batch_size)
        assert per_epoch * recipe.train.total_epochs == steps


def test_110_layers_begin_at_a_tenth_of_the_rate_for_400_steps() -> None:
    path = FOLDER / "cifar10_resnet20.yaml"
    (sets,) = [s for s in variants(path) if s[0] == "model.name=resnet110" and len(s) == 2]
    recipe = load_recipe(path, sets)
    rates = [
        lr_at(step, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=390, total_steps=63_960)
        for step in (0, 399, 400)
    ]
    assert rates == pytest.approx([0.01, 0.01, 0.1])


FFCV_RUNS = [[], *(s for s in variants(FOLDER / "resnet50_ffcv.yaml") if "total_epochs" in s[0])]


@pytest.mark.parametrize("sets", FFCV_RUNS, ids=str)
def test_the_image_sizes_of_ffcvs_runs(sets: list[str]) -> None:
    """rn50_configs/rn50_<epochs>_epochs.yaml of ffcv-imagenet differ in epochs, start_ramp and end_ramp alone."""
    recipe = load_recipe(FOLDER / "resnet50_ffcv.yaml", sets)
    epochs = recipe.train.total_epochs
    first, last = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}[epochs]
    sizes = [train_size(recipe.data, epoch, epochs) for epoch in range(epochs)]
    # Half-way numpy's round, which is ffcv's, takes the even multiple of 32: 192.
    assert sizes == [160 if epoch - first < (last - first) / 2 else 192 for epoch in range(epochs)]


def test_every_recipe_is_in_the_document() -> None:
    """With its net, epochs and batch. Its hours are tested with the planner."""
    rows = {
        line.split("`")[1]: line.replace(",", "")
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| [`")
    }
    assert rows.keys() == {path.stem for path in RECIPES}
    for path in RECIPES:
        recipe = load_recipe(path)
        cells = [cell.strip() for cell in rows[path.stem].split("|")]
        assert cells[2:5] == [recipe.model.name, str(recipe.train.total_epochs), str(recipe.train.global_batch_size)]
