"""The exact evaluation and its confusion matrix, on one worker: numbers that follow from the definition."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnet_dist.data.batch import Batch
from resnet_dist.errors import Fault
from resnet_dist.training.evaluate import evaluate, sparse_json
from resnet_dist.training.model import Precision

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """Logits by the value of the first pixel: a fixed table, so that every count is known."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].long()]


def batches(ids: NDArray[np.int64], size: int = 3) -> Iterator[Batch]:
    for start in range(0, len(ids), size):
        part = torch.from_numpy(ids[start : start + size])
        yield Batch(part.to(torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3), part % 6, part.numpy())


def test_counts_and_loss_are_those_of_the_definition() -> None:
    table = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(10) % 6
    model = Lookup(table).train()
    result = evaluate(
        model, batches, num_samples=10, batch_size=3, rank=0, world_size=1, device=CPU, precision=Precision("fp64")
    )
    ranks = (table > table.gather(1, labels[:, None])).sum(dim=1)
    assert (result.num_samples, result.num_top1, result.num_top5) == (
        10,
        int((ranks < 1).sum()),
        int((ranks < 5).sum()),
    )
    expected = float(nn.functional.cross_entropy(table, labels))
    assert result.metrics()["val/loss"] == pytest.approx(expected, rel=1e-12)
    assert result.metrics()["val/top1_error"] == 100 - result.top1
    assert model.training


def test_lost_samples_are_a_fault() -> None:
    def short(ids: NDArray[np.int64]) -> Iterator[Batch]:
        return (Batch(b.images[:1], b.labels[:1], b.sample_ids[:1]) for b in batches(ids))

    with pytest.raises(Fault, match="saw 4 samples of 10"):
        evaluate(
            Lookup(torch.eye(10, 6)),
            short,
            num_samples=10,
            batch_size=3,
            rank=0,
            world_size=1,
            device=CPU,
            precision=Precision("fp32"),
        )


class PredictsPixel(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()


def counted(ids: NDArray[np.int64]) -> Iterator[Batch]:
    """Of sample k class k mod 3 is predicted; its label is k mod 2."""
    for start in range(0, len(ids), 4):
        part = torch.from_numpy(ids[start : start + 4])
        images = (part % 3).to(torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)
        yield Batch(images, part % 2, part.numpy())


@pytest.mark.parametrize("confusion_classes", [None, 3])
def test_samples_by_true_and_predicted_class(confusion_classes: int | None) -> None:
    result = evaluate(
        PredictsPixel(),
        counted,
        num_samples=13,
        batch_size=4,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        precision=Precision("fp32"),
        confusion_classes=confusion_classes,
    )
    if confusion_classes is None:
        assert result.confusion is None
        return
    wanted = np.zeros((3, 3), dtype=np.int64)
    for k in range(13):
        wanted[k % 2, k % 3] += 1
    assert result.confusion is not None
    np.testing.assert_array_equal(result.confusion, wanted)
    assert result.confusion.trace() == result.num_top1
    sparse = json.loads(sparse_json(result.confusion))
    assert sparse == {"num_classes": 3, "counts": [[t, a, int(wanted[t, a])] for t in range(2) for a in range(3)]}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("confusion_classes", [None, 3])
def test_a_prediction_that_is_not_finite_is_wrong_and_counted(bad: float, confusion_classes: int | None) -> None:
    """topk and argmax call NaN the largest: class 0 would be right by chance."""

    class BadWhereWhite(PredictsPixel):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits.index_fill(1, torch.tensor([0]), bad).where(images[:, 0, 0, :1] == 0, logits)

    result = evaluate(
        BadWhereWhite(),
        counted,
        num_samples=12,  # 0, 3, 6, 9 are white
        batch_size=4,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        precision=Precision("fp32"),
        confusion_classes=confusion_classes,
    )
    assert (result.num_samples, result.num_not_finite, result.is_finite) == (12, 4, False)
    assert result.first_not_finite == 0
    assert result.num_top1 == sum(k % 3 == k % 2 for k in range(12) if k % 3)
    if result.confusion is not None and result.calibration is not None:
        assert (result.confusion.sum(), result.confusion.trace()) == (8, result.num_top1)
        assert sum(result.calibration.num_samples) == 12
        assert sum(result.calibration.num_right) == result.num_top1
