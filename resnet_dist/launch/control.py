"""One small actor beside the driver: the user's wish to stop goes to the workers, their progress comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Status:
    """Where the run stands, as rank 0 last said."""

    attempt: int = 0
    """How many times a worker group has begun; more than one means a restart."""
    world_size: int = 0
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


class RunControl:
    """The actor's body; runs on the driver's node, so it lives and dies with the driver."""

    def __init__(self) -> None:
        self._stop = False
        self._status = Status()

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def began(self, world_size: int) -> None:
        """Rank 0 of a new worker group says so."""
        self._status = Status(self._status.attempt + 1, world_size, self._status.step, self._status.metrics)

    def progressed(self, step: int, metrics: Mapping[str, float]) -> None:
        self._status = Status(self._status.attempt, self._status.world_size, step, {**self._status.metrics, **metrics})

    def status(self) -> Status:
        return self._status


def start_control() -> Any:
    """Starts the actor on this node and returns its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here).remote()
