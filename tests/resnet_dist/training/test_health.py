"""The rule that calls a worker slow: exact cases, and what holds for any times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.training.metrics import SLOW_FACTOR, SLOW_POINTS, RankTimes, Stragglers, slowness


def step_of(*busy_s: float) -> list[RankTimes]:
    """A step that ends for all when the slowest is done."""
    return [RankTimes(max(busy_s), 0.0, max(busy_s) - mine) for mine in busy_s]


def test_the_slow_one_is_who_does_not_wait() -> None:
    assert slowness(step_of(1.0, 1.0, 2.0), [1, 1, 1]) == [pytest.approx(1 / 1.5), pytest.approx(1 / 1.5), 2.0]
    assert slowness(step_of(1.0, 2.0), [1, 1]) == [0.5, 2.0]


def test_waiting_for_data_counts_as_slow() -> None:
    fed, starved = RankTimes(2.0, 0.0, 1.0), RankTimes(2.0, 1.0, 0.0)
    assert slowness([fed, starved], [1, 1]) == [0.5, 2.0]


def test_whoever_has_more_micro_batches_is_not_slow() -> None:
    assert slowness(step_of(2.0, 1.0, 1.0), [2, 1, 1]) == [1.0, 1.0, 1.0]


def test_a_single_worker_holds_up_nobody() -> None:
    assert slowness([RankTimes(9.0, 8.0, 0.0)], [4]) == [1.0]


def newly_slow(*points: list[RankTimes]) -> list[dict[int, float]]:
    stragglers = Stragglers([1, 1], 4)
    return [stragglers.newly_slow(times) for times in points]


def test_a_worker_is_a_straggler_after_three_slow_points_in_a_row() -> None:
    slow, fine = step_of(1.0, 2.0), step_of(1.0, 1.0)
    assert SLOW_POINTS == 3
    assert newly_slow(fine, slow, slow, slow) == [{}, {}, {}, {1: 2.0}]
    assert newly_slow(slow, slow, fine, slow) == [{}] * 4
    assert newly_slow(step_of(1.0, 1.6), step_of(1.0, 3.0), step_of(1.0, 1.9))[-1] == {1: pytest.approx(1.6)}


def test_a_straggler_is_reported_once_and_again_after_it_was_fast() -> None:
    slow, fine = step_of(1.0, 2.0), step_of(1.0, 1.0)
    reported = [bool(found) for found in newly_slow(*[slow] * 5, fine, *[slow] * 3)]
    assert reported == [False, False, True, False, False, False, False, False, True]


@given(st.lists(st.floats(0.001, 100.0), min_size=2, max_size=16), st.floats(0.01, 100.0))
def test_it_is_a_ratio(busy_s: list[float], factor: float) -> None:
    """In other units the same; and as fast as all others is never slow."""
    shares = [1] * len(busy_s)
    scaled = slowness(step_of(*(factor * b for b in busy_s)), shares)
    assert scaled == pytest.approx(slowness(step_of(*busy_s), shares), rel=1e-6, abs=1e-6)
    same = slowness(step_of(*[busy_s[0]] * len(busy_s)), shares)
    assert max(same) < SLOW_FACTOR


def test_what_each_would_do_alone() -> None:
    """Two micro-batches of 4 in 2 s, one in 1 s: both do 4 images a second; the waits do not count."""
    values = Stragglers([2, 1], 4).metrics(step_of(2.0, 1.0))
    assert values["worker/0/images_per_s"] == values["worker/1/images_per_s"] == 4.0
    assert values["worker/1/all_reduce_wait_s"] == 1.0
    assert RankTimes(2.0, 0.5, 1.0).metrics(3, 8) == {
        "worker/3/step_s": 2.0,
        "worker/3/data_wait_s": 0.5,
        "worker/3/all_reduce_wait_s": 1.0,
        "worker/3/images_per_s": 8.0,
    }
    assert "worker/0/images_per_s" not in Stragglers([1], 4).metrics([RankTimes(0.0, 0.0, 0.0)])
