"""What a worker has in hand while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from resnet_dist.config.recipe import Recipe
from resnet_dist.models.keyed_noise import StepNoise
from resnet_dist.models.statistics import BatchNormStatistics
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.agreement import Agreement
from resnet_dist.training.background import Background
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import RunContext
from resnet_dist.training.device_use import DeviceUse
from resnet_dist.training.health import Health
from resnet_dist.training.metrics import Window
from resnet_dist.training.mixing import Mixer
from resnet_dist.training.plan import RunPlan
from resnet_dist.training.precision import Precision
from resnet_dist.training.reduce import Reduction
from resnet_dist.training.samples import Samples
from resnet_dist.training.state import TrainState
from resnet_dist.training.update import Update


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
