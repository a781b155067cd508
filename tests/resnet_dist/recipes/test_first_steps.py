"""Every recipe's first and last epoch begin on a CPU, with its own loader, at reduced size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import resnet_dist
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import Recipe
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import open_data
from resnet_dist.training.loop import Trainer
from resnet_dist.training.schedule import RunPlan
from tests.resnet_dist.data.conftest import jpeg, photograph, write

RECIPES = sorted((Path(resnet_dist.__file__).parent / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """12 images of 10 classes each: photographs of 72 x 64 px, and tiles of 32 x 32 px."""
    folder = tmp_path_factory.mktemp("betons")
    images = {
        "photos": [jpeg(photograph(72, 64, k)) for k in range(12)],
        "tiles": [photograph(32, 32, k) for k in range(12)],
    }
    return {name: write(folder / f"{name}.beton", pictures) for name, pictures in images.items()}


def is_of_photographs(recipe: Recipe) -> bool:
    return recipe.data.dataset in ("imagenet", "my_pictures")


def reduced(path: Path) -> Recipe:
    """The recipe with everything it has, but small: 64 or 32 px, 18 or 50 layers, two micro-batches of four."""
    whole = load_recipe(path)
    sets = ["train.global_batch_size=8", "train.micro_batch_size=4", "model.num_classes=10", "eval.batch_size=4"]
    if is_of_photographs(whole):
        name = "resnet50" if whole.model.bottleneck_stride == "1x1" else "resnet18"
        sets += [f"model.name={name}", "data.train.size=64", "data.eval.size=64", "data.eval.resize=72"]
        if whole.data.train.kind == "scale_crop":
            sets += ["data.train.size=32", "data.train.shorter_side=[36, 60]"]
        if whole.data.progressive_size:
            sets += ["data.progressive_size.start_size=32"]
    return load_recipe(path, sets)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_steps(path: Path, betons: dict[str, Path], tmp_path: Path) -> None:
    recipe = reduced(path)
    beton = betons["photos" if is_of_photographs(recipe) else "tiles"]
    epochs = recipe.train.total_epochs
    plan = RunPlan(
        steps_per_epoch=1,
        total_steps=epochs,
        last_step=epochs,
        eval_every_epochs=1,
        save_every_epochs=1,
        save_every_steps=None,
        log_every_steps=1,
    )
    job = TrainingJob(recipe, plan, Identity("r", "d"), beton, beton, loader_threads=1)
    context = LocalContext(FolderStorage(tmp_path))
    with ExitStack() as stack:
        trainer = Trainer(job, context, Tracker(), *open_data(job, context.device, stack))
        trainer.classifier.train()
        net = trainer.state.net
        weight = net.conv1.weight if recipe.model.stem == "conv7" else next(net.parameters())
        seen, sizes = [weight.detach().clone()], []
        for epoch in (0, epochs - 1):
            trainer.state.step = epoch
            (batches,) = trainer.steps_from(epoch, 0)
            sizes.append(batches[0].images.shape[1])
            assert [number for batch in batches for number in batch.micro_batches] == [0, 1]
            trainer.train_step(batches, trainer.learning_rate(epoch), trainer.accumulator, measure_norm=False)
            seen.append(weight.detach().clone())
        point = trainer.accumulator.take(0.1, next_step=epochs)
    assert math.isfinite(point.metrics["train/loss"])
    assert point.diverged_step is None
    assert not torch.equal(seen[1], seen[2])  # also where the first rate is 0
    assert sizes == [32, 64] if recipe.data.progressive_size else sizes == [recipe.data.train.size] * 2
    if trainer.state.average is not None:
        assert trainer.evaluated is not trainer.classifier
