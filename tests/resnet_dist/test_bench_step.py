"""The step benchmark runs all three loops, and its table matches the times."""

from __future__ import annotations

import pytest

from resnet_dist.bench.step import Settings, run_processes, table

pytestmark = pytest.mark.system

SMALL = Settings("resnet8", 8, 2, 1, steps=10, rounds=4, micro_batches=2)


def test_every_loop_is_timed_in_every_round() -> None:
    times = run_processes(SMALL)
    assert {arm: len(seconds) for arm, seconds in times.items()} == dict.fromkeys(SMALL.arms, 4)


def test_the_table_gives_ratios_of_the_same_round() -> None:
    """A round in which the machine was twice as slow changes no ratio."""
    bare = [0.010, 0.020, 0.010, 0.010]
    times = {"bare": bare, "fast": [1.01 * t for t in bare], "merged": bare, "exact": [1.5 * t for t in bare]}
    rows = table(SMALL, times).splitlines()
    assert rows[-3] == "| this project, reduction: fast, one micro-batch a launch | 10.1 | 1.010 (1.010 to 1.010) |"
    assert rows[-1] == "| this project, reduction: exact | 15.0 | 1.500 (1.500 to 1.500) |"
