"""The numbers between two points of the training curves: collected without waiting for the device, summed once."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from resnet_dist.accelerators import model_flops_utilisation, peak_flops
from resnet_dist.config.recipe import Recipe, train_size
from resnet_dist.models.registry import summarise
from resnet_dist.training.collectives import Stopwatch, sum_over_workers

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
    """The first step of the window whose mean loss is NaN or above the limit; the first step behind the window if
    all are well and the weights are not."""
    ranks: list[RankTimes]
    """Empty if every step of the window was skipped."""


@dataclass
class Window:
    """One worker's part of the steps since the last point. `rows[k]` belongs to (step, micro-batch) `slots[k]`.

    `all_reduce_wait` is the reduction's, read at every point.
    """

    num_micro_batches: int
    micro_batch_size: int
    rank: int
    world_size: int
    all_reduce_wait: Stopwatch
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
    checkpoint_wait_s: float = 0.0
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

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what training waits for because of checkpoints; starts the clock anew."""
        began = time.perf_counter()
        yield
        self.checkpoint_wait_s += time.perf_counter() - began
        self.restart_clock()

    def close(self, lr: float, *, stop: bool, save: bool, next_step: int = 0, is_broken: bool = False) -> WindowResult:
        """`next_step`: the number of the step that comes next; `is_broken`: the state is no longer finite.

        One collective: sums all workers' tables, and starts the next window. All workers call it together.

        Each (step, micro-batch) row is filled by exactly one worker, so the sums are exact and the metrics do not
        depend on the number of workers. Each worker has a row for its times too, and all share the last four numbers:
        how many wish to stop, how many to save, whose weights are broken, and how many samples were replaced.
        """
        losses = torch.zeros((len(self.steps) * self.num_micro_batches, 2), dtype=torch.float64)
        if self.rows:
            index = [step * self.num_micro_batches + micro for step, micro in self.slots]
            losses[index] = torch.stack(self.rows).cpu()
        elapsed_s = time.perf_counter() - self._started  # after the device has done the last step
        waits = (self.data_wait_s, self.all_reduce_wait.take_s(), self.checkpoint_wait_s)
        times = torch.zeros((self.world_size, 4), dtype=torch.float64)
        times[self.rank] = torch.tensor((elapsed_s, *waits))
        counts = torch.tensor([stop, save, is_broken, self.num_replaced], dtype=torch.float64)
        total = sum_over_workers(torch.cat([losses.reshape(-1), times.reshape(-1), counts]))
        losses, times = total[: losses.numel()].reshape(-1, 2), total[losses.numel() : -4].reshape(-1, 4)
        stops, saves, broken, num_replaced = total[-4:].tolist()
        diverged_step = self._first_diverged(losses[:, 0])
        result = WindowResult(
            metrics=self._metrics(losses, lr, times, num_replaced) if self.steps else {},
            stop=stops > 0,
            save=saves > 0,
            diverged_step=next_step if diverged_step is None and broken else diverged_step,
            ranks=[RankTimes(*row[:3]) for row in (times / len(self.steps)).tolist()] if self.steps else [],
        )
        self.slots, self.rows, self.steps, self.grad_norm = [], [], [], None
        self.data_wait_s = self.checkpoint_wait_s = 0.0
        self.num_replaced = 0
        self._started = time.perf_counter()
        return result

    def _metrics(self, rows: Tensor, lr: float, times: Tensor, num_replaced: float) -> dict[str, float]:
        """`times` [workers, 4], s: the window, and in it the waits for data, for gradients, for checkpoints."""
        num_images = len(rows) * self.micro_batch_size
        elapsed_s, data_wait_s, _, checkpoint_wait_s = times.T
        return {
            "train/loss": float(rows[:, 0].mean()),
            "train/top1_error": 100.0 * float(rows[:, 1].sum()) / num_images,
            "train/lr": lr,
            **({} if self.grad_norm is None else {"train/grad_norm": float(self.grad_norm)}),
            "speed/images_per_s": num_images / float(elapsed_s.max()),
            "speed/data_wait_share": float((data_wait_s / elapsed_s).mean()),
            "speed/checkpoint_wait_share": float((checkpoint_wait_s / (elapsed_s + checkpoint_wait_s)).max()),
            **({"data/replaced_samples": num_replaced} if self.counts_replaced else {}),
        }

    def _first_diverged(self, losses: Tensor) -> int | None:
        means = losses.reshape(len(self.steps), self.num_micro_batches).mean(dim=1).tolist()
        return next(
            (s for s, m in zip(self.steps, means, strict=True) if not m <= self.max_loss or m == math.inf), None
        )

    def restart_clock(self) -> None:
        """Leaves out of the speed what was done between two windows: evaluation, checkpoints."""
        self._started = time.perf_counter()


# Which worker holds up the others: how long each is busy with a step, and the rule that calls one slow. Pure.


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


# How well the device is used: model FLOPs utilisation and peak memory, with every point of the curves; GPUs only.


_MB = 1e6


class DeviceUse:
    """This worker's device. The others are taken to be like it: a group with several kinds of GPU has no one MFU."""

    def __init__(self, recipe: Recipe, device: torch.device, world_size: int) -> None:
        self._device = device
        self._data, self._total_epochs = recipe.data, recipe.train.total_epochs
        self._macs_per_image = 0
        self._flops: float | None = None
        if device.type == "cuda":
            flops = peak_flops(torch.cuda.get_device_name(device), recipe.train.precision)
            self._flops = None if flops is None else flops * world_size
            options = recipe.model.build_options()
            self._macs_per_image = summarise(side=recipe.data.train.size, **options).macs if flops else 0

    def metrics(self, images_per_s: float, epoch: int) -> dict[str, float]:
        """Since the last call, at this speed of all workers together; empty on a CPU, no MFU on an unknown GPU.

        Where images grow with the epochs, a smaller one is taken to cost as its pixels.

        `gpu/memory_peak_megabytes` is what PyTorch's tensors took at most, without the allocator's reserve.
        """
        if self._device.type != "cuda":
            return {}
        values = {"gpu/memory_peak_megabytes": torch.cuda.max_memory_allocated(self._device) / _MB}
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._flops is not None:
            share = train_size(self._data, epoch, self._total_epochs) / self._data.train.size
            values["speed/mfu"] = model_flops_utilisation(
                images_per_s, round(self._macs_per_image * share**2), self._flops
            )
        return values
