"""What a worker trains and evaluates on: its micro-batches, step by step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.data.order import micro_batch_share, train_order
from resnet_dist.training.context import RunContext
from resnet_dist.training.samples import Samples


def steps_from(
    samples: Samples, recipe: Recipe, ctx: RunContext, epoch: int, start_step: int
) -> Iterator[dict[int, Batch]]:
    """This worker's micro-batches under their numbers, step by step from `start_step` of `epoch` to the epoch's end;
    nothing before is decoded."""
    train = recipe.train
    order = train_order(
        samples.num_samples,
        seed=recipe.seed,
        epoch=epoch,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=ctx.rank,
        world_size=ctx.world_size,
        start_step=start_step,
        pages=samples.pages,
        repeats=recipe.data.augmentation_repeats,
    )
    micro_batches = micro_batch_share(train.num_micro_batches, ctx.rank, ctx.world_size)
    with closing(batches_of(samples, ctx, epoch, order.reshape(-1))) as batches:
        # zip asks the range first, so it never takes a batch of the next step.
        while local := dict(zip(micro_batches, batches, strict=False)):
            yield local


def batches_of(samples: Samples, ctx: RunContext, epoch: int, ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
    """The samples' batches, with a sign of life for each."""
    with closing(samples.loader.epoch(epoch, ids)) as batches:
        for batch in batches:
            ctx.beat()
            yield batch
