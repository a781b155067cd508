"""From plain data to a run that can train: model, optimizer and bookkeeping put together."""

from __future__ import annotations

import math

from resnet_dist.data.order import micro_batch_share
from resnet_dist.models.keyed_noise import StepNoise
from resnet_dist.models.statistics import BatchNormStatistics
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.average import MovingAverage
from resnet_dist.training.classifier import around, build_classifier, compiled
from resnet_dist.training.context import RunContext
from resnet_dist.training.device_use import DeviceUse
from resnet_dist.training.health import Health
from resnet_dist.training.job import Job
from resnet_dist.training.metrics import Window
from resnet_dist.training.mixing import Mixer
from resnet_dist.training.optim import build_optimizer
from resnet_dist.training.powersgd import PowerSgdReduction
from resnet_dist.training.precision import Precision
from resnet_dist.training.recompute import recompute_blocks
from resnet_dist.training.reduce import build_reduction
from resnet_dist.training.run import Run
from resnet_dist.training.samples import Samples
from resnet_dist.training.state import TrainState
from resnet_dist.training.update import Update


def assemble(job: Job, ctx: RunContext, tracker: Tracker, train: Samples, val: Samples) -> Run:
    """The run at its first step: model and optimizer on the context's device, nothing restored yet."""
    recipe, precision = job.recipe, Precision(job.recipe.train.precision)
    num_micro_batches = recipe.train.num_micro_batches
    model = build_classifier(recipe).to(ctx.device, precision.weights)
    average = MovingAverage(model.net, recipe.train.ema, job.plan.steps_per_epoch) if recipe.train.ema else None
    if job.recompute_activations:
        recompute_blocks(model)
    reduction = build_reduction(
        recipe.train.reduction,
        compiled(model) if recipe.train.compile else model,
        rank=ctx.rank,
        world_size=ctx.world_size,
        num_micro_batches=num_micro_batches,
        compression=recipe.train.gradient_compression,
    )
    state = TrainState(
        model.net,
        build_optimizer(model, recipe.optim),
        average=average,
        scaler=precision.scaler(ctx.device),
        gradient_memory=reduction if isinstance(reduction, PowerSgdReduction) else None,
    )
    return Run(
        recipe=recipe,
        plan=job.plan,
        identity=job.identity,
        pictures=job.pictures,
        ctx=ctx,
        tracker=tracker,
        state=state,
        model=model,
        evaluated=around(average.net, recipe) if average else model,
        reduction=reduction,
        update=Update(state, clip_grad_norm=recipe.optim.clip_grad_norm),
        statistics=BatchNormStatistics(model),
        noise=StepNoise(model),
        precision=precision,
        mixer=Mixer(
            recipe.data.mixing, seed=recipe.seed, num_classes=recipe.model.num_classes, dtype=precision.weights
        ),
        train=train,
        val=val,
        health=Health(
            [len(micro_batch_share(num_micro_batches, r, ctx.world_size)) for r in range(ctx.world_size)],
            recipe.train.micro_batch_size,
        ),
        device_use=DeviceUse(recipe, ctx.device, ctx.world_size),
        window=Window(
            num_micro_batches,
            recipe.train.micro_batch_size,
            ctx.rank,
            ctx.world_size,
            reduction.wait,
            max_loss=recipe.train.divergence.max_loss or math.inf,
            counts_replaced=recipe.data.on_bad_sample == "skip",
        ),
    )
