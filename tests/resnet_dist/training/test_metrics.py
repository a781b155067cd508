"""One accumulator of the training curves, and the exact evaluation, on a single worker."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnet_dist.data.batch import Batch
from resnet_dist.errors import Fault
from resnet_dist.training.collectives import Stopwatch
from resnet_dist.training.evaluate import evaluate
from resnet_dist.training.metrics import MetricAccumulator
from resnet_dist.training.model import Precision

CPU = torch.device("cpu")


def filled(*losses: float) -> MetricAccumulator:
    """A accumulator of steps of two micro-batches of two images; of each micro-batch one answer is wrong."""
    accumulator = MetricAccumulator(2, 2, rank=0, world_size=1, gradient_wait=Stopwatch(CPU))
    for step in range(0, len(losses), 2):
        for micro_batch in (0, 1):
            logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
            accumulator.add(micro_batch, torch.tensor(losses[step + micro_batch]), logits, torch.eye(2))
        accumulator.end_step(step // 2)
    return accumulator


def test_means_over_the_steps_of_the_accumulator() -> None:
    result = filled(1.0, 2.0, 3.0, 6.0).take(0.25, next_step=2)
    assert result.metrics["train/loss"] == 3.0
    assert result.metrics["train/top1_error"] == 50.0
    assert result.metrics["train/lr"] == 0.25
    assert result.metrics["speed/images_per_s"] > 0
    assert result.diverged_step is None


def test_a_accumulator_starts_empty_after_it_closed() -> None:
    accumulator = filled(1.0, 2.0)
    accumulator.take(0.1, next_step=1)
    accumulator.add(0, torch.tensor(5.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    accumulator.add(1, torch.tensor(7.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    accumulator.end_step(0)
    assert accumulator.take(0.1, next_step=1).metrics["train/loss"] == 6.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_divergence(bad: float) -> None:
    assert filled(1.0, bad).take(0.1, next_step=1).diverged_step == 0


def test_a_state_that_is_not_finite_is_the_next_steps_divergence() -> None:
    assert filled(1.0, 2.0).take(0.1, next_step=5, state_is_finite=False).diverged_step == 5


def test_waiting_for_data_is_measured() -> None:
    accumulator = filled(1.0, 1.0)
    with accumulator.waiting_for_data():
        pass
    assert accumulator.data_wait_s > 0


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


def test_every_rank_has_its_times() -> None:
    accumulator = filled(1.0, 1.0)
    accumulator.gradient_wait.begin()
    accumulator.gradient_wait.end()
    accumulator.data_wait_s = 0.5
    with accumulator.saving():
        pass
    result = accumulator.take(0.1, next_step=1)
    (times,) = result.ranks
    assert times.data_wait_s == 0.5
    assert 0 < times.all_reduce_wait_s < times.step_s + 1
    assert 0 < result.metrics["speed/checkpoint_wait_share"] < 1
    assert accumulator.data_wait_s == accumulator.checkpoint_wait_s == accumulator.gradient_wait.take_s() == 0.0
