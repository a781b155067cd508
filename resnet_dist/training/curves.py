"""The training curves, of the run and of each worker: loss, speed, and who is slow."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_dist.training.collectives import sum_over_workers
from resnet_dist.training.device import DeviceTimer

SLOW_FACTOR = 1.5
"""A worker is slow if it is busy for more than this many times the median of the others."""
SLOW_POINTS = 3
"""A worker is a straggler if it is slow at this many points in a row."""
MAX_OWN_CURVES = 16
"""So many workers have curves of their own."""


class CurvePoint(NamedTuple):
    """One point of the training curves, from the steps since the previous one; the same on all workers."""

    metrics: dict[str, float]
    diverged_step: int | None
    """The first step whose mean loss is NaN, infinite or above the limit; the next step, if all losses are fine and the
    state is not finite; otherwise None."""
    ranks: list[RankTimes]


class MetricAccumulator:
    """One worker's part of the steps since the last point of the curves. Waits for the device only in `take`.

    Args:
        gradient_wait: time spent waiting for other workers' gradients.
        max_loss: a larger mean loss of a step counts as diverged.
        counts_replaced: whether the number of samples that replace undecodable ones is a metric.
    """

    def __init__(
        self,
        num_micro_batches: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        gradient_wait: DeviceTimer,
        *,
        max_loss: float = math.inf,
        counts_replaced: bool = False,
    ) -> None:
        self._num_micro_batches, self._micro_batch_size = num_micro_batches, micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._gradient_wait = gradient_wait
        self._max_loss, self._counts_replaced = max_loss, counts_replaced
        self._start_point()

    def _start_point(self) -> None:
        self.steps: list[int] = []
        """The steps done since the last point."""
        self._slots: list[tuple[int, int]] = []
        """Row k of all `_rows` belongs to micro-batch `_slots[k][1]` of step `steps[_slots[k][0]]`."""
        self._rows: list[Tensor] = []
        """As given to `add`."""
        self._num_replaced = 0
        self._grad_norm: Tensor | None = None
        """Gradient norm of the last step, if it was measured; equal on all workers."""
        self.data_wait_s = self.checkpoint_wait_s = 0.0
        self.restart_clock()

    def add(self, micro_batches: range, rows: Tensor, num_replaced: int = 0) -> None:
        """Adds one launch of the current step.

        Args:
            rows: float64 [micro-batches, 2], on the device: the mean loss and the number of wrong predictions of each.
            num_replaced: how many of its samples replace undecodable ones.
        """
        self._slots += [(len(self.steps), micro_batch) for micro_batch in micro_batches]
        self._rows.append(rows)
        self._num_replaced += num_replaced

    def end_step(self, step: int, grad_norm: Tensor | None = None) -> None:
        """Step number `step`, counted from 0, is done."""
        self.steps.append(step)
        self._grad_norm = grad_norm

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began_s = time.perf_counter()
        yield
        self.data_wait_s += time.perf_counter() - began_s

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A context around waits for checkpoints, which are not part of the measured speed."""
        began_s = time.perf_counter()
        yield
        self.checkpoint_wait_s += time.perf_counter() - began_s
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time since the last point from the speed: it was spent on an evaluation or a checkpoint."""
        self._began_s = time.perf_counter()

    def take(self, lr: float, *, next_step: int, state_is_finite: bool = True) -> CurvePoint:
        """The point of the curves for the steps so far; starts the next one. All workers call it together."""
        # One row per (step, micro-batch). Exactly one worker fills it, and it is zero on the others, so the sums over
        # the workers are exact and the metrics do not depend on the number of workers.
        losses = torch.zeros((len(self.steps) * self._num_micro_batches, 2), dtype=torch.float64)
        if self._rows:
            index = [step * self._num_micro_batches + micro_batch for step, micro_batch in self._slots]
            losses[index] = torch.cat(self._rows).cpu()
        elapsed_s = time.perf_counter() - self._began_s  # read after `.cpu()`: the device has done the last step
        times = torch.zeros((self._world_size, 4), dtype=torch.float64)
        times[self._rank] = torch.tensor(
            (elapsed_s, self.data_wait_s, self._gradient_wait.take_s(), self.checkpoint_wait_s)
        )
        counts = torch.tensor([not state_is_finite, self._num_replaced], dtype=torch.float64)
        # All in one collective
        total = sum_over_workers(torch.cat([losses.reshape(-1), times.reshape(-1), counts]))
        losses, times = total[: losses.numel()].reshape(-1, 2), total[losses.numel() : -2].reshape(-1, 4)
        num_not_finite, num_replaced = total[-2:].tolist()
        diverged_step = self._first_diverged(losses[:, 0])
        if diverged_step is None and num_not_finite:
            diverged_step = next_step
        point = CurvePoint(
            self._metrics(losses, lr, times, num_replaced),
            diverged_step,
            [RankTimes(*row[:3]) for row in (times / len(self.steps)).tolist()],
        )
        self._start_point()
        return point

    def _metrics(self, rows: Tensor, lr: float, times: Tensor, num_replaced: float) -> dict[str, float]:
        """`times` [workers, 4], s: all of it, and the parts spent waiting for data, gradients, checkpoints."""
        num_images = len(rows) * self._micro_batch_size
        elapsed_s, data_wait_s, _, checkpoint_wait_s = times.T
        return {
            "train/loss": float(rows[:, 0].mean()),
            "train/top1_error": 100.0 * float(rows[:, 1].sum()) / num_images,
            "train/lr": lr,
            **({} if self._grad_norm is None else {"train/grad_norm": float(self._grad_norm)}),
            "speed/images_per_s": num_images / float(elapsed_s.max()),
            "speed/data_wait_share": float((data_wait_s / elapsed_s).mean()),
            "speed/checkpoint_wait_share": float((checkpoint_wait_s / (elapsed_s + checkpoint_wait_s)).max()),
            **({"data/replaced_samples": num_replaced} if self._counts_replaced else {}),
        }

    def _first_diverged(self, losses: Tensor) -> int | None:
        means = losses.reshape(len(self.steps), self._num_micro_batches).mean(dim=1).tolist()
        for step, mean in zip(self.steps, means, strict=True):
            if not mean <= self._max_loss or mean == math.inf:  # `not <=` is true of NaN too
                return step
        return None


# Stragglers. A step ends for all workers together, so its length does not show who was slow. What shows it is how long
# each worker was busy: the step without its wait for other workers' gradients.


class RankTimes(NamedTuple):
    """One worker's means over the steps of a point, in seconds a step."""

    step_s: float
    data_wait_s: float
    all_reduce_wait_s: float
    """Waiting for the other workers' gradients and for their transfer."""

    @property
    def busy_s(self) -> float:
        return self.step_s - self.all_reduce_wait_s

    def metrics(self, images_per_step: int) -> dict[str, float]:
        """`images_per_s`: the speed of this worker if it never waited for other workers."""
        return {**self._asdict(), **({"images_per_s": images_per_step / self.busy_s} if self.busy_s > 0 else {})}


def slowness(times: Sequence[RankTimes], shares: Sequence[int]) -> list[float]:
    """For each worker: how long it is busy with one of its micro-batches, relative to the median of the others. Sorts
    once, for there may be thousands.

    Args:
        shares: micro-batches a step, by worker. They may differ by one; a worker with one more is not slow.

    A single worker is 1.0.
    """
    busy_s = [t.busy_s / share for t, share in zip(times, shares, strict=True)]
    if len(busy_s) == 1:
        return [1.0]
    ascending_s = sorted(busy_s)
    found = []
    for mine_s in busy_s:
        own = bisect_left(ascending_s, mine_s)  # all but this one are the others, and the median is in their middle
        low_s, high_s = (ascending_s[k + (k >= own)] for k in (len(busy_s) // 2 - 1, (len(busy_s) - 1) // 2))
        others_s = (low_s + high_s) / 2
        found.append(mine_s / others_s if others_s > 0 else 1.0)
    return found


class Stragglers:
    """Finds workers that stay slow. Each is reported once, and again only if it was fast in between.

    Each worker has its own curves, as long as there are few. Of more than MAX_OWN_CURVES workers, the curves are those
    of the least, the median and the greatest value, and of the workers that have been reported (the first ones).

    Args:
        shares: as in `slowness`.
        micro_batch_size: images in one micro-batch.
    """

    def __init__(self, shares: Sequence[int], micro_batch_size: int) -> None:
        self._shares = shares
        self._micro_batch_size = micro_batch_size
        self._last: deque[list[float]] = deque(maxlen=SLOW_POINTS)
        self._reported: set[int] = set()
        self._own_curves = list(range(len(shares))) if len(shares) <= MAX_OWN_CURVES else []
        """The ranks that have curves of their own."""

    def metrics(self, times: Sequence[RankTimes]) -> dict[str, float]:
        """The workers' curves; call it after `newly_slow` of the same point."""
        by_rank = [
            mine.metrics(share * self._micro_batch_size) for mine, share in zip(times, self._shares, strict=True)
        ]
        curves = {f"worker/{rank}/{name}": v for rank in self._own_curves for name, v in by_rank[rank].items()}
        if len(by_rank) <= MAX_OWN_CURVES:
            return curves
        for name in sorted(set().union(*by_rank)):
            values = [worker[name] for worker in by_rank if name in worker]
            for quantile, of in (("min", min), ("median", median), ("max", max)):
                curves[f"workers/{name}/{quantile}"] = of(values)
        slowest = max(range(len(times)), key=self._last[-1].__getitem__)
        return curves | {"workers/slowest/rank": slowest, "workers/slowest/slowness": self._last[-1][slowest]}

    def newly_slow(self, times: Sequence[RankTimes]) -> dict[int, float]:
        """The workers whose slowness has been above SLOW_FACTOR at the last SLOW_POINTS points, with the least value
        there."""
        self._last.append(slowness(times, self._shares))
        least = [min(values) for values in zip(*self._last, strict=True)] if len(self._last) == SLOW_POINTS else []
        slow = {rank: value for rank, value in enumerate(least) if value > SLOW_FACTOR}
        new = {rank: value for rank, value in slow.items() if rank not in self._reported}
        self._reported = set(slow)
        slowest_first = sorted(new.keys() - self._own_curves, key=lambda rank: -new[rank])
        self._own_curves += slowest_first[: MAX_OWN_CURVES - len(self._own_curves)]
        return new
