"""What the loop knows of the world it runs in: who am I, where do I compute, how do I report, where do I resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from resnet_dist.config.recipe import Recipe
from resnet_dist.storage.base import RunStorage
from resnet_dist.training.checkpoint import CARD, Identity
from resnet_dist.training.schedule import RunPlan

WriteCheckpoint = Callable[[Path], None]
"""Writes a checkpoint's files into an empty folder. Called once, maybe in another thread."""


class RunContext(Protocol):
    """One worker's view of its run. `launch.ray_context` gives it Ray's; `LocalContext` needs no cluster."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def storage(self) -> RunStorage:
        """The run's storage, which all workers see: checkpoints lie in it."""

    def report(self, metrics: Mapping[str, float], write: WriteCheckpoint | None, name: str) -> None:
        """Commits a checkpoint under `name`: rank 0 says how to write it, the others None. All workers call it.

        May return before the checkpoint is committed; checkpoints are committed in the order of their reports, whole
        or not at all.
        """

    def settle(self) -> None:
        """Waits until what this worker reported is committed."""

    def stop_requested(self) -> bool:
        """Whether the user asked this run to stop. May differ between workers for a moment; never blocks."""

    def save_requested(self) -> bool:
        """Whether a checkpoint is wanted now, besides those of the plan. May differ between workers; never blocks."""

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows where the run stands. Never blocks, never raises."""

    def slow(self, rank: int, factor: float) -> None:
        """Worker `rank` has been this many times as slow as the others for a while. Never blocks, never raises."""

    def beat(self) -> None:
        """Says that this worker is alive and getting on; called for every batch."""


@dataclass
class LocalContext:
    """One process, no cluster: unit tests and profiling. Checkpoints lie in `storage`."""

    storage: RunStorage
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    reports: list[dict[str, float]] = field(default_factory=list)
    stop_at_step: int | None = None
    _step: int = 0

    def report(self, metrics: Mapping[str, float], write: WriteCheckpoint | None, name: str) -> None:
        self.reports.append(dict(metrics))
        if write is not None:
            self.storage.commit(name, write, last=CARD)

    def settle(self) -> None:
        """`report` has done it."""

    def stop_requested(self) -> bool:
        return self.stop_at_step is not None and self._step >= self.stop_at_step

    def save_requested(self) -> bool:
        return False

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step

    def slow(self, rank: int, factor: float) -> None:
        """There are no others."""

    def beat(self) -> None:
        """Nobody watches a single process."""


# The plain data between launcher and workers: a job goes in, a result comes back.


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
