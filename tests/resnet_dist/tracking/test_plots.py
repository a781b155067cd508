"""The decisions behind plots: where an axis ends, who was slow, how a step's time was spent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.tracking.plots import StepShares, draw_plots, draw_ranks, error_limit, slowest, step_shares
from resnet_dist.tracking.spool import History, read_history
from resnet_dist.tracking.tracker import CONFUSION
from resnet_dist.training.curves import SLOW_POINTS, RankTimes, Stragglers

Points = dict[str, list[tuple[int, float]]]


def points_of(*ranks: tuple[float, float, float]) -> Points:
    """(step, data wait, wait for the others) in seconds of each rank, twice, with 10 images a step."""
    points: Points = {}
    for rank, (step_s, data_s, others_s) in enumerate(ranks):
        values = {"step_s": step_s, "data_wait_s": data_s, "all_reduce_wait_s": others_s}
        values["images_per_s"] = 10 / (step_s - others_s)
        points |= {f"worker/{rank}/{name}": [(10, value), (20, value)] for name, value in values.items()}
    return points


@pytest.mark.parametrize(
    ("last", "limit"), [([], 100), ([0.3], 10), ([7.0], 20), ([21.4, 24.1, 7.0], 50), ([60.0, 20.0], 100)]
)
def test_the_end_of_training_fills_the_plot(last: list[float], limit: float) -> None:
    assert error_limit([[99.0, value] for value in last]) == limit


def test_a_steps_time_is_split_by_use() -> None:
    shares = step_shares(points_of((1.0, 0.25, 0.25), (1.0, 0.5, 0.0)))
    assert shares == [StepShares("0", 0.5, 0.25, 0.25), StepShares("1", 0.5, 0.5, 0.0)]
    assert [share.busy_s for share in shares] == [0.75, 1.0]


def test_the_slowest_is_who_would_do_least_alone() -> None:
    points = points_of((1.0, 0.0, 0.5), (1.0, 0.0, 0.0), (1.0, 0.0, 0.5))
    assert slowest(points) == 1
    points["worker/0/images_per_s"].append((30, 0.001))  # one bad moment makes nobody the slowest
    assert slowest(points) == 1


def test_tenth_rank_comes_after_the_second() -> None:
    assert [share.worker for share in step_shares(points_of(*[(1.0, 0.0, 0.0)] * 12))] == [str(k) for k in range(12)]


@pytest.mark.parametrize("num_ranks", [1, 4, 60])
def test_any_number_of_workers_is_drawn(tmp_path: Path, num_ranks: int) -> None:
    path = draw_ranks(points_of(*[(1.0, 0.1, 0.01 * rank) for rank in range(num_ranks)]), tmp_path / "ranks.png")
    assert path is not None
    with Image.open(path) as picture:
        assert picture.width > 900


def test_of_many_workers_the_median_and_the_stragglers_are_drawn(tmp_path: Path) -> None:
    stragglers = Stragglers([1] * 100, 10)
    busy_s = [2.0 if rank == 70 else 1.0 for rank in range(100)]
    points: Points = {}
    for step in range(SLOW_POINTS):
        times = [RankTimes(2.0, 0.25, 2.0 - mine) for mine in busy_s]
        stragglers.newly_slow(times)
        for key, value in stragglers.metrics(times).items():
            points.setdefault(key, []).append((step, value))
    assert step_shares(points) == [StepShares("70", 1.75, 0.25, 0.0), StepShares("median", 0.75, 0.25, 1.0)]
    assert draw_ranks(points, tmp_path / "ranks.png") == tmp_path / "ranks.png"
    assert draw_ranks({k: v for k, v in points.items() if "worker/" not in k}, tmp_path / "no_straggler.png")


@pytest.mark.parametrize(
    "confusion",
    [
        "[",
        "[" * 100_000,
        "{}",
        '{"num_classes": 1000000000, "counts": []}',
        '{"num_classes": 2, "counts": [[5, 0, 1]]}',
    ],
)
def test_odd_numbers_cost_a_plot_and_no_run(tmp_path: Path, confusion: str) -> None:
    odd = [(1, math.nan), (2, math.inf), (3, -1e308), (4, 1e308)]
    keys = ("train/lr", "val/top1_error", "worker/0/images_per_s", "speed/images_per_s")
    drawn = draw_plots(History(dict.fromkeys(keys, odd), {CONFUSION: confusion}), ("cat", "dog"), tmp_path)
    assert tmp_path / "confusion.png" not in drawn
    assert all(path.is_file() for path in drawn)


def test_without_workers_times_there_is_no_plot(tmp_path: Path) -> None:
    assert draw_ranks({"train/loss": [(1, 2.0)]}, tmp_path / "ranks.png") is None
    assert not (tmp_path / "ranks.png").exists()


def test_plots_of_what_there_is(sqlite_uri, tmp_path, logged_run):
    handle = logged_run(sqlite_uri, tmp_path / "run")
    history = read_history(tmp_path / "run", handle.run_id)
    drawn = draw_plots(history, ("cat", "dog"), tmp_path / "plots")
    names = ["learning_curves.png", "learning_rate.png", "throughput.png", "confusion.png"]
    assert [path.name for path in drawn] == names
    for path in drawn:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # not an empty sheet
    assert draw_plots(History(), (), tmp_path / "none") == []
    counts = [[k, k, 1] for k in range(200)]
    many = History(texts={CONFUSION: json.dumps({"num_classes": 200, "counts": counts})})
    assert len(draw_plots(many, [str(k) for k in range(200)], tmp_path / "many")) == 1
