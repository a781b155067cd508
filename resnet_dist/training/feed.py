"""Where a worker's batches come from."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.beton.manifest import load_manifest
from resnet_dist.config.recipe import CenterCrop, Recipe, TrainTransform, train_size
from resnet_dist.data.batch import Batch
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.order import PageShuffle, micro_batch_share, train_order
from resnet_dist.training.context import RunContext, TrainingJob


class Loader(Protocol):
    """What training needs of `data.loader.BetonLoader`."""

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Batches of a fixed size, in the order of `sample_ids`, augmented as in `epoch`."""


class Samples(NamedTuple):
    """One split of a data set."""

    loader: Loader
    num_samples: int
    page_shuffle: PageShuffle | None = None
    """How samples are shuffled if not across the whole data set."""


def open_data(job: TrainingJob, device: torch.device, stack: ExitStack) -> tuple[Samples, Samples]:
    """Opens the train and the val beton; `stack` closes their loaders."""
    recipe = job.recipe

    def open_beton(beton: Path, transform: TrainTransform | CenterCrop, batch_size: int) -> Samples:
        manifest = load_manifest(beton)
        trains = not isinstance(transform, CenterCrop)
        shuffles_pages = trains and recipe.data.shuffle == "page"
        loader = BetonLoader(
            beton,
            manifest,
            transform,
            decoder=recipe.data.decoder,
            batch_size=batch_size,
            seed=recipe.seed,
            num_threads=job.loader_threads,
            device=device,
            on_bad_sample=recipe.data.on_bad_sample if trains else "error",
            reads_ahead=shuffles_pages,
            size_at=partial(train_size, recipe.data, total_epochs=recipe.train.total_epochs) if trains else None,
            num_copies=recipe.data.augmentation_repeats if trains else 1,
        )
        stack.enter_context(closing(loader))
        shuffle = PageShuffle(loader.page_of_sample, recipe.data.shuffle_window_pages) if shuffles_pages else None
        return Samples(loader, manifest.num_samples, shuffle)

    return (
        open_beton(job.train_beton, recipe.data.train, recipe.train.micro_batch_size),
        open_beton(job.val_beton, recipe.data.eval, recipe.eval.batch_size),
    )


def steps_from(
    samples: Samples, recipe: Recipe, ctx: RunContext, epoch: int, first_step: int
) -> Generator[dict[int, Batch], None, None]:
    """This worker's micro-batches under their numbers, step by step, from `first_step` of `epoch` to the epoch's end.

    Nothing before `first_step` is decoded. Close the generator to end the loader's work on the epoch.
    """
    train = recipe.train
    order = train_order(
        samples.num_samples,
        seed=recipe.seed,
        epoch=epoch,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=ctx.rank,
        world_size=ctx.world_size,
        start_step=first_step,
        page_shuffle=samples.page_shuffle,
        repeats=recipe.data.augmentation_repeats,
    )
    micro_batches = micro_batch_share(train.num_micro_batches, ctx.rank, ctx.world_size)
    with closing(batches_of(samples, ctx, epoch, order.reshape(-1))) as batches:
        # zip advances the range first, so it never takes a batch of the next step.
        while local := dict(zip(micro_batches, batches, strict=False)):
            yield local


def batches_of(samples: Samples, ctx: RunContext, epoch: int, ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
    """The batches of the samples `ids`, with a heartbeat for each."""
    with closing(samples.loader.epoch(epoch, ids)) as batches:
        for batch in batches:
            ctx.heartbeat()
            yield batch
