"""A worker's batches: the two splits of the data set, opened, and the micro-batches of one epoch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.data.decoder import eval_images, train_images
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.order import PageShuffle, micro_batch_share, train_order
from resnet_dist.training.context import RunContext, TrainingJob


class Loader(Protocol):
    """What training needs of `data.loader.BetonLoader`."""

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Batches of a fixed size, in the order of `sample_ids`, augmented as in `epoch`."""


class OpenSplit(NamedTuple):
    """One split of a data set, opened."""

    loader: Loader
    num_samples: int
    page_shuffle: PageShuffle | None = None
    """How samples are shuffled if not across the whole data set."""


def open_data(job: TrainingJob, device: torch.device, stack: ExitStack) -> tuple[OpenSplit, OpenSplit]:
    """Opens the train and the val beton; `stack` closes their loaders."""
    recipe = job.recipe
    by_pages = recipe.data.shuffle == "page"
    train = BetonLoader(
        job.train_beton,
        train_images(recipe),
        batch_size=recipe.train.micro_batch_size,
        num_threads=job.loader_threads,
        device=device,
        reads_ahead=by_pages,
    )
    stack.enter_context(closing(train))
    val = BetonLoader(
        job.val_beton,
        eval_images(recipe),
        batch_size=recipe.eval.batch_size,
        num_threads=job.loader_threads,
        device=device,
    )
    stack.enter_context(closing(val))
    shuffle = PageShuffle(train.page_of_sample, recipe.data.shuffle_window_pages) if by_pages else None
    return OpenSplit(train, train.num_samples, shuffle), OpenSplit(val, val.num_samples)


def steps_from(
    split: OpenSplit, recipe: Recipe, ctx: RunContext, epoch: int, first_step: int
) -> Generator[dict[int, Batch], None, None]:
    """This worker's micro-batches under their numbers, step by step, from `first_step` of `epoch` to the epoch's end.

    Nothing before `first_step` is decoded. Close the generator to end the loader's work on the epoch.
    """
    train = recipe.train
    order = train_order(
        split.num_samples,
        seed=recipe.seed,
        epoch=epoch,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=ctx.rank,
        world_size=ctx.world_size,
        start_step=first_step,
        page_shuffle=split.page_shuffle,
        repeats=recipe.data.augmentation_repeats,
    )
    micro_batches = micro_batch_share(train.num_micro_batches, ctx.rank, ctx.world_size)
    with closing(batches_of(split, ctx, epoch, order.reshape(-1))) as batches:
        # zip advances the range first, so it never takes a batch of the next step.
        while local := dict(zip(micro_batches, batches, strict=False)):
            yield local


def batches_of(split: OpenSplit, ctx: RunContext, epoch: int, ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
    """The batches of the samples `ids`, with a heartbeat for each."""
    with closing(split.loader.epoch(epoch, ids)) as batches:
        for batch in batches:
            ctx.heartbeat()
            yield batch
