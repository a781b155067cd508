"""One worker of a run: plain data in, loaders opened, resumed where the run stands, trained, outcome out."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch

from data_prep.beton.manifest import load_manifest
from resnet_dist.config.image_size import train_size
from resnet_dist.config.recipe_data import CenterCrop, TrainTransform
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.order import PageShuffle
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.assemble import assemble
from resnet_dist.training.backends import set_backends
from resnet_dist.training.context import RunContext
from resnet_dist.training.job import Job, WorkerResult
from resnet_dist.training.loop import fit
from resnet_dist.training.resume import restore
from resnet_dist.training.samples import Samples


def run_worker(job: Job, ctx: RunContext, tracker: Tracker) -> WorkerResult:
    """Runs one worker to the end of the plan or to a stop. The result is the same on all workers.

    Raises:
        UserError: the checkpoint to resume from is of another recipe or of other data.
        Fault: bad data, a damaged checkpoint, a loader that died.
    """
    set_backends(job.recipe.train)
    with ExitStack() as stack:
        run = assemble(job, ctx, tracker, *open_data(job, ctx.device, stack))
        restore(run)
        ctx.progress(run.state.step, {})
        outcome = fit(run)
        run.background.wait()
        ctx.settle()  # while the watchdog still looks: Ray waits for what is left without a limit
        return WorkerResult(outcome, run.state.step, run.metrics, run.diverged)


def open_data(job: Job, device: torch.device, stack: ExitStack) -> tuple[Samples, Samples]:
    """The train and the val beton behind their loaders; `stack` closes them."""
    recipe = job.recipe
    pages = recipe.data.shuffle == "page"

    def open_beton(beton: Path, transform: TrainTransform | CenterCrop, batch_size: int) -> Samples:
        manifest = load_manifest(beton)
        trains = not isinstance(transform, CenterCrop)
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
            reads_ahead=pages and trains,
            size_at=partial(train_size, recipe.data, total_epochs=recipe.train.total_epochs) if trains else None,
            num_copies=recipe.data.augmentation_repeats if trains else 1,
        )
        stack.enter_context(closing(loader))
        shuffle = PageShuffle(loader.page_of_sample, recipe.data.shuffle_window_pages) if pages and trains else None
        return Samples(loader, manifest.num_samples, shuffle)

    return (
        open_beton(job.train_beton, recipe.data.train, recipe.train.micro_batch_size),
        open_beton(job.val_beton, recipe.data.eval, recipe.eval.batch_size),
    )
