"""`resnet-dist show-batch`: a sheet of the images of a training step, or of the evaluation, as the net gets them."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_prep.beton.manifest import load_manifest
from resnet_dist.config.recipe import Recipe, steps_per_epoch, train_size
from resnet_dist.data.batch import Batch
from resnet_dist.data.checks import require_classes
from resnet_dist.data.decoder import eval_images
from resnet_dist.data.loader import BetonLoader
from resnet_dist.errors import UserError
from resnet_dist.evaluation.sheets import Ink, Tile, draw_sheet, require_picture_name
from resnet_dist.training.context import RunContext
from resnet_dist.training.feed import open_train, steps_from
from resnet_dist.training.launches import launch_numbers
from resnet_dist.training.step import images_and_targets

_CPU = torch.device("cpu")
_LEAST_SHARE = 0.005
"""Of an image that is mixed in: less rounds to 0 %."""


def draw_training_batch(
    recipe: Recipe, data: Path, output: Path, *, epoch: int = 0, step: int = 0, count: int = 32, num_threads: int = 1
) -> int:
    """Draws the first `count` images of a step, cropped, augmented and mixed as a run of this recipe trains on them on
    any number of workers. Returns how many there are.

    Args:
        step: in the epoch, from 0.

    Raises UserError if the data does not suit the recipe, or there is no such step; Fault for an image that cannot be
    decoded.
    """
    require_picture_name("--output", output)
    train, manifest = recipe.train, load_manifest(data)
    require_classes(recipe, manifest, data)
    num_steps = steps_per_epoch(manifest.num_samples, train.global_batch_size)
    if not 0 <= epoch < train.total_epochs:
        raise UserError(f"--epoch {epoch}: the recipe has the epochs 0..{train.total_epochs - 1}")
    if not 0 <= step < num_steps:
        raise UserError(f"--step {step}: an epoch has the steps 0..{num_steps - 1}")
    count = min(count, train.global_batch_size)
    image_px = train_size(recipe.data, epoch, train.total_epochs)
    alone = RunContext()
    alone.rank, alone.world_size = 0, 1
    launches = [range(k, k + 1) for k in range(-(-count // train.micro_batch_size))]  # the first micro-batches
    numbers = partial(launch_numbers, recipe, num_layers=0, image_px=image_px)
    names, tiles = manifest.class_names, list[Tile]()
    with ExitStack() as stack:
        split = open_train(recipe, data, _CPU, stack, num_threads=num_threads)
        steps = stack.enter_context(
            closing(steps_from(split, recipe, alone, epoch, step, launches=launches, numbers=numbers))
        )
        for batch in next(steps):
            images, _ = images_and_targets(recipe, batch, batch.numbers)
            pixels = images.float().round().clamp(0, 255).to(torch.uint8).numpy()
            labels, samples = batch.labels.tolist(), batch.sample_ids.tolist()
            for picture, parts in zip(pixels, _parts(batch), strict=True):
                percent = [f"{share:.0%} " if len(parts) > 1 else "" for _, share in parts]
                classes = [f"{text}{names[labels[k]]}" for text, (k, _) in zip(percent, parts, strict=True)]
                ids = ", ".join(str(samples[k]) for k, _ in parts)
                lines: list[tuple[str, Ink]] = [(line, "strong") for line in classes]
                tiles.append(Tile(picture, (*lines, (f"sample{'s' * (len(parts) > 1)} {ids}", "faint"))))
    title = f"{data.name}, epoch {epoch}, step {step}: {count} of {train.global_batch_size:,} images, {image_px} px"
    draw_sheet(output, tiles[:count], title)
    return count


def _parts(batch: Batch) -> list[list[tuple[int, float]]]:
    """What each image of a micro-batch is mixed of: places in it and their shares of the target, the largest first."""
    num_images = len(batch.labels)
    if not len(batch.numbers):  # nothing is mixed
        return [[(k, 1.0)] for k in range(num_images)]
    partners, shares, _ = batch.numbers.split([num_images, 2, 4])
    own = float(shares.view(torch.float64)[0])
    mixed = [[(k, own), (partner, 1.0 - own)] for k, partner in enumerate(partners.tolist())]
    seen = [[part for part in parts if part[1] >= _LEAST_SHARE] for parts in mixed]
    return [sorted(parts, key=lambda part: -part[1]) for parts in seen]


def draw_evaluation_batch(recipe: Recipe, data: Path, output: Path, *, count: int = 32, num_threads: int = 1) -> int:
    """Draws `count` samples, spread evenly over the beton, as the recipe evaluates them. Returns how many there are.

    Raises as `draw_training_batch` does.
    """
    require_picture_name("--output", output)
    manifest = load_manifest(data)
    require_classes(recipe, manifest, data)
    ids = np.unique(np.linspace(0, manifest.num_samples - 1, num=count).astype(np.int64))
    loader = BetonLoader(data, eval_images(recipe), batch_size=len(ids), num_threads=num_threads)
    with closing(loader), closing(loader.epoch(0, ids)) as batches:
        batch = next(batches)
    tiles = [
        Tile(picture, ((manifest.class_names[label], "strong"), (f"sample {sample}", "faint")))
        for picture, label, sample in zip(batch.images.numpy(), batch.labels.tolist(), ids.tolist(), strict=True)
    ]
    title = f"{data.name}, evaluation: {len(ids)} of {manifest.num_samples:,} images, {recipe.data.eval.size} px"
    draw_sheet(output, tiles, title)
    return len(ids)
