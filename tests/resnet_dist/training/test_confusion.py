"""The confusion matrix of an evaluation and the gradient's length: numbers known by heart."""

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
from resnet_dist.training.loop import grad_norm
from resnet_dist.training.metrics import Window
from resnet_dist.training.precision import Precision
from resnet_dist.training.stopwatch import Stopwatch


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


def test_the_gradients_length_is_over_all_parameters_and_goes_into_one_window() -> None:
    net = nn.Linear(2, 1)
    assert net.bias is not None
    net.weight.grad, net.bias.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([6.0])
    window = Window(1, 1, rank=0, world_size=1, all_reduce_wait=Stopwatch(torch.device("cpu")))
    seen = []
    for step, norm in enumerate((grad_norm(net), None)):
        window.add(0, torch.tensor(1.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        window.end_step(step)
        window.grad_norm = norm
        seen.append(window.close(0.1, stop=False, save=False).metrics.get("train/grad_norm"))
    assert seen == [7.0, None]
