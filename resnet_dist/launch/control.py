"""One small actor beside the driver: the user's wish to stop goes to the workers, their progress comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    warnings: tuple[str, ...] = ()
    """Everything there was to warn of, in order."""
    evaluated_step: int = 0
    """Of the newest evaluation."""


class RunControl:
    """The actor's body; runs on the driver's node, so it lives and dies with the driver."""

    def __init__(self) -> None:
        self._stop = False
        self._status = Status()
        self._nodes: dict[int, str] = {}

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def began(self, world_size: int) -> None:
        """Rank 0 of a new worker group says so."""
        self._status = replace(self._status, attempt=self._status.attempt + 1, world_size=world_size)

    def progressed(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluated_step = step if any(key.startswith("val/") for key in metrics) else self._status.evaluated_step
        self._status = replace(
            self._status, step=step, metrics={**self._status.metrics, **metrics}, evaluated_step=evaluated_step
        )

    def joined(self, rank: int, node: str) -> None:
        """Every worker of a new group says where it runs."""
        self._nodes[rank] = node

    def slow(self, rank: int, factor: float) -> None:
        """Rank 0 says that a worker holds up the others."""
        warning = (
            f"rank {rank} on node {self._nodes.get(rank, 'unknown')} has been {factor:.1f} times as slow as the others "
            f"for a while; see rank/{rank}/step_s, data_wait_s and all_reduce_wait_s in MLflow"
        )
        self._status = replace(self._status, warnings=(*self._status.warnings, warning))

    def status(self) -> Status:
        return self._status


def start_control() -> Any:
    """Starts the actor on this node and returns its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here).remote()
