"""The few things workers say to each other besides gradients. With one worker, all of them do nothing."""

from __future__ import annotations

import time

import torch
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


# What one worker learns at its own moment - a wish to stop or to save - becomes known to all after the same step.


class Agreement:
    """A vote after every step whose result is read after the next one, when it has long arrived: nobody waits for it.

    4 bytes a step through the CPU's collective, beside the next step's forward pass.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._counts = False
        """Whether the pending vote is a new one: votes repeat until the wish is fulfilled."""

    def reached(self, wish: bool) -> bool:
        """Whether any worker wished at the call before; with one worker, whether it wishes now.

        All workers call it together. After a True, the vote of that call does not count.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return wish
        before, counts = self._pending, self._counts
        votes = torch.tensor([float(wish)])
        work = dist.all_reduce(votes, async_op=True)
        assert work is not None
        self._pending, self._counts = (votes, work), True
        if before is None:
            return False
        before[1].wait()
        agreed = counts and float(before[0]) > 0
        self._counts = not agreed
        return agreed


# Time spent in one kind of work, on the clock of the device that does it.


class Stopwatch:
    """`begin` and `end` around every span; nothing waits for the device before `take_s`.

    On a GPU the spans are those of its current stream, where work that was asked for is done later than the host's
    call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began_s: float | None = None
        self._total_s = 0.0
        self._begun: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        if self._on_gpu:
            self._begun = _event()
        else:
            self._began_s = time.perf_counter()

    def end(self) -> None:
        """Does nothing if no span has begun."""
        if self._begun is not None:
            self._spans.append((self._begun, _event()))
            self._begun = None
        elif self._began_s is not None:
            self._total_s += time.perf_counter() - self._began_s
            self._began_s = None

    def take_s(self) -> float:
        """Seconds in all spans since the last call."""
        for begun, ended in self._spans:
            ended.synchronize()
            self._total_s += begun.elapsed_time(ended) / 1000
        total_s = self._total_s
        self._spans, self._total_s = [], 0.0
        return total_s


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
