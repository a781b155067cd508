"""Every recipe that is shipped: valid, complete, documented, and its net and schedule build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import resnet_dist
from resnet_dist.config.loading import load_recipe
from resnet_dist.models import build_model
from resnet_dist.training.optim import build_optimizer
from resnet_dist.training.schedule import lr_at, steps_per_epoch, total_steps

FOLDER = Path(resnet_dist.__file__).parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
NUM_TRAIN_SAMPLES = {"digits": 1_442, "cifar10": 50_000, "imagenet": 1_281_167}


def test_the_recipes_are_there() -> None:
    assert {path.name for path in RECIPES} >= {"digits_resnet20.yaml", "cifar10_resnet20.yaml", "resnet152_90ep.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"resnet-dist train resnet_dist/recipes/{path.name} --on " in head
    assert all(f"\n# {word}" in head for word in ("Hardware", "Time", "Expected"))

    with torch.device("meta"):
        net = build_model(**recipe.model.build_options())
    assert net(torch.empty(2, 3, recipe.data.eval.size, recipe.data.eval.size, device="meta")).shape == (
        2,
        recipe.model.num_classes,
    )
    assert isinstance(build_optimizer(net, recipe.optim), torch.optim.SGD)

    per_epoch = steps_per_epoch(NUM_TRAIN_SAMPLES[recipe.data.dataset], recipe.train.global_batch_size)
    total = total_steps(per_epoch, recipe.train.total_epochs)
    rates = [
        lr_at(step, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=per_epoch, total_steps=total)
        for step in range(0, total, per_epoch)
    ]
    assert max(rates) == recipe.optim.lr
    assert 0 < rates[-1] <= 0.02 * recipe.optim.lr


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_other_nets_that_a_head_comment_offers(path: Path) -> None:
    for offer in re.findall(r"model\.name=([\w|]+)", path.read_text()):
        for name in offer.split("|"):
            model = load_recipe(path, [f"model.name={name}"]).model
            with torch.device("meta"):
                build_model(model.name, model.num_classes, shortcut=model.shortcut)


def test_paper_schedule_of_cifar10() -> None:
    recipe = load_recipe(FOLDER / "cifar10_resnet20.yaml")
    per_epoch = steps_per_epoch(50_000, recipe.train.global_batch_size)
    total = total_steps(per_epoch, recipe.train.total_epochs)
    assert (per_epoch, total) == (390, 63_960)
    rates = {
        step: lr_at(step, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=per_epoch, total_steps=total)
        for step in (0, 31_979, 31_980, 47_969, 47_970, 63_959)
    }
    assert rates == pytest.approx({0: 0.1, 31_979: 0.1, 31_980: 0.01, 47_969: 0.01, 47_970: 0.001, 63_959: 0.001})


def test_torchvision_schedule_of_resnet152() -> None:
    recipe = load_recipe(FOLDER / "resnet152_90ep.yaml")
    per_epoch = steps_per_epoch(1_281_167, recipe.train.global_batch_size)
    total = total_steps(per_epoch, recipe.train.total_epochs)
    assert per_epoch == 5_004
    drops = [
        step
        for step in range(1, total)
        if lr_at(step, recipe.schedule, base_lr=0.1, steps_per_epoch=per_epoch, total_steps=total)
        != lr_at(step - 1, recipe.schedule, base_lr=0.1, steps_per_epoch=per_epoch, total_steps=total)
    ]
    assert drops == [30 * per_epoch, 60 * per_epoch]
