"""Exact evaluation: every sample once, with the same bits for any number of workers; averages of batch norm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist.data.batch import Batch
from resnet_dist.data.order import eval_batches
from resnet_dist.errors import Fault
from resnet_dist.models.batch_norm import BatchNormStatistics, moving_norms
from resnet_dist.training.collectives import sum_over_workers
from resnet_dist.training.model import Precision

NUM_BINS = 15
"""Confidence bins of the calibration."""
_COUNTS = 6
"""Columns of a batch besides its calibration."""
_BATCHES_PER_WAIT = 16
"""The host waits for the device once in so many batches: more would fill the device's memory with images."""
_MAX_TABLE_NUMBERS = 16 << 20
"""Float64 numbers of batch norm's statistics that the workers sum at a time: 128 MB."""


class Labelled(Protocol):
    """A batch to evaluate: `data.batch.Batch`, or the views of a test protocol."""

    @property
    def images(self) -> Any: ...

    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Calibration:
    """Samples by confidence, the largest class probability: bin m of M holds confidences in (m/M, (m+1)/M]."""

    num_samples: tuple[int, ...]
    """Number of samples in each bin."""
    confidence_sums: tuple[float, ...]
    num_right: tuple[int, ...]

    @property
    def ece(self) -> float:
        """Expected calibration error (Guo et al. 2017, section 2), percent: the mean over samples of
        |accuracy - mean confidence| of their bin."""
        gaps = (abs(right - confidence) for right, confidence in zip(self.num_right, self.confidence_sums, strict=True))
        return 100.0 * sum(gaps) / sum(self.num_samples)


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: counts of samples, and the sum of their cross-entropies in nats."""

    num_samples: int
    num_top1: int
    num_top5: int
    loss_sum: float
    by_class: NDArray[np.int64]
    """[num_classes, 2]: samples of each class whose prediction is wrong, and right."""
    num_not_finite: int = 0
    """Samples with a NaN or infinite logit. None of them counts as right."""
    confusion: NDArray[np.int64] | None = None
    """[num_classes, num_classes]: samples by true and predicted class, without those that are not finite. None if
    it was not requested."""
    calibration: Calibration | None = None
    """Confidence against accuracy; None if it was not requested."""
    first_not_finite: int | None = None
    """The first sample with a NaN or infinite logit."""

    @property
    def is_finite(self) -> bool:
        """Whether all logits and the loss are finite."""
        return self.num_not_finite == 0 and math.isfinite(self.loss_sum)

    @property
    def top1(self) -> float:
        """Top-1 accuracy, percent."""
        return 100.0 * self.num_top1 / self.num_samples

    @property
    def top1_error(self) -> float:
        """Top-1 error, percent."""
        return 100.0 - self.top1

    @property
    def balanced_top1(self) -> float:
        """Balanced accuracy, percent: the mean of the accuracies within the classes (macro-averaged recall), without
        classes that have no samples. Equal to `top1` if all classes have equally many."""
        shares = [right / (wrong + right) for wrong, right in self.by_class.tolist() if wrong + right]
        return 100.0 * math.fsum(shares) / len(shares)

    def metrics(self) -> dict[str, float]:
        """Accuracies and errors in percent, cross-entropy in nats per sample."""
        top5 = 100.0 * self.num_top5 / self.num_samples
        return {
            "val/loss": self.loss_sum / self.num_samples,
            "val/top1": self.top1,
            "val/top5": top5,
            "val/balanced_top1": self.balanced_top1,
            "val/top1_error": self.top1_error,
            "val/top5_error": 100.0 - top5,
        }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Callable[[NDArray[np.int64]], Iterable[Labelled]],
    *,
    num_samples: int,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    precision: Precision,
    num_classes: int,
    confusion: bool = False,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Evaluates `model` on samples 0 .. num_samples - 1. All workers call it and get the same result.

    Args:
        batches: the samples with given ids, in batches of `batch_size`.
        confusion: whether to get the confusion matrix and the calibration too.
        keep: is called with the logits and the labels of each of this worker's batches, in order.

    Raises:
        Fault: the number of samples seen is not `num_samples`.
    """
    # One row per batch [k * batch_size, (k + 1) * batch_size), filled by exactly one worker and zero on the others. The
    # sum over the workers is exact, and the sum over the rows is in batch order: the same bits whoever filled them.
    mine = eval_batches(num_samples, batch_size, rank, world_size)
    columns = _COUNTS + (3 * NUM_BINS if confusion else 0)
    table = torch.zeros((-(-num_samples // batch_size), columns), dtype=torch.float64)
    rows: list[Tensor] = []
    outcomes: list[Tensor] = []
    judged: list[Tensor] = []
    ids = np.arange(mine.start * batch_size, min(mine.stop * batch_size, num_samples), dtype=np.int64)
    with _in_eval_mode(model):
        for _, batch in zip(mine, batches(ids), strict=True):
            with precision.autocast(device):
                logits = model(batch.images)
            counts, is_right = _row(logits, batch.labels)
            rows.append(counts)
            outcomes.append(2 * batch.labels + is_right)
            if confusion:
                judged.append(judge(logits, batch.labels))
            if keep is not None:
                keep(logits, batch.labels)
            if device.type == "cuda" and len(rows) % _BATCHES_PER_WAIT == 0:
                torch.cuda.synchronize(device)
    # To the host once: until here all results stay on the device.
    if rows:
        table[mine.start : mine.stop, :_COUNTS] = torch.stack(rows).cpu()
    judged = [samples.cpu() for samples in judged]
    for row, samples in zip(mine if judged else (), judged, strict=True):
        table[row, _COUNTS:] = calibration_row(samples)
    by_batch = sum_over_workers(table)
    total = by_batch.sum(dim=0)
    if int(total[0]) != num_samples:
        raise Fault(f"evaluation saw {int(total[0])} samples of {num_samples}: the loader lost some")
    seen = torch.cat([torch.zeros(0, dtype=torch.int64), *(batch.cpu() for batch in outcomes)])
    by_class = sum_over_workers(torch.bincount(seen, minlength=2 * num_classes)).reshape(num_classes, 2)
    first = next((row * batch_size + int(by_batch[row, 5]) for row in by_batch[:, 4].nonzero()[:, 0].tolist()), None)
    return Evaluation(
        num_samples,
        num_top1=int(total[1]),
        num_top5=int(total[2]),
        loss_sum=float(total[3]),
        by_class=by_class.numpy(),
        num_not_finite=int(total[4]),
        first_not_finite=first,
        confusion=_confusion(judged, num_classes) if confusion else None,
        calibration=calibration_of(total[_COUNTS:]) if confusion else None,
    )


def _confusion(judged: list[Tensor], num_classes: int) -> NDArray[np.int64]:
    true, predicted, _, _, finite = torch.cat([torch.zeros((0, 5), dtype=torch.float64), *judged]).unbind(dim=1)
    pairs = (true * num_classes + predicted).long()[finite > 0]
    counts = sum_over_workers(torch.bincount(pairs, minlength=num_classes**2))
    matrix: NDArray[np.int64] = counts.reshape(num_classes, num_classes).numpy()
    return matrix


def sparse_json(confusion: NDArray[np.int64]) -> str:
    """{"num_classes": C, "counts": [[true class, predicted class, samples], ...]}, only where there are samples."""
    true, predicted = np.nonzero(confusion)
    counts = np.stack([true, predicted, confusion[true, predicted]], axis=1).tolist()
    return json.dumps({"num_classes": len(confusion), "counts": counts})


def _row(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, top-1 correct, top-5 correct, loss sum, samples not finite, position of the first of these) of one
    batch, float64 [6]; and which samples are top-1 correct, bool [N]. `logits` [N, C], `labels` [N].
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()  # under autocast they have 8 or 11 bits
    finite = logits.isfinite().all(dim=1)  # topk ranks NaN first: such a prediction would be right by chance
    ranked = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]) & finite[:, None]
    loss = cross_entropy(logits, labels, reduction="none").double().sum()
    counts = torch.stack([torch.ones_like(labels).sum(), ranked[:, 0].sum(), ranked.any(dim=1).sum()])
    broken = torch.stack([(~finite).sum(), (~finite).int().argmax()])
    return torch.cat([counts.double(), loss[None], broken.double()]), ranked[:, 0]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with _kernels_chosen_by_shape():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _kernels_chosen_by_shape() -> Iterator[None]:
    """cuDNN's: chosen by their times, they and the bits would depend on the worker."""
    was_timing = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = was_timing


def judge(logits: Tensor, labels: Tensor) -> Tensor:
    """(true class, predicted class, confidence, whether right, whether finite) of a batch's samples, float64 [N, 5].
    `logits` [N, C]. A sample with a NaN or infinite logit is wrong, with confidence 0."""
    finite = logits.isfinite().all(dim=1)
    confidence, predicted = logits.double().where(finite[:, None], 0.0).softmax(dim=1).max(dim=1)
    right = (predicted == labels) & finite
    columns = [labels, logits.argmax(dim=1), confidence.where(finite, 0.0), right, finite]
    return torch.stack([column.double() for column in columns], dim=1)


def calibration_row(judged: Tensor) -> Tensor:
    """From what `judge` gives of one batch, on the host, because on CUDA the sums would have no fixed order: float64
    [3 * NUM_BINS], (samples, sum of confidences, right) of every bin."""
    confidence, right = judged[:, 2], judged[:, 3]
    bins = (torch.ceil(confidence * NUM_BINS) - 1).clamp(0, NUM_BINS - 1).long()
    columns = torch.stack([torch.ones_like(confidence), confidence, right], dim=1)
    return torch.zeros((NUM_BINS, 3), dtype=torch.float64).index_add_(0, bins, columns).reshape(-1)


def calibration_of(total: Tensor) -> Calibration:
    """The calibration from the sum of all batches' rows."""
    rows = total.reshape(NUM_BINS, 3).tolist()
    return Calibration(
        tuple(int(n) for n, _, _ in rows), tuple(c for _, c, _ in rows), tuple(int(r) for _, _, r in rows)
    )


@torch.no_grad()
def average_statistics(
    model: nn.Module,
    steps: Iterable[Sequence[Batch]],
    *,
    num_micro_batches: int,
    device: torch.device,
    precision: Precision,
) -> None:
    """Replaces batch norm's running statistics by plain averages over the micro-batches of `steps`, as He et al. did
    for the models that they released. All workers call it together.
    """
    if not (norms := moving_norms(model)):
        return
    momenta = [norm.momentum for norm in norms]
    statistics = [_buffer(norm, name) for norm in norms for name in ("running_mean", "running_var")]
    BatchNormStatistics(model)  # these passes do not count
    model.eval()  # dropout and drop-path are off, as they are when the statistics are used
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the running statistics are then those of the last micro-batch
    total, num_rows = torch.zeros(sum(s.numel() for s in statistics), dtype=torch.float64), 0
    for batches in steps:
        mine = torch.zeros((len(batches), len(total)), dtype=torch.float64)
        for row, batch in zip(mine, batches, strict=True):
            with precision.autocast(device), _kernels_chosen_by_shape():
                model(batch.images)
            row.copy_(torch.cat([s.double() for s in statistics]))
        numbers = [number for batch in batches for number in batch.micro_batches]  # one of each batch
        total += _sum_in_order(mine, numbers, num_micro_batches)
        num_rows += num_micro_batches
    averages = (total / num_rows).split([s.numel() for s in statistics])
    for statistic, average in zip(statistics, averages, strict=True):
        statistic.copy_(average)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _sum_in_order(mine: Tensor, numbers: Sequence[int], num_rows: int) -> Tensor:
    """The sum [columns] of all workers' rows in the order of their numbers: the same bits whoever has which.

    Args:
        mine: this worker's rows, float64 [rows, columns], on the CPU.
        numbers: theirs, of 0 .. num_rows - 1.
    """
    # One row per number, summed over the workers and then in order, as in `evaluate`; some columns at a time, since
    # those of a ResNet-152 would be 1.2 GB for 1,024 micro-batches.
    sums = []
    for block in mine.split(max(1, _MAX_TABLE_NUMBERS // num_rows), dim=1):
        table = torch.zeros((num_rows, block.shape[1]), dtype=torch.float64)
        table[numbers] = block
        sums.append(sum_over_workers(table).sum(dim=0))
    return torch.cat(sums)


def _buffer(norm: _BatchNorm, name: str) -> Tensor:
    buffer = getattr(norm, name)
    assert isinstance(buffer, Tensor)
    return buffer
