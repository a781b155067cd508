"""A worker's input and output: the job, the result, and the context that the worker runs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from resnet_dist.config.recipe import Recipe
from resnet_dist.storage.base import RunStorage
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.schedule import RunPlan

TrainingOutcome = Literal["finished", "stopped", "diverged"]


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
    micro_batches_per_launch: int | None = None
    """How many micro-batches go through the net together, at most; None: chosen by the worker. The same numbers up to
    rounding."""
    cuda_graphs: bool = True
    """Whether a launch on a GPU is captured and replayed; the same numbers."""
    save_every_s: float | None = None
    """A checkpoint is also written when the last one is this old."""


@dataclass(frozen=True)
class WorkerResult:
    outcome: TrainingOutcome
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    """How the divergence was noticed, or why the run finished early."""


class Observer:
    """Watches a run while it trains, and may ask it to stop. This one does neither."""

    def progressed(self, step: int) -> None:
        """Called every now and then while steps are done."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every evaluation. In a `LocalContext` training continues only when this returns."""

    def stop_requested(self) -> bool:
        return False


class RunContext:
    """One worker's view of its run: `LocalContext`, or `launch.worker.RayContext` in a Ray Train group.

    The methods never block and never raise, except where they say so. What they do here is right for a worker that
    trains in a process on its own and that nobody watches.
    """

    rank: int
    world_size: int
    device: torch.device
    storage: RunStorage
    """The run's storage, seen by all workers: checkpoints are in it."""
    storage_timeout_s: float
    """Longest time that a write to storage may take."""
    keep: int | None
    """How many checkpoints are kept, the newest ones. None: all, unless the context itself removes some."""

    def save_checkpoint(self, name: str, commit: Callable[[], None] | None, metrics: Mapping[str, float]) -> None:
        """Calls `commit`, which writes the checkpoint `name`. All workers call it; all but rank 0 pass None.

        Blocks and raises what `commit` raises; or calls it in another thread, in the order of the calls, one at a time.
        """
        if commit is not None:
            commit()

    def wait_for_checkpoints(self) -> None:
        """Blocks until all checkpoints that this worker saved are written."""

    def stop_requested(self) -> bool:
        """Whether the user asked this run to stop. May differ between workers for a moment."""
        return False

    def log(self, line: str) -> None:
        """One line for the user. In a worker group only rank 0's is shown."""

    def warn(self, line: str) -> None:
        """One line for the user about this worker, whichever it is."""

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows how far the run is."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every evaluation; `metrics` has the newest value of each. Blocks until it has been judged."""

    def report_stragglers(self, slow: Mapping[int, float]) -> None:
        """Rank -> how many times as slow as the rest this worker has been for a while."""

    def heartbeat(self) -> None:
        """Tells the watchdog that this worker makes progress. Called for every batch."""


@dataclass
class LocalContext(RunContext):
    """The context of a process on its own, without Ray: small nets, tests, profiling.

    Args:
        observer: is called after every evaluation, and may stop the run.
        on_heartbeat: called for every batch.
        on_line: takes one line for the user.
    """

    storage: RunStorage
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    keep: int | None = None
    observer: Observer = field(default_factory=Observer)
    on_heartbeat: Callable[[], object] = lambda: None
    on_line: Callable[[str], object] = lambda _: None
    storage_timeout_s: float = 300.0

    def stop_requested(self) -> bool:
        return self.observer.stop_requested()

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        self.observer.progressed(step)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.observer.evaluated(step, metrics)

    def heartbeat(self) -> None:
        self.on_heartbeat()

    def log(self, line: str) -> None:
        self.on_line(line)

    def warn(self, line: str) -> None:
        self.on_line(f"warning: {line}")
