"""The confusion matrix of an evaluation: numbers known by heart."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnet_dist.data.batch import Batch
from resnet_dist.training.evaluate import evaluate, sparse_json
from resnet_dist.training.model import Precision


class AnswerIsPixel(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()


def batches(ids: NDArray[np.int64]) -> Iterator[Batch]:
    """Sample k answers k mod 3; its label is k mod 2."""
    for start in range(0, len(ids), 4):
        part = torch.from_numpy(ids[start : start + 4])
        images = (part % 3).to(torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)
        yield Batch(images, part % 2, part.numpy())


@pytest.mark.parametrize("confusion_classes", [None, 3])
def test_samples_by_true_class_and_answer(confusion_classes: int | None) -> None:
    result = evaluate(
        AnswerIsPixel(),
        batches,
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
def test_an_answer_that_is_not_finite_is_wrong_and_counted(bad: float, confusion_classes: int | None) -> None:
    """topk and argmax call NaN the largest: class 0 would be right by chance."""

    class BadWhereWhite(AnswerIsPixel):
        def forward(self, images: Tensor) -> Tensor:
            answers = super().forward(images)
            return answers.index_fill(1, torch.tensor([0]), bad).where(images[:, 0, 0, :1] == 0, answers)

    result = evaluate(
        BadWhereWhite(),
        batches,
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
