"""A worker's batches: the two splits of the data set, opened, and the micro-batches of one epoch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.config.recipe import Recipe, steps_per_epoch
from resnet_dist.data.batch import Batch
from resnet_dist.data.decoder import eval_images, train_images
from resnet_dist.data.loader import BetonLoader, Numbers
from resnet_dist.data.order import (
    ClassSampling,
    PageShuffle,
    eval_batch_size,
    micro_batch_share,
    sampling_weights,
    train_order,
)
from resnet_dist.training.context import RunContext, TrainingJob


class Loader(Protocol):
    """What training needs of `data.loader.BetonLoader`."""

    def epoch(
        self,
        epoch: int,
        sample_ids: NDArray[np.int64],
        *,
        sizes: Sequence[int] | None = None,
        numbers: Numbers | None = None,
    ) -> Generator[Batch, None, None]:
        """Batches in the order of `sample_ids`, augmented as in `epoch`: of the loader's own size, or of `sizes`, over
        and over. `numbers(i)` goes with batch i."""


class OpenSplit(NamedTuple):
    """One split of a data set, opened."""

    loader: Loader
    num_samples: int
    page_shuffle: PageShuffle | None = None
    """How samples are shuffled if not across the whole data set."""
    sampling: ClassSampling | None = None
    """How often each sample is shown if not once."""


def open_data(job: TrainingJob, device: torch.device, stack: ExitStack) -> tuple[OpenSplit, OpenSplit]:
    """Opens the train and the val beton; `stack` closes their loaders."""
    recipe, num_threads = job.recipe, job.loader_threads
    train = open_train(recipe, job.train_beton, device, stack, num_threads=num_threads)
    val = BetonLoader(
        job.val_beton,
        eval_images(recipe),
        batch_size=eval_batch_size(recipe.eval.batch_size, device.type),
        num_threads=num_threads,
        device=device,
    )
    stack.enter_context(closing(val))
    return train, OpenSplit(val, val.num_samples)


def open_train(recipe: Recipe, beton: Path, device: torch.device, stack: ExitStack, *, num_threads: int) -> OpenSplit:
    """Opens a beton to train on; `stack` closes its loader."""
    by_pages = recipe.data.shuffle == "page"
    train = BetonLoader(
        beton,
        train_images(recipe),
        batch_size=recipe.train.micro_batch_size,
        num_threads=num_threads,
        device=device,
        reads_ahead=by_pages,
    )
    stack.enter_context(closing(train))
    shuffle = PageShuffle(train.page_of_sample, recipe.data.shuffle_window_pages) if by_pages else None
    sampling = None
    if recipe.data.sampling is not None:
        names, counts = train.manifest.class_names, train.manifest.class_counts
        sampling = ClassSampling(train.labels, sampling_weights(recipe.data.sampling, names, counts), recipe.seed)
    return OpenSplit(train, train.num_samples, shuffle, sampling)


def steps_from(
    split: OpenSplit,
    recipe: Recipe,
    ctx: RunContext,
    epoch: int,
    first_step: int,
    *,
    launches: Sequence[range] | None = None,
    numbers: Callable[[int, range], NDArray[np.int64]] | None = None,
) -> Generator[list[Batch], None, None]:
    """This worker's micro-batches, step by step, from `first_step` of `epoch` to the epoch's end.

    Nothing before `first_step` is decoded. Close the generator to end the loader's work on the epoch.

    Args:
        launches: which micro-batches are in one batch, as `TrainStep.prepare` gives them. None: each on its own.
        numbers: from the step's number and a launch to the `numbers` of its batch.
    """
    train, fixed = recipe.train, recipe.data.overfit_batch
    order = train_order(
        split.num_samples,
        seed=recipe.seed,
        epoch=0 if fixed else epoch,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=ctx.rank,
        world_size=ctx.world_size,
        start_step=0 if fixed else first_step,
        page_shuffle=split.page_shuffle,
        repeats=recipe.data.augmentation_repeats,
        sampling=split.sampling,
    )
    if fixed:
        order = order[[0] * (len(order) - first_step)]
    share = micro_batch_share(train.num_micro_batches, ctx.rank, ctx.world_size)
    launches = launches or [share[i : i + 1] for i in range(len(share))]
    sizes = [len(launch) * train.micro_batch_size for launch in launches]
    step = epoch * steps_per_epoch(split.num_samples, train.global_batch_size) + first_step

    def of_batch(index: int) -> NDArray[np.int64]:
        assert numbers is not None
        steps, launch = divmod(index, len(launches))
        return numbers(step + steps, launches[launch])

    drawn = None if numbers is None else of_batch
    with closing(
        batches_of(split, ctx, 0 if fixed else epoch, order.reshape(-1), sizes=sizes, numbers=drawn)
    ) as batches:
        # zip advances the launches first, so it never takes a batch of the next step.
        while local := [replace(batch, micro_batches=mine) for mine, batch in zip(launches, batches, strict=False)]:
            yield local


def batches_of(
    split: OpenSplit,
    ctx: RunContext,
    epoch: int,
    ids: NDArray[np.int64],
    *,
    sizes: Sequence[int] | None = None,
    numbers: Numbers | None = None,
) -> Generator[Batch, None, None]:
    """The batches of the samples `ids`, with a heartbeat for each."""
    with closing(split.loader.epoch(epoch, ids, sizes=sizes, numbers=numbers)) as batches:
        for batch in batches:
            ctx.heartbeat()
            yield batch
