"""What a checkpoint costs, and how often to write one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet_dist.planner.constants import SNAPSHOT_BYTES_S, WRITE_BYTES_S

SHORTEST_S = 60.0


@dataclass(frozen=True)
class CheckpointCost:
    num_bytes: int
    snapshot_s: float
    """The loop stands still."""
    write_s: float
    """In the background; until then the checkpoint before counts."""


def checkpoint_cost(num_bytes: int) -> CheckpointCost:
    return CheckpointCost(num_bytes, num_bytes / SNAPSHOT_BYTES_S, num_bytes / WRITE_BYTES_S)


def best_interval_s(cost: CheckpointCost, between_interruptions_s: float) -> float:
    """Young 1974: sqrt(2 x pause x mean time between interruptions); at least a minute, and two writes."""
    by_young = math.sqrt(2 * cost.snapshot_s * between_interruptions_s)
    return max(by_young, 2 * cost.write_s, SHORTEST_S)
