"""One small actor between a sweep's driver and its trials: verdicts and the wish to stop go to the trials."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resnet_dist.tune.events import Verdict


class SweepControl:
    """The actor's body; runs on the driver's node, so it lives and dies with the driver. Killed, it comes back with
    nothing in mind: the driver asks to stop again and again, a trial without its verdict reports again.
    """

    def __init__(self) -> None:
        self._stop = False
        self._verdicts: dict[tuple[str, int], Verdict] = {}

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def tell(self, trial: str, step: int, verdict: Verdict) -> None:
        """The driver's answer to what `trial` reported after `step`."""
        self._verdicts[trial, step] = verdict

    def verdict(self, trial: str, step: int) -> Verdict | None:
        """None: not told, or forgotten."""
        return self._verdicts.get((trial, step))


def start_sweep_control() -> Any:
    """Starts the actor on this node and returns its handle; what is asked while it is away is asked again by Ray."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    again = {"max_restarts": -1, "max_task_retries": -1}
    return ray.remote(SweepControl).options(num_cpus=0, scheduling_strategy=here, **again).remote()
