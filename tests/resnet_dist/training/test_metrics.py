"""One window of the training curves, and the exact evaluation, on a single worker."""

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
from resnet_dist.training.metrics import Window
from resnet_dist.training.model import Precision

CPU = torch.device("cpu")


def filled(*losses: float) -> Window:
    """A window of steps of two micro-batches of two images; of each micro-batch one answer is wrong."""
    window = Window(2, 2, rank=0, world_size=1, all_reduce_wait=Stopwatch(CPU))
    for step in range(0, len(losses), 2):
        for micro_batch in (0, 1):
            logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
            window.add(micro_batch, torch.tensor(losses[step + micro_batch]), logits, torch.eye(2))
        window.end_step(step // 2)
    return window


def test_means_over_the_steps_of_the_window() -> None:
    result = filled(1.0, 2.0, 3.0, 6.0).close(0.25, stop=False, save=False)
    assert result.metrics["train/loss"] == 3.0
    assert result.metrics["train/top1_error"] == 50.0
    assert result.metrics["train/lr"] == 0.25
    assert result.metrics["speed/images_per_s"] > 0
    assert (result.stop, result.save, result.diverged_step) == (False, False, None)


def test_a_window_starts_empty_after_it_closed() -> None:
    window = filled(1.0, 2.0)
    window.close(0.1, stop=False, save=True)
    window.add(0, torch.tensor(5.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    window.add(1, torch.tensor(7.0), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    window.end_step(0)
    assert window.close(0.1, stop=False, save=True).metrics["train/loss"] == 6.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_and_a_wish_to_stop_are_seen(bad: float) -> None:
    result = filled(1.0, bad).close(0.1, stop=True, save=False)
    assert (result.diverged_step, result.stop) == (0, True)


def test_waiting_for_data_is_measured_and_every_batch_passes() -> None:
    window = filled(1.0, 1.0)
    assert list(window.timed(iter([1, 2, 3]))) == [1, 2, 3]
    assert window.data_wait_s > 0


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
    window = filled(1.0, 1.0)
    window.all_reduce_wait.begin()
    window.all_reduce_wait.end()
    window.data_wait_s = 0.5
    with window.saving():
        pass
    result = window.close(0.1, stop=False, save=False)
    (times,) = result.ranks
    assert times.data_wait_s == 0.5
    assert 0 < times.all_reduce_wait_s < times.step_s + 1
    assert 0 < result.metrics["speed/checkpoint_wait_share"] < 1
    assert window.data_wait_s == window.checkpoint_wait_s == window.all_reduce_wait.take_s() == 0.0
