"""The few things workers say to each other besides gradients. With one worker, all of them do nothing."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn


def sum_over_workers(values: Tensor) -> Tensor:
    """Elementwise sum of a CPU tensor over all workers, in place.

    Rows that are zero on all workers but one come out exact whatever the worker count: x + 0 = x.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Gives every worker rank 0's buffers (batch-norm running statistics, which only rank 0 updates)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
