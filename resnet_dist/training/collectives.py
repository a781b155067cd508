"""What workers exchange besides gradients: sums, buffers, requests to stop or to save; and the time that it takes."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_over_workers(values: Tensor) -> Tensor:
    """Elementwise sum of a CPU tensor over all workers, in place.

    An element that is zero on all workers but one is exact whatever the number of workers: x + 0 = x.
    """
    if _alone():
        return values
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
    """All workers stop, or save, after the same step, although they see the request at different times.

    After every step the workers sum a pair of flags and read the sum one step later. By then it has arrived, so no
    worker waits. It costs 8 bytes a step through the CPU's collective, during the next step's forward pass.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, dist.Work] | None = None

    def cast(self, *, stop: bool, save: bool, wait: bool = False) -> Requests:
        """Sends this worker's flags. All workers call it together.

        Returns what was requested by the call before; with `wait`, or with one worker, what is requested now.
        """
        if _alone():
            return Requests(stop, save)
        flags = torch.tensor([float(stop), float(save)])
        work = dist.all_reduce(flags, async_op=True)
        assert work is not None
        before, self._sent = self._sent, (flags, work)
        counted = self._sent if wait else before
        if counted is None:
            return Requests(stop=False, save=False)
        counted[1].wait()
        return Requests(*(counted[0] > 0).tolist())


class Stopwatch:
    """Time spent in one kind of work, on the clock of the device that does it.

    `begin` and `end` go around every span; nothing waits for the device before `take_s`. On a GPU the spans are those
    of its current stream, where work is done later than the host's call returns.
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
