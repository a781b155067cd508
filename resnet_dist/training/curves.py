"""The training curves: losses and times between two points, slow workers, use of the device."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_dist.config.recipe import Recipe, train_size
from resnet_dist.models.summary import summarise
from resnet_dist.training.collectives import Stopwatch, sum_over_workers

SLOW_FACTOR = 1.5
SLOW_POINTS = 3
_MB = 1e6
_TERA = 1e12
MACS_PER_TRAINED_MAC = 3
"""A training step does each multiply-add of the forward pass three times: forward, gradient of the input, gradient of
the weights. Chowdhery et al. 2022 (PaLM), appendix B; the first layer's unneeded input gradient is counted too."""


class CurvePoint(NamedTuple):
    """One point of the training curves, from the steps since the previous one; the same on all workers."""

    metrics: dict[str, float]
    diverged_step: int | None
    """The first step whose mean loss is NaN, infinite or above the limit; the next step, if all losses are fine and the
    state is not finite; otherwise None."""
    ranks: list[RankTimes]


@dataclass
class MetricAccumulator:
    """One worker's part of the steps since the last point of the curves. Waits for the device only in `take`.

    Args:
        gradient_wait: the reduction's stopwatch, read at every point.
        max_loss: a larger mean loss of a step counts as diverged.
        counts_replaced: whether the number of samples that replace undecodable ones is a metric.
    """

    num_micro_batches: int
    micro_batch_size: int
    rank: int
    world_size: int
    gradient_wait: Stopwatch
    max_loss: float = math.inf
    counts_replaced: bool = False
    steps: list[int] = field(default_factory=list, init=False)
    """The steps done since the last point."""
    slots: list[tuple[int, int]] = field(default_factory=list, init=False)
    """`rows[k]` belongs to micro-batch `slots[k][1]` of step `steps[slots[k][0]]`."""
    rows: list[Tensor] = field(default_factory=list, init=False)
    num_replaced: int = field(default=0, init=False)
    data_wait_s: float = field(default=0.0, init=False)
    checkpoint_wait_s: float = field(default=0.0, init=False)
    grad_norm: Tensor | None = field(default=None, init=False)
    """Gradient norm of the last step, if it was measured; equal on all workers."""
    began_s: float = field(default_factory=time.perf_counter, init=False)

    def add(self, micro_batch: int, loss: Tensor, logits: Tensor, targets: Tensor, num_replaced: int = 0) -> None:
        """Adds one micro-batch of the current step.

        Args:
            loss: its mean loss, a scalar.
            logits: [N, C].
            targets: [N, C]; a prediction is right if it is the class with the largest share.
            num_replaced: how many of its samples replace undecodable ones.
        """
        wrong = (logits.detach().argmax(dim=1) != targets.argmax(dim=1)).sum()
        self.slots.append((len(self.steps), micro_batch))
        self.rows.append(torch.stack([loss.detach().double(), wrong.double()]))
        self.num_replaced += num_replaced

    def end_step(self, step: int, grad_norm: Tensor | None = None) -> None:
        """Step number `step`, counted from 0, is done."""
        self.steps.append(step)
        self.grad_norm = grad_norm

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
        self.began_s = time.perf_counter()

    def take(self, lr: float, *, next_step: int, state_is_finite: bool = True) -> CurvePoint:
        """The point of the curves for the steps so far; starts the next one. All workers call it together.

        One collective. Each (step, micro-batch) row is filled by exactly one worker and is zero on the others, so the
        sums are exact and the metrics do not depend on the number of workers. Each worker also has a row for its
        times; all share two counts.
        """
        losses = torch.zeros((len(self.steps) * self.num_micro_batches, 2), dtype=torch.float64)
        if self.rows:
            index = [step * self.num_micro_batches + micro_batch for step, micro_batch in self.slots]
            losses[index] = torch.stack(self.rows).cpu()
        elapsed_s = time.perf_counter() - self.began_s  # read after `.cpu()`: the device has done the last step
        times = torch.zeros((self.world_size, 4), dtype=torch.float64)
        times[self.rank] = torch.tensor(
            (elapsed_s, self.data_wait_s, self.gradient_wait.take_s(), self.checkpoint_wait_s)
        )
        counts = torch.tensor([not state_is_finite, self.num_replaced], dtype=torch.float64)
        total = sum_over_workers(torch.cat([losses.reshape(-1), times.reshape(-1), counts]))
        losses, times = total[: losses.numel()].reshape(-1, 2), total[losses.numel() : -2].reshape(-1, 4)
        num_broken, num_replaced = total[-2:].tolist()
        diverged_step = self._first_diverged(losses[:, 0])
        if diverged_step is None and num_broken:
            diverged_step = next_step
        point = CurvePoint(
            self._metrics(losses, lr, times, num_replaced),
            diverged_step,
            [RankTimes(*row[:3]) for row in (times / len(self.steps)).tolist()],
        )
        self.slots, self.rows, self.steps, self.grad_norm = [], [], [], None
        self.data_wait_s = self.checkpoint_wait_s = 0.0
        self.num_replaced = 0
        self.restart_clock()
        return point

    def _metrics(self, rows: Tensor, lr: float, times: Tensor, num_replaced: float) -> dict[str, float]:
        """`times` [workers, 4], s: all of it, and the parts spent waiting for data, gradients, checkpoints."""
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
        # `not <=` is true of NaN too
        return next(
            (s for s, m in zip(self.steps, means, strict=True) if not m <= self.max_loss or m == math.inf), None
        )


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

    def metrics(self, rank: int, images_per_step: int) -> dict[str, float]:
        """`images_per_s`: the speed of this worker if it never waited for other workers."""
        values = {**self._asdict(), **({"images_per_s": images_per_step / self.busy_s} if self.busy_s > 0 else {})}
        return {f"worker/{rank}/{name}": value for name, value in values.items()}


def slowness(times: Sequence[RankTimes], shares: Sequence[int]) -> list[float]:
    """For each worker: how long it is busy with one of its micro-batches, relative to the median of the others.

    Args:
        shares: micro-batches a step, by worker. They may differ by one; a worker with one more is not slow.

    A single worker is 1.0.
    """
    busy_s = [t.busy_s / share for t, share in zip(times, shares, strict=True)]
    if len(busy_s) == 1:
        return [1.0]
    others_s = [median(busy_s[:rank] + busy_s[rank + 1 :]) for rank in range(len(busy_s))]
    return [mine / others if others > 0 else 1.0 for mine, others in zip(busy_s, others_s, strict=True)]


class Stragglers:
    """Finds workers that stay slow. Each is reported once, and again only if it was fast in between.

    Args:
        shares: as in `slowness`.
        micro_batch_size: images in one micro-batch.
    """

    def __init__(self, shares: Sequence[int], micro_batch_size: int) -> None:
        self._shares = shares
        self._micro_batch_size = micro_batch_size
        self._last: deque[list[float]] = deque(maxlen=SLOW_POINTS)
        self._reported: set[int] = set()

    def metrics(self, times: Sequence[RankTimes]) -> dict[str, float]:
        """All workers' own curves."""
        return {
            key: value
            for rank, (mine, share) in enumerate(zip(times, self._shares, strict=False))
            for key, value in mine.metrics(rank, share * self._micro_batch_size).items()
        }

    def newly_slow(self, times: Sequence[RankTimes]) -> dict[int, float]:
        """The workers whose slowness has been above SLOW_FACTOR at the last SLOW_POINTS points, with the least value
        there."""
        self._last.append(slowness(times, self._shares))
        least = [min(values) for values in zip(*self._last, strict=True)] if len(self._last) == SLOW_POINTS else []
        slow = {rank: value for rank, value in enumerate(least) if value > SLOW_FACTOR}
        new = {rank: value for rank, value in slow.items() if rank not in self._reported}
        self._reported = set(slow)
        return new


# Use of the device: the model's own arithmetic against what the GPU can do at most.


@dataclass(frozen=True)
class Peak:
    words: tuple[str, ...]
    """Words that are all in the device's name."""
    flops: Mapping[str, float | None]
    """FLOP/s without structured sparsity, by `train.precision`; None where the hardware has no units for the format."""
    source: str


def _peak(words: str, fp32: float, tf32: float | None, fp16: float | None, bf16: float | None, source: str) -> Peak:
    """A row of the table from TFLOP/s; `fp32` without TF32."""
    tera = {"fp32": fp32, "tf32": tf32, "fp16": fp16, "bf16": bf16}
    return Peak(tuple(words.split()), {name: value and value * _TERA for name, value in tera.items()}, source)


# The more specific name first: "NVIDIA H100 PCIe" before "NVIDIA H100 80GB HBM3". Sheets that list figures with
# sparsity are halved. GeForce: with FP32 accumulation, which is half of the FP16 figure on the box.
PEAKS = (
    _peak("V100 PCIE", 14.0, None, 112, None, "NVIDIA V100 datasheet, 2020"),
    _peak("V100", 15.7, None, 125, None, "NVIDIA V100 datasheet, 2020 (SXM2)"),
    _peak("T4", 8.1, None, 65, None, "NVIDIA T4 datasheet, 2019"),
    _peak("A100", 19.5, 156, 312, 312, "NVIDIA A100 datasheet, 2021"),
    _peak("A30", 10.3, 82, 165, 165, "NVIDIA A30 datasheet, 2022"),
    _peak("A10", 31.2, 62.5, 125, 125, "NVIDIA A10 datasheet, 2021"),
    _peak("A40", 37.4, 74.8, 149.7, 149.7, "NVIDIA A40 datasheet, 2021"),
    _peak("L4", 30.3, 60, 121, 121, "NVIDIA L4 datasheet, 2023"),
    _peak("L40S", 91.6, 183, 362.05, 362.05, "NVIDIA L40S datasheet, 2023"),
    _peak("H100 PCIe", 51.0, 378, 756, 756, "NVIDIA H100 datasheet, 2022"),
    _peak("H100 NVL", 60.0, 417.5, 835.5, 835.5, "NVIDIA H100 datasheet, 2024"),
    _peak("H100", 67.0, 494.5, 989.5, 989.5, "NVIDIA H100 datasheet, 2024 (SXM)"),
    _peak("H200 NVL", 60.0, 417.5, 835.5, 835.5, "NVIDIA H200 datasheet, 2024"),
    _peak("H200", 67.0, 494.5, 989.5, 989.5, "NVIDIA H200 datasheet, 2024 (SXM)"),
    _peak("GB200", 80.0, 1250, 2500, 2500, "NVIDIA GB200 NVL72 datasheet, 2024"),
    _peak("B200", 75.0, 1125, 2250, 2250, "NVIDIA HGX B200 datasheet, 2024"),
    _peak("RTX 3090", 35.6, 35.6, 71, 71, "NVIDIA GA102 whitepaper, 2021"),
    _peak("RTX 4090", 82.6, 82.6, 165.2, 165.2, "NVIDIA Ada whitepaper, 2023"),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of one device for matrix products in `precision`; None if it is not in the table.

    `device_name`: as `torch.cuda.get_device_name` gives it, for example "NVIDIA A100-SXM4-40GB".
    """
    words = set(device_name.lower().replace("-", " ").split())
    for peak in PEAKS:
        if {word.lower() for word in peak.words} <= words:
            return peak.flops.get(precision)
    return None


def model_flops_utilisation(images_per_s: float, macs_per_image: int, flops: float) -> float:
    """MFU in [0, 1]: the share of `flops` FLOP/s that the model's own arithmetic takes, at this training speed.

    `macs_per_image`: multiply-adds of one forward pass; `flops`: the sum over all devices that share the images. What
    is recomputed to save memory does not count (Chowdhery et al. 2022, appendix B).
    """
    return images_per_s * 2 * MACS_PER_TRAINED_MAC * macs_per_image / flops


class DeviceUse:
    """Model FLOPs utilisation and peak memory of this worker's GPU; nothing on a CPU.

    Assumes that the other workers' GPUs are of the same kind: a group of several kinds has no single MFU.
    """

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

        Where images grow with the epochs, the cost of a smaller one is estimated by its number of pixels.

        `gpu/memory_peak_megabytes` is the peak of PyTorch's tensors, without the allocator's reserve.
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
