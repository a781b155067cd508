"""The exact evaluation, its confusion matrix and batch norm's averages: numbers that follow from the definition."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import small_run as small
import torch
from fake_cuda import Operations, fake_cuda
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from resnet_dist.data.batch import Batch
from resnet_dist.data.order import train_order
from resnet_dist.errors import Fault
from resnet_dist.training import evaluate as evaluate_module
from resnet_dist.training.evaluate import Evaluation, evaluate, sparse_json
from resnet_dist.training.model import Precision


class Lookup(nn.Module):
    """Logits by the value of the first pixel: a fixed table, so that every count is known."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].long()]


def batches(ids: NDArray[np.int64], num_labels: int = 6, num_pixels: int = 256) -> Iterator[Batch]:
    """Three samples each; sample k has label k mod `num_labels` and pixels k mod `num_pixels`."""
    for start in range(0, len(ids), 3):
        part = torch.from_numpy(ids[start : start + 3])
        images = (part % num_pixels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)
        yield Batch(images, part % num_labels, part.numpy())


def counted(ids: NDArray[np.int64]) -> Iterator[Batch]:
    """With `Lookup(torch.eye(3))`, class k mod 3 is predicted of sample k; its label is k mod 2."""
    return batches(ids, num_labels=2, num_pixels=3)


def evaluated(
    table: Tensor,
    batches: Callable[[NDArray[np.int64]], Iterator[Batch]],
    num_samples: int,
    *,
    confusion: bool = False,
) -> Evaluation:
    model = Lookup(table).train()
    result = evaluate(
        model,
        batches,
        num_samples=num_samples,
        batch_size=3,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        precision=Precision("fp64"),
        num_classes=table.shape[1],
        confusion=confusion,
    )
    assert model.training
    return result


def test_counts_and_loss_are_those_of_the_definition() -> None:
    table = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(10) % 6
    result = evaluated(table, batches, 10)
    ranks = (table > table.gather(1, labels[:, None])).sum(dim=1)
    counts = (result.num_samples, result.num_top1, result.num_top5)
    assert counts == (10, int((ranks < 1).sum()), int((ranks < 5).sum()))
    assert result.metrics()["val/loss"] == pytest.approx(float(nn.functional.cross_entropy(table, labels)), rel=1e-12)
    assert result.metrics()["val/top1_error"] == 100 - result.top1
    recalls = [float((ranks[labels == c] < 1).double().mean()) for c in range(6)]
    assert result.metrics()["val/balanced_top1"] == pytest.approx(100 * sum(recalls) / 6, rel=1e-12)
    assert result.confusion is None


def test_kernels_are_not_chosen_by_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    timed: list[bool] = []

    def watched(ids: NDArray[np.int64]) -> Iterator[Batch]:
        timed.append(torch.backends.cudnn.benchmark)
        yield from batches(ids)

    evaluated(torch.eye(6), watched, num_samples=6)
    assert timed == [False]
    assert torch.backends.cudnn.benchmark


def test_results_stay_on_a_gpu_until_the_end() -> None:
    def on_the_gpu(ids: NDArray[np.int64]) -> Iterator[Batch]:
        for start in range(0, len(ids), 2):
            yield Batch(torch.zeros((2, 1, 1, 3), dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ids[start:])

    # What follows the batches reads numbers, which fake tensors do not have.
    ends = pytest.raises(DataDependentOutputException)
    with fake_cuda() as device, Operations() as operations, patch("torch.cuda.synchronize") as waited, ends:
        evaluate(
            Lookup(torch.zeros((6, 6))),
            on_the_gpu,
            num_samples=80,
            batch_size=2,
            rank=0,
            world_size=1,
            device=device,
            precision=Precision("fp32"),
            num_classes=6,
        )
    assert operations.syncs.total() == 1
    assert waited.call_count == 2  # so that no more than 16 of the 40 batches are in its memory


def test_lost_samples_are_a_fault() -> None:
    def short(ids: NDArray[np.int64]) -> Iterator[Batch]:
        return (Batch(b.images[:1], b.labels[:1], b.sample_ids[:1]) for b in batches(ids))

    with pytest.raises(Fault, match="saw 4 samples of 10"):
        evaluated(torch.eye(10, 6), short, 10)


def test_samples_by_true_and_predicted_class() -> None:
    result = evaluated(torch.eye(3), counted, 13, confusion=True)
    expected = np.zeros((3, 3), dtype=np.int64)
    for k in range(13):
        expected[k % 2, k % 3] += 1
    assert result.confusion is not None
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.confusion.trace() == result.num_top1
    # Class 2 has no samples, so it is not in the mean.
    right = np.diag(result.confusion)[:2] / result.confusion.sum(axis=1)[:2]
    assert result.balanced_top1 == pytest.approx(100 * right.mean())
    sparse = json.loads(sparse_json(result.confusion))
    assert sparse == {"num_classes": 3, "counts": [[t, a, int(expected[t, a])] for t in range(2) for a in range(3)]}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("confusion", [False, True])
def test_a_prediction_that_is_not_finite_is_wrong_and_counted(bad: float, confusion: bool) -> None:
    """topk and argmax call NaN the largest: class 0 would be right by chance."""
    table = torch.eye(3)
    table[0, 0] = bad  # of samples 0, 3, 6, 9
    result = evaluated(table, counted, 12, confusion=confusion)
    assert (result.num_samples, result.num_not_finite, result.is_finite) == (12, 4, False)
    assert result.first_not_finite == 0
    assert result.num_top1 == sum(k % 3 == k % 2 for k in range(12) if k % 3)
    assert (result.by_class.sum(), result.by_class[:, 1].sum()) == (12, result.num_top1)
    if result.confusion is not None and result.calibration is not None:
        assert (result.confusion.sum(), result.confusion.trace()) == (8, result.num_top1)
        assert sum(result.calibration.num_samples) == 12
        assert sum(result.calibration.num_right) == result.num_top1


def test_batch_norms_statistics_after_training_are_plain_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first norm's input, over two steps of the fourth epoch in micro-batches of 4."""
    monkeypatch.setattr(evaluate_module, "_MAX_TABLE_NUMBERS", 6 * 5)  # five columns of 32 or more at a time
    trainer, _ = small.trained(tmp_path, small.recipe("fp64", train={"bn_statistics_steps": 2}))
    net = trainer.state.net.state_dict()
    memory = small.Memory(small.NUM_TRAIN, 4, seed=1)
    ids = train_order(small.NUM_TRAIN, seed=5, epoch=3, global_batch_size=24, micro_batch_size=4, rank=0, world_size=1)
    means, variances = [], []
    for batch in memory.epoch(3, ids[:2].reshape(-1)):
        pixels = ((batch.images.double() - 100) / 60).permute(0, 3, 1, 2)
        maps = nn.functional.conv2d(pixels, net["conv1.weight"], padding=1)
        means.append(maps.mean(dim=(0, 2, 3)))
        variances.append(maps.var(dim=(0, 2, 3)))
    assert len(means) == 12
    torch.testing.assert_close(net["bn1.running_mean"], torch.stack(means).mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net["bn1.running_var"], torch.stack(variances).mean(0), rtol=1e-9, atol=1e-9)
    assert int(net["bn1.num_batches_tracked"]) == 12  # of training
