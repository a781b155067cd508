"""The plain data between launcher and workers: a job goes in, a result comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from resnet_dist.config.recipe import Recipe
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.plan import RunPlan

Outcome = Literal["finished", "stopped", "diverged"]


@dataclass(frozen=True)
class Job:
    """What the launcher sends to every worker: plain data, the same for all."""

    recipe: Recipe
    plan: RunPlan
    identity: Identity
    train_beton: Path
    val_beton: Path
    loader_threads: int
    pictures: Mapping[str, Any] = field(default_factory=dict)
    """How the train beton's pictures became pixels."""
    recompute_activations: bool = False
    """Less memory, more computing, the same numbers."""


@dataclass(frozen=True)
class WorkerResult:
    outcome: Outcome
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    """What was seen, of a run that diverged."""
