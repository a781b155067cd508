"""What a worker has in hand while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.order import micro_batch_share
from resnet_dist.models.classifier import BatchNormStatistics
from resnet_dist.models.keyed_noise import StepNoise
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.checkpoint_manager import Background
from resnet_dist.training.collectives import Agreement
from resnet_dist.training.context import Job, RunContext
from resnet_dist.training.feed import Samples
from resnet_dist.training.metrics import DeviceUse, Health, Window
from resnet_dist.training.mixing import Mixer
from resnet_dist.training.model import Precision, around, build_classifier, build_optimizer, compiled, recompute_blocks
from resnet_dist.training.reduce import PowerSgdReduction, Reduction, build_reduction
from resnet_dist.training.schedule import RunPlan
from resnet_dist.training.state import MovingAverage, TrainState
from resnet_dist.training.step import Update


@dataclass
class Run:
    """Everything one worker needs, put together by `worker.py`."""

    recipe: Recipe
    plan: RunPlan
    identity: Identity
    ctx: RunContext
    tracker: Tracker
    state: TrainState
    model: nn.Module
    evaluated: nn.Module
    """`model`, or the moving average of its weights."""
    reduction: Reduction
    update: Update
    statistics: BatchNormStatistics
    noise: StepNoise
    precision: Precision
    mixer: Mixer
    train: Samples
    val: Samples
    window: Window
    health: Health
    device_use: DeviceUse
    pictures: Mapping[str, Any] = field(default_factory=dict)
    """How the train beton's pictures became pixels."""
    agreement: Agreement = field(default_factory=Agreement)
    background: Background = field(default_factory=Background)
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric."""
    best_top1: float = -1.0
    """Percent; of the weights that this worker group has given to `best/`."""
    diverged: str = ""
    """What was seen, once training has diverged."""
    saved_step: int = -1
    save_wanted: bool = False
    """Whether a checkpoint is wanted besides those of the plan."""


# From plain data to a run that can train: model, optimizer and bookkeeping put together.


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
