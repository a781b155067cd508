"""One small actor between a sweep's driver and its trials: verdicts and the wish to stop go to the trials."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resnet_dist.tune.events import Verdict


class SweepControl:
    """The actor's body; runs on the driver's node, so it lives and dies with the driver."""

    def __init__(self) -> None:
        self._stop = False
        self._verdicts: dict[str, Verdict] = {}

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def tell(self, trial: str, verdict: Verdict) -> None:
        """The driver's answer to what `trial` reported last."""
        self._verdicts[trial] = verdict

    def verdict(self, trial: str) -> Verdict:
        return self._verdicts[trial]


def start_sweep_control() -> Any:
    """Starts the actor on this node and returns its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(SweepControl).options(num_cpus=0, scheduling_strategy=here).remote()
