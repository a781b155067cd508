"""Points of the training curves, stragglers, and the use of the device."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_dist.training.collectives import Stopwatch
from resnet_dist.training.metrics import MetricAccumulator

CPU = torch.device("cpu")


def filled(*losses: float) -> MetricAccumulator:
    """Steps of two micro-batches of two images; in each micro-batch one prediction is wrong."""
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
