"""A worker's input and output: the job, the result, and the context that the worker runs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from resnet_dist.config.recipe import Recipe
from resnet_dist.storage.base import RunStorage
from resnet_dist.training.checkpoint import METADATA, Identity, prune
from resnet_dist.training.schedule import RunPlan

Outcome = Literal["finished", "stopped", "diverged"]
WriteCheckpoint = Callable[[Path], None]
"""Writes a checkpoint's files into an empty folder. Called once, possibly in another thread."""


@dataclass(frozen=True)
class TrainingJob:
    """What the launcher sends to every worker: plain data, the same for all."""

    recipe: Recipe
    plan: RunPlan
    identity: Identity
    train_beton: Path
    val_beton: Path
    loader_threads: int
    pictures: Mapping[str, Any] = field(default_factory=dict)
    """How the pictures of the train beton were converted to pixels."""
    recompute_activations: bool = False
    """Activation checkpointing: less memory, more computing, the same numbers."""


@dataclass(frozen=True)
class WorkerResult:
    outcome: Outcome
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    """How the divergence was noticed, if the run diverged."""


class RunContext(Protocol):
    """One worker's view of its run. `launch.worker.RayContext` is that of a worker in a Ray Train group, `LocalContext`
    that of a process on its own."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def storage(self) -> RunStorage:
        """The run's storage, seen by all workers: checkpoints are in it."""

    def save_checkpoint(self, name: str, write: WriteCheckpoint | None, metrics: Mapping[str, float]) -> None:
        """Commits a checkpoint under `name`. All workers call it; rank 0 passes `write`, the others None.

        May return before the checkpoint is committed. Checkpoints are committed in the order of the calls, each
        completely or not at all.
        """

    def wait_for_checkpoints(self) -> None:
        """Waits until all checkpoints that this worker saved are committed."""

    @property
    def storage_timeout_s(self) -> float:
        """Longest time that a write to storage may take."""

    def stop_requested(self) -> bool:
        """Whether the user asked this run to stop. May differ between workers for a moment. Never blocks."""

    def save_requested(self) -> bool:
        """Whether a checkpoint is requested now, besides the planned ones. May differ between workers. Never blocks."""

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows how far the run is. Never raises."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every evaluation; `metrics` has the newest value of each. May wait until it has been judged."""

    def report_straggler(self, rank: int, factor: float) -> None:
        """Worker `rank` has been `factor` times as slow as the rest for a while. Never blocks, never raises."""

    def heartbeat(self) -> None:
        """Tells the watchdog that this worker makes progress. Called for every batch."""


class Observer:
    """Watches a run while it trains, and may ask it to stop. This one does neither."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every evaluation. In a `LocalContext` training continues only when this returns."""

    def stop_requested(self) -> bool:
        return False


@dataclass
class LocalContext:
    """The context of a process on its own, without Ray: small nets, tests, profiling.

    Args:
        storage: where checkpoints go.
        keep: how many checkpoints to keep, the newest ones. None: all.
        observer: is told of every evaluation, and may stop the run.
        storage_timeout_s: longest time that a write to storage may take.
        on_heartbeat: called for every batch.
    """

    storage: RunStorage
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    keep: int | None = None
    observer: Observer = field(default_factory=Observer)
    on_heartbeat: Callable[[], object] = lambda: None
    storage_timeout_s: float = 300.0

    def save_checkpoint(self, name: str, write: WriteCheckpoint | None, metrics: Mapping[str, float]) -> None:
        if write is not None:
            self.storage.commit(name, write, last=METADATA)
            if self.keep is not None:
                prune(self.storage, self.keep)

    def wait_for_checkpoints(self) -> None:
        """Nothing to do: `save_checkpoint` commits before it returns."""

    def stop_requested(self) -> bool:
        return self.observer.stop_requested()

    def save_requested(self) -> bool:
        return False

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to do: nobody is shown it."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.observer.evaluated(step, metrics)

    def report_straggler(self, rank: int, factor: float) -> None:
        """Nothing to do: there are no other workers."""

    def heartbeat(self) -> None:
        self.on_heartbeat()
