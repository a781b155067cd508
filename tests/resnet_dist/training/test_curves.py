"""Points of the training curves, and stragglers."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.training.curves import (
    MAX_OWN_CURVES,
    SLOW_FACTOR,
    SLOW_POINTS,
    MetricAccumulator,
    RankTimes,
    Stragglers,
    slowness,
)
from resnet_dist.training.device import DeviceTimer


def accumulator(wait: DeviceTimer | None = None) -> MetricAccumulator:
    """Of steps of two micro-batches of two images."""
    return MetricAccumulator(2, 2, rank=0, world_size=1, gradient_wait=wait or DeviceTimer(torch.device("cpu")))


def fill(points: MetricAccumulator, *losses: float) -> MetricAccumulator:
    """Adds steps of these losses; in each micro-batch one of two predictions is wrong."""
    for step in range(0, len(losses), 2):
        for micro_batch in (0, 1):
            row = torch.tensor([[losses[step + micro_batch], 1.0]], dtype=torch.float64)
            points.add(range(micro_batch, micro_batch + 1), row)
        points.end_step(step // 2)
    return points


def test_a_point_has_the_means_over_its_own_steps() -> None:
    points = fill(accumulator(), 1.0, 2.0, 3.0, 6.0)
    point = points.take(0.25, next_step=2)
    assert point.metrics["train/loss"] == 3.0
    assert point.metrics["train/top1_error"] == 50.0
    assert point.metrics["train/lr"] == 0.25
    assert point.metrics["speed/images_per_s"] > 0
    assert point.diverged_step is None
    assert fill(points, 5.0, 7.0).take(0.1, next_step=3).metrics["train/loss"] == 6.0


@pytest.mark.parametrize(
    ("losses", "is_finite", "diverged_step"),
    [((1, math.nan), True, 0), ((1, math.inf), True, 0), ((1, 2), False, 1), ((1, 1, math.nan, 1), True, 1)],
)
def test_a_loss_or_a_state_that_is_not_finite_is_a_divergence(
    losses: tuple[float, ...], is_finite: bool, diverged_step: int
) -> None:
    """If only the state is not finite, it is the next step's."""
    point = fill(accumulator(), *losses).take(0.1, next_step=len(losses) // 2, state_is_finite=is_finite)
    assert point.diverged_step == diverged_step


def test_every_worker_has_its_times() -> None:
    wait = DeviceTimer(torch.device("cpu"))
    points = fill(accumulator(wait), 1.0, 1.0)
    wait.begin()
    wait.end()
    with points.waiting_for_data():
        pass
    assert points.data_wait_s > 0
    points.data_wait_s = 0.5
    with points.saving():
        pass
    point = points.take(0.1, next_step=1)
    (times,) = point.ranks
    assert times.data_wait_s == 0.5
    assert 0 < times.all_reduce_wait_s < times.step_s + 1
    assert 0 < point.metrics["speed/checkpoint_wait_share"] < 1
    assert points.data_wait_s == points.checkpoint_wait_s == wait.take_s() == 0.0


# Stragglers


def times_of(*busy_s: float) -> list[RankTimes]:
    """A step that ends for all when the slowest is done."""
    return [RankTimes(max(busy_s), 0.0, max(busy_s) - mine) for mine in busy_s]


@pytest.mark.parametrize(
    ("times", "shares", "expected"),
    [
        pytest.param(times_of(1.0, 1.0, 2.0), [1, 1, 1], [1 / 1.5, 1 / 1.5, 2.0], id="who does not wait is slow"),
        pytest.param(times_of(1.0, 2.0), [1, 1], [0.5, 2.0], id="of two"),
        pytest.param([RankTimes(2, 0, 1), RankTimes(2, 1, 0)], [1, 1], [0.5, 2.0], id="waiting for data counts"),
        pytest.param(times_of(2.0, 1.0, 1.0), [2, 1, 1], [1.0, 1.0, 1.0], id="more micro-batches are not slow"),
        pytest.param([RankTimes(9.0, 8.0, 0.0)], [4], [1.0], id="a single worker is never slow"),
    ],
)
def test_slowness(times: list[RankTimes], shares: list[int], expected: list[float]) -> None:
    assert slowness(times, shares) == pytest.approx(expected)


@given(st.lists(st.sampled_from([0.1, 1.0, 2.0, 3.5]) | st.floats(0.001, 100.0), min_size=2, max_size=40))
def test_slowness_is_relative_to_the_median_of_the_others(busy_s: list[float]) -> None:
    times = [RankTimes(mine, 0.0, 0.0) for mine in busy_s]
    others = [median(busy_s[:rank] + busy_s[rank + 1 :]) for rank in range(len(busy_s))]
    assert slowness(times, [1] * len(busy_s)) == [mine / other for mine, other in zip(busy_s, others, strict=True)]


@given(st.lists(st.floats(0.001, 100.0), min_size=2, max_size=16), st.floats(0.01, 100.0))
def test_slowness_is_a_ratio(busy_s: list[float], factor: float) -> None:
    """In other units the same; and as fast as all others is never slow."""
    shares = [1] * len(busy_s)
    scaled = slowness(times_of(*(factor * b for b in busy_s)), shares)
    assert scaled == pytest.approx(slowness(times_of(*busy_s), shares), rel=1e-6, abs=1e-6)
    assert max(slowness(times_of(*[busy_s[0]] * len(busy_s)), shares)) < SLOW_FACTOR


def test_a_straggler_is_slow_at_three_points_in_a_row_and_reported_once() -> None:
    def newly_slow(*points: list[RankTimes]) -> list[dict[int, float]]:
        stragglers = Stragglers([1, 1], 4)
        return [stragglers.newly_slow(times) for times in points]

    slow, fine = times_of(1.0, 2.0), times_of(1.0, 1.0)
    assert SLOW_POINTS == 3
    assert newly_slow(fine, slow, slow, slow) == [{}, {}, {}, {1: 2.0}]
    assert newly_slow(slow, slow, fine, slow) == [{}] * 4
    assert newly_slow(times_of(1.0, 1.6), times_of(1.0, 3.0), times_of(1.0, 1.9))[-1] == {1: pytest.approx(1.6)}
    reported = [bool(found) for found in newly_slow(*[slow] * 5, fine, *[slow] * 3)]
    assert reported == [False, False, True, False, False, False, False, False, True]  # again after it was fast


def test_speed_of_each_worker_alone() -> None:
    """Two micro-batches of 4 in 2 s, one in 1 s: both do 4 images a second; the waits do not count."""
    values = Stragglers([2, 1], 4).metrics(times_of(2.0, 1.0))
    assert values["worker/0/images_per_s"] == values["worker/1/images_per_s"] == 4.0
    assert values["worker/1/all_reduce_wait_s"] == 1.0
    assert Stragglers([2], 4).metrics([RankTimes(2.0, 0.5, 1.0)]) == {
        "worker/0/step_s": 2.0,
        "worker/0/data_wait_s": 0.5,
        "worker/0/all_reduce_wait_s": 1.0,
        "worker/0/images_per_s": 8.0,
    }
    assert "worker/0/images_per_s" not in Stragglers([1], 4).metrics([RankTimes(0.0, 0.0, 0.0)])


def test_a_thousand_workers_have_as_many_curves_as_sixteen_and_a_straggler_its_own() -> None:
    names = {"step_s", "data_wait_s", "all_reduce_wait_s", "images_per_s"}
    few = Stragglers([1] * MAX_OWN_CURVES, 4).metrics(times_of(*[1.0] * MAX_OWN_CURVES))
    assert few.keys() == {f"worker/{rank}/{name}" for rank in range(MAX_OWN_CURVES) for name in names}

    busy_s = [1.0 + rank / 10_000 for rank in range(1024)]
    busy_s[700], busy_s[40] = 4.0, 2.0
    stragglers = Stragglers([1] * 1024, 4)
    of_all = {f"workers/{name}/{q}" for name in names for q in ("min", "median", "max")}
    of_all |= {"workers/slowest/rank", "workers/slowest/slowness"}
    for newly_slow in ({}, {}, {40, 700}, {}):
        assert stragglers.newly_slow(times_of(*busy_s)).keys() == set(newly_slow)
        metrics = stragglers.metrics(times_of(*busy_s))
        assert metrics.keys() >= of_all
        assert metrics["workers/slowest/rank"] == 700
        assert metrics["workers/slowest/slowness"] == pytest.approx(4.0 / median(busy_s), rel=1e-3)
        assert metrics["workers/images_per_s/min"] == 1.0
        assert metrics["workers/images_per_s/max"] == 4.0
    assert metrics.keys() - of_all == {f"worker/{rank}/{name}" for rank in (40, 700) for name in names}
    for _ in range(SLOW_POINTS):  # a third of all workers: only some get curves
        stragglers.newly_slow(times_of(*[1.0 + (rank % 3 == 0) for rank in range(1024)]))
    assert len(stragglers.metrics(times_of(*busy_s)).keys() - of_all) == MAX_OWN_CURVES * len(names)
