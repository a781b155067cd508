"""Which worker holds up the others: how long each is busy with a step, and the rule that calls one slow. Pure.

A step ends for all workers together, so its length tells nothing of who was slow. What tells is how long each was busy:
the step without its wait for the others' gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

SLOW_FACTOR = 1.5
SLOW_WINDOWS = 3


class RankTimes(NamedTuple):
    """One worker's means over the steps of a window, in seconds a step."""

    step_s: float
    data_wait_s: float
    all_reduce_wait_s: float
    """Waiting for the other workers' gradients, and their way here."""

    @property
    def busy_s(self) -> float:
        return self.step_s - self.all_reduce_wait_s

    def metrics(self, rank: int, images_per_step: int) -> dict[str, float]:
        """`images_per_s`: what this worker would do if it never waited for the others."""
        values = {**self._asdict(), **({"images_per_s": images_per_step / self.busy_s} if self.busy_s > 0 else {})}
        return {f"worker/{rank}/{name}": value for name, value in values.items()}


def slowness(times: Sequence[RankTimes], shares: Sequence[int]) -> list[float]:
    """How many times as long as the median of the others each worker is busy with one of its micro-batches.

    `shares`: micro-batches of a step by worker; they may differ by one, and whoever has one more is not slow. A single
    worker is 1.0.
    """
    busy_s = [t.busy_s / share for t, share in zip(times, shares, strict=True)]
    if len(busy_s) == 1:
        return [1.0]
    others_s = [median(busy_s[:rank] + busy_s[rank + 1 :]) for rank in range(len(busy_s))]
    return [mine / others if others > 0 else 1.0 for mine, others in zip(busy_s, others_s, strict=True)]


def persistently_slow(windows: Sequence[Sequence[float]]) -> dict[int, float]:
    """The workers whose slowness was above SLOW_FACTOR in each of SLOW_WINDOWS windows, and its least value there.

    `windows`: what `slowness` gave, oldest first; only the last ones count.
    """
    last = windows[-SLOW_WINDOWS:]
    if len(last) < SLOW_WINDOWS:
        return {}
    least = [min(values) for values in zip(*last, strict=True)]
    return {rank: value for rank, value in enumerate(least) if value > SLOW_FACTOR}


class Health:
    """Watches the workers of one group; each is told of once, and again when it was fast in between."""

    def __init__(self, shares: Sequence[int], micro_batch_size: int) -> None:
        """`shares`: as in `slowness`; `micro_batch_size`: images in one micro-batch."""
        self._shares = shares
        self._micro_batch_size = micro_batch_size
        self._windows: deque[list[float]] = deque(maxlen=SLOW_WINDOWS)
        self._told: set[int] = set()

    def metrics(self, times: Sequence[RankTimes]) -> dict[str, float]:
        """The points of all workers' own curves."""
        return {
            key: value
            for rank, (mine, share) in enumerate(zip(times, self._shares, strict=False))
            for key, value in mine.metrics(rank, share * self._micro_batch_size).items()
        }

    def newly_slow(self, times: Sequence[RankTimes]) -> dict[int, float]:
        """Rank and slowness of every worker that has become persistently slow with this window."""
        self._windows.append(slowness(times, self._shares))
        slow = persistently_slow(list(self._windows))
        new = {rank: value for rank, value in slow.items() if rank not in self._told}
        self._told = set(slow)
        return new
