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
    """The same on all workers."""

    metrics: dict[str, float]
    """Empty if every step of the window was skipped."""
    stop: bool
    """Whether any worker was asked to stop."""
    save: bool
    """Whether any worker was asked for a checkpoint."""
    diverged_step: int | None
    """The first step of the window whose mean loss is no number or above the limit."""


@dataclass
class Window:
    """One worker's part of the steps since the last point. `rows[k]` belongs to (step, micro-batch) `slots[k]`."""

    num_micro_batches: int
    micro_batch_size: int
    world_size: int
    max_loss: float = math.inf
    counts_replaced: bool = False
    """Whether the number of samples that stand for bad ones is reported."""
    slots: list[tuple[int, int]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """The numbers of the window's steps."""
    data_wait_s: float = 0.0
    num_replaced: int = 0
    """Of this worker's samples."""
    grad_norm: Tensor | None = None
    """Length of the gradient of the window's last step, if it was measured; equal on all workers."""
    _started: float = field(default_factory=time.perf_counter)

    def add(self, micro_batch: int, loss: Tensor, logits: Tensor, targets: Tensor, num_replaced: int = 0) -> None:
        """Notes one micro-batch of the current step: its mean loss, its number of wrong top-1 answers (not the class
        with the largest share of the target [N, C]), and how many samples stand for bad ones."""
        wrong = (logits.detach().argmax(dim=1) != targets.argmax(dim=1)).sum()
        self.slots.append((len(self.steps), micro_batch))
        self.rows.append(torch.stack([loss.detach().double(), wrong.double()]))
        self.num_replaced += num_replaced

    def end_step(self, step: int) -> None:
        """Step number `step`, counted from 0, is done."""
        self.steps.append(step)

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

    def close(self, lr: float, *, stop: bool, save: bool) -> WindowResult:
        """One collective: sums all workers' tables, and starts the next window. All workers call it together.

        Each (step, micro-batch) row is filled by exactly one worker, so the sums are exact and the metrics do not
        depend on the number of workers. The last two rows are for what workers wish, and for their waiting.
        """
        elapsed_s = time.perf_counter() - self._started
        table = torch.zeros((len(self.steps) * self.num_micro_batches + 2, 2), dtype=torch.float64)
        if self.rows:
            index = [step * self.num_micro_batches + micro for step, micro in self.slots]
            table[index] = torch.stack(self.rows).cpu()
        table[-2:] = torch.tensor([[stop, save], [self.data_wait_s / elapsed_s, self.num_replaced]])
        total = sum_over_workers(table)
        result = WindowResult(
            metrics=self._metrics(total[:-2], lr, elapsed_s, total[-1]) if self.steps else {},
            stop=bool(total[-2, 0] > 0),
            save=bool(total[-2, 1] > 0),
            diverged_step=self._first_diverged(total[:-2, 0]),
        )
        self.slots, self.rows, self.steps, self.data_wait_s, self.grad_norm = [], [], [], 0.0, None
        self.num_replaced = 0
        self._started = time.perf_counter()
        return result

    def _metrics(self, rows: Tensor, lr: float, elapsed_s: float, sums: Tensor) -> dict[str, float]:
        """`sums`: over all workers, of the share of time spent waiting, and of samples replaced."""
        num_images = len(rows) * self.micro_batch_size
        return {
            "train/loss": float(rows[:, 0].mean()),
            "train/top1_error": 100.0 * float(rows[:, 1].sum()) / num_images,
            "train/lr": lr,
            **({} if self.grad_norm is None else {"train/grad_norm": float(self.grad_norm)}),
            "speed/images_per_s": num_images / elapsed_s,
            "speed/data_wait_share": float(sums[0]) / self.world_size,
            **({"data/replaced_samples": float(sums[1])} if self.counts_replaced else {}),
        }

    def _first_diverged(self, losses: Tensor) -> int | None:
        means = losses.reshape(len(self.steps), self.num_micro_batches).mean(dim=1).tolist()
        return next(
            (s for s, m in zip(self.steps, means, strict=True) if not m <= self.max_loss or m == math.inf), None
        )

    def restart_clock(self) -> None:
        """Leaves out of the speed what was done between two windows: evaluation, checkpoints."""
        self._started = time.perf_counter()
