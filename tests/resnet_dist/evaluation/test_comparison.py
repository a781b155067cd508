"""Published weights on a beton: the published transform, and the verdict beside the published accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision.models
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import get_weight
from typer.testing import CliRunner

from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.cli import app as data_prep
from resnet_dist.cli import app
from resnet_dist.config.recipe import CenterCrop
from resnet_dist.errors import UserError
from resnet_dist.evaluation.comparison import compare, require_imagenet_order
from resnet_dist.weights.published import Published
from resnet_dist.weights.source import load_model

WNIDS = tuple(ImageNetInfo().label_names())
SOURCE = "torchvision:resnet18.IMAGENET1K_V1"


def convert(folder: Path, classes: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(0)
    for label, (height, width) in {0: (90, 300), 1: (260, 256), 999: (401, 333)}.items():
        target = folder / "images" / classes[label]
        target.mkdir(parents=True)
        pixels = rng.integers(0, 256, (height // 9, width // 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(target / f"{label}.jpg", quality=92)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    arguments = ["convert", "--source", "image-folder", "--workers", "0", "--output", str(folder / "val.beton")]
    arguments += ["--input", str(folder / "images"), "--classes", str(folder / "classes.txt"), "--split", "all"]
    done = CliRunner().invoke(data_prep, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "val.beton"


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("imagenet"), WNIDS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def timms_transform(name: str) -> Any:
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(), use_test_size=True)
    return timm.data.create_transform(**config)


@pytest.mark.parametrize(
    ("source", "net", "transform", "top1"),
    [
        (
            SOURCE,
            torchvision.models.resnet18,
            lambda: get_weight("ResNet18_Weights.IMAGENET1K_V1").transforms(),
            69.758,
        ),
        (
            "timm:resnet10t.c3_in1k",  # bicubic
            partial(timm.create_model, "resnet10t"),
            partial(timms_transform, "resnet10t.c3_in1k"),
            68.354,
        ),
    ],
    ids=["torchvision", "timm"],
)
def test_the_loss_is_that_of_the_librarys_net_and_transform(
    beton: Path, tmp_path: Path, source: str, net: Callable[[], nn.Module], transform: Callable[[], Any], top1: float
) -> None:
    torch.manual_seed(0)
    theirs, prepare = net().eval(), transform()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    files = sorted((beton.parent / "images").glob("*/*.jpg"))
    with torch.no_grad():
        logits = theirs(torch.stack([prepare(Image.open(file).convert("RGB")) for file in files]))
    expected = cross_entropy(logits, torch.tensor([0, 1, 999]))
    arguments = ["evaluate", source, "--weights", str(tmp_path / "weights.pth"), "--data", str(beton), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["val/loss"] == pytest.approx(float(expected), abs=2e-6)
    assert (found["published"]["top1"], found["published"]["verdict"]) == (top1, "not comparable")
    assert found["published"]["reasons"][0].startswith("3 images instead of 50,000")


def test_a_file_of_weights_needs_a_recipe_and_a_run_takes_none(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resnet18\.pth: a file does not say which net .*--recipe FILE"):
        load_model(str(weights))
    recipe = "resnet_dist/recipes/resnet50_goyal.yaml"
    with pytest.raises(UserError, match=r"2, 2, 2, 2 blocks of 2 convolutions, as resnet18"):
        load_model(str(weights), recipe=recipe)
    options = ["model.name=resnet18", "model.num_classes=10"]
    with pytest.raises(UserError, match=r"has no classifier of the net's 10 classes .* linear layer is \[1000, 512\]"):
        load_model(str(weights), recipe=recipe, overrides=options)
    model = load_model(str(weights), recipe=recipe, overrides=options[:1])
    assert (model.recipe.model.name, model.class_names, len(model.weights_digest)) == ("resnet18", None, 64)
    with pytest.raises(UserError, match="brings its own net and transform; --set is for files"):
        load_model(str(tmp_path), overrides=options)
    with pytest.raises(UserError, match="brings its own net and transform; --recipe is for files"):
        load_model(SOURCE, recipe=recipe)
    with pytest.raises(UserError, match="--weights is the file of published weights"):
        load_model(str(weights), weights=weights)


KNOWN = Published(
    model={"name": "resnet18", "num_classes": 1000},
    size=224,
    resize=256,
    interpolation="bilinear",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    top1=70.0,
    top5=90.0,
    class_names=tuple(f"thing {k}" for k in range(1000)),
)


def verdict(
    beton: Path, weights: Path, top1: float = 70.0, top5: float = 90.0, protocol: str = "1-crop", **changed: Any
) -> tuple[str, str]:
    whole = {"num_samples": 50_000, "num_untouched": 50_000, "class_counts": (50,) * 1000}
    manifest = replace(load_manifest(beton), **{**whole, **changed})
    recipe = load_model(SOURCE, weights=weights).recipe
    crop = CenterCrop(kind="center_crop", size=224, resize=256)
    found = compare(KNOWN, recipe, protocol, crop, manifest, {"val/top1": top1, "val/top5": top5})
    assert found is not None
    return found.verdict, found.sentence()


def test_verdicts(beton: Path, weights: Path) -> None:
    assert verdict(beton, weights, 70.05, 89.95) == (
        "right",
        "published top-1 70.00 %  top-5 90.00 %; measured +0.05 and -0.05: data and evaluation are right",
    )
    for changed, wanted, reason in (
        ({"top1": 70.06}, "differs", "usual causes are the order of the classes"),
        ({"top5": 89.9}, "differs", "more than 0.05 points apart"),
        ({"top1": 0.1, "top5": 0.5}, "differs", "at chance, so the classes are probably in another order"),
        ({"top1": 69.0, "settings": {"max_side": 256}}, "differs", "shrunk to 256 px"),
        (
            {"top1": 69.0, "num_untouched": 20, "settings": {"quality": 90}},
            "differs",
            "49,980 images were encoded again",
        ),
        ({"top1": 69.0, "class_counts": (49, 51, *[50] * 998)}, "differs", "classes have 49 to 51 images"),
        ({"num_samples": 10_000, "num_untouched": 10_000}, "not comparable", "10,000 images instead of 50,000"),
        ({"protocol": "flip"}, "not comparable", "of one central crop, not of flip"),
    ):
        found, sentence = verdict(beton, weights, **changed)
        assert (found, reason in sentence) == (wanted, True), sentence


def manifest_with(beton: Path, names: list[str]) -> Manifest:
    return replace(load_manifest(beton), class_names=tuple(names))


def test_the_order_of_classes_is_checked_where_names_show_it(beton: Path) -> None:
    assert require_imagenet_order(load_manifest(beton), beton, KNOWN) is None
    swapped = [WNIDS[1], WNIDS[0], *WNIDS[2:]]
    with pytest.raises(UserError, match=f"label 0 is {WNIDS[1]}, in ImageNet's order .* it is {WNIDS[0]}"):
        require_imagenet_order(manifest_with(beton, swapped), beton, KNOWN)
    others = [f"n{number:08}" for number in range(1000)]
    with pytest.raises(UserError, match="other classes than the weights'"):
        require_imagenet_order(manifest_with(beton, others), beton, KNOWN)
    words = [f"Thing_{k}, another word" for k in range(1000)]
    assert require_imagenet_order(manifest_with(beton, words), beton, KNOWN) is None
    with pytest.raises(UserError, match="label 0 is 'Thing_1, another word', the weights' is 'thing 0'"):
        require_imagenet_order(manifest_with(beton, [*words[1:], words[0]]), beton, KNOWN)
    numbers = [str(k) for k in range(1000)]
    warning = require_imagenet_order(manifest_with(beton, numbers), beton, KNOWN)
    assert warning is not None
    assert "do not show" in warning
