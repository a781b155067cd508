"""Collectives besides the gradient's: a sum, a broadcast of buffers, the vote on stopping and saving."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_over_workers(values: Tensor) -> Tensor:
    """Elementwise sum of a CPU tensor over all workers, in place.

    An element that is zero on all workers but one is exact whatever the number of workers: x + 0 = x.
    """
    if not _alone():
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Gives every worker rank 0's buffers: batch norm's running statistics, which only rank 0 updates."""
    if not _alone():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


class Requests(NamedTuple):
    """What at least one worker was asked to do."""

    stop: bool
    save: bool


class Vote:
    """All workers stop, or save, after the same step, although they see the request at different times."""

    def __init__(self) -> None:
        self._sent: tuple[Tensor, dist.Work] | None = None

    def cast(self, *, stop: bool, save: bool, wait: bool = False) -> Requests:
        """Sends this worker's flags. All workers call it together.

        Returns what was requested by the call before; with `wait`, or with one worker, what is requested now.
        """
        if _alone():
            return Requests(stop, save)
        # 8 bytes through the CPU's collective. The sum is read one step later: it has arrived by then, during the next
        # step's forward pass, so no worker waits for it.
        flags = torch.tensor([float(stop), float(save)])
        work = dist.all_reduce(flags, async_op=True)
        assert work is not None
        before, self._sent = self._sent, (flags, work)
        counted = self._sent if wait else before
        if counted is None:  # the first call
            return Requests(stop=False, save=False)
        counted[1].wait()
        return Requests(*(counted[0] > 0).tolist())
