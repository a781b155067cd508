"""`show-batch` shows the images of training itself: the same samples, pixels and targets as a worker's step gets."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import Recipe, train_size
from resnet_dist.errors import UserError
from resnet_dist.evaluation import batch_sheet
from resnet_dist.evaluation.batch_sheet import draw_evaluation_batch, draw_training_batch
from resnet_dist.evaluation.sheets import Tile, draw_sheet
from resnet_dist.training.context import RunContext
from resnet_dist.training.feed import open_train, steps_from
from resnet_dist.training.model import Precision, build_classifier, build_optimizer
from resnet_dist.training.reduce import build_reduction
from resnet_dist.training.state import TrainState
from resnet_dist.training.step import TrainStep, images_and_targets

RECIPE = Path(__file__).parents[3] / "resnet_dist" / "recipes" / "digits_resnet20.yaml"
SETS = [
    "model.name=resnet8",
    "model.num_classes=3",
    "model.drop_path=0.1",  # its keys travel with those of mixing
    "data.train={kind: random_resized_crop, size: 32, augment: [{kind: rand_augment}]}",
    "data.mixing={mixup_alpha: 0.2, cutmix_alpha: 1.0}",
    "train.global_batch_size=6",
    "train.micro_batch_size=2",
    "train.total_epochs=4",
]


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(RECIPE, SETS)


def shown_to_the_net(recipe: Recipe, data: Path, epoch: int) -> list[tuple[np.ndarray, torch.Tensor]]:
    """The images that go into the net in the first step of an epoch and the targets, in training's own objects."""
    classifier = build_classifier(recipe)
    seen: list[np.ndarray] = []
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().round().numpy().copy()))
    state = TrainState(
        classifier.net, build_optimizer(classifier, recipe.optim), scaler=Precision("fp32").scaler(torch.device("cpu"))
    )
    reduction = build_reduction("exact", classifier, rank=0, world_size=1, num_micro_batches=3, compression=None)
    trains = TrainStep(recipe, state, classifier, reduction, torch.device("cpu"))
    context = RunContext()
    context.rank, context.world_size = 0, 1
    targets = []
    image_px = train_size(recipe.data, epoch, recipe.train.total_epochs)
    with ExitStack() as stack:
        split = open_train(recipe, data, torch.device("cpu"), stack, num_threads=1)
        batches = next(
            steps_from(
                split, recipe, context, epoch, 0, numbers=lambda step, launch: trains.numbers(step, launch, image_px)
            )
        )
        for batch in batches:
            reduction.start_launch(is_last=False)
            trains.forward_backward(batch)
            targets.append(images_and_targets(recipe, batch, batch.numbers[len(trains.noise) :])[1])
    return list(zip(seen, targets, strict=True))


def test_the_sheet_has_what_goes_into_the_net(
    recipe: Recipe, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tile] = []
    monkeypatch.setattr(batch_sheet, "draw_sheet", lambda path, tiles, title: drawn.extend(tiles))
    assert draw_training_batch(recipe, pictures.beton, tmp_path / "a.png", epoch=2, count=5) == 5
    expected = shown_to_the_net(recipe, pictures.beton, epoch=2)
    images = np.concatenate([images for images, _ in expected])[:5]
    np.testing.assert_array_equal(np.stack([tile.pixels for tile in drawn]), images.astype(np.uint8))
    for tile, target in zip(drawn, torch.cat([targets for _, targets in expected]), strict=False):
        shares = dict.fromkeys("abc", 0.0)
        for text, _ in tile.lines[:-1]:
            percent, is_mixed, name = text.rpartition("% ")
            shares[name] += int(percent) / 100 if is_mixed else 1.0
        assert list(shares.values()) == pytest.approx(target.tolist(), abs=0.011)
    assert any("%" in tile.lines[0][0] for tile in drawn)


def test_the_evaluation_is_spread_over_the_beton_and_not_augmented(
    recipe: Recipe, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tile] = []
    monkeypatch.setattr(batch_sheet, "draw_sheet", lambda path, tiles, title: drawn.extend(tiles))
    assert draw_evaluation_batch(recipe, pictures.beton, tmp_path / "a.png", count=3) == 3
    assert [tile.lines[-1][0] for tile in drawn] == ["sample 0", "sample 3", "sample 6"]
    assert [tile.lines[0][0] for tile in drawn] == ["a", "b", "c"]
    assert drawn[0].pixels.shape == (recipe.data.eval.size, recipe.data.eval.size, 3)


@pytest.mark.parametrize(
    ("epoch", "step", "expected"),
    [(4, 0, "--epoch 4: the recipe has the epochs 0..3"), (0, 1, "--step 1: an epoch has the steps 0..0")],
)
def test_a_step_that_does_not_exist_is_refused(
    recipe: Recipe, pictures: Any, tmp_path: Path, epoch: int, step: int, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        draw_training_batch(recipe, pictures.beton, tmp_path / "a.png", epoch=epoch, step=step)


def test_small_pictures_are_enlarged_pixel_by_pixel_and_long_names_are_cut(tmp_path: Path) -> None:
    tile = Tile(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3), (("a very long class name " * 9, "strong"),))
    draw_sheet(tmp_path / "a.png", [tile, replace(tile, lines=())], "title")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (2 * 160 + 12 + 2 * 16, 16 + 18 + 12 + 160 + 18 + 12 + 16)
        enlarged = np.asarray(sheet)[46:206, 16:176]
    np.testing.assert_array_equal(enlarged[10::20, 10::20], tile.pixels)
