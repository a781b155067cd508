"""The numbers between two points of the training curves: collected without waiting for the device, summed once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from resnet_dist.training.collectives import sum_over_workers

T = TypeVar("T")


@dataclass(frozen=True)
class WindowResult:
    metrics: dict[str, float]
    stop: bool
    """Whether any worker was asked to stop. The same on all workers."""
    finite: bool
    """Whether every loss of the window is a finite number. The same on all workers."""


@dataclass
class Window:
    """One worker's part of the steps since the last point. `rows[k]` belongs to (step, micro-batch) `slots[k]`."""

    num_micro_batches: int
    micro_batch_size: int
    world_size: int
    slots: list[tuple[int, int]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    num_steps: int = 0
    data_wait_s: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def add(self, micro_batch: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Notes one micro-batch of the current step: its mean loss and its number of wrong top-1 answers."""
        wrong = (logits.detach().argmax(dim=1) != labels).sum()
        self.slots.append((self.num_steps, micro_batch))
        self.rows.append(torch.stack([loss.detach().double(), wrong.double()]))

    def end_step(self) -> None:
        self.num_steps += 1

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, with the time spent waiting for each added to `data_wait_s`."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.data_wait_s += time.perf_counter() - began
            yield batch

    def close(self, lr: float, stop_requested: bool) -> WindowResult:
        """One collective: sums all workers' tables, and starts the next window. All workers call it together.

        Each (step, micro-batch) row is filled by exactly one worker, so the sums are exact and the metrics do not
        depend on the number of workers.
        """
        table = torch.zeros((self.num_steps * self.num_micro_batches + 1, 2), dtype=torch.float64)
        index = [step * self.num_micro_batches + micro for step, micro in self.slots]
        table[index] = torch.stack(self.rows).cpu()
        elapsed_s = time.perf_counter() - self._started
        table[-1] = torch.tensor([float(stop_requested), self.data_wait_s / elapsed_s])
        total = sum_over_workers(table)
        mean_loss, num_wrong = float(total[:-1, 0].mean()), float(total[:-1, 1].sum())
        num_images = self.num_steps * self.num_micro_batches * self.micro_batch_size
        self.slots, self.rows, self.num_steps, self.data_wait_s = [], [], 0, 0.0
        self._started = time.perf_counter()
        return WindowResult(
            metrics={
                "train/loss": mean_loss,
                "train/top1_error": 100.0 * num_wrong / num_images,
                "train/lr": lr,
                "speed/images_per_s": num_images / elapsed_s,
                "speed/data_wait_share": float(total[-1, 1]) / self.world_size,
            },
            stop=bool(total[-1, 0] > 0),
            finite=math.isfinite(mean_loss),
        )

    def restart_clock(self) -> None:
        """Leaves out of the speed what was done between two windows: evaluation, checkpoints."""
        self._started = time.perf_counter()
