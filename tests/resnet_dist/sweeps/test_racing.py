"""Which points may be the best, which get another seed, and a race in a sweep whose drivers are killed."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from resnet_dist.bench.race import SIMULATED, simulate
from resnet_dist.config.space import Race, Space
from resnet_dist.sweeps.ledger import Event, Ledger, TrialAdded
from resnet_dist.sweeps.points import planned_points
from resnet_dist.sweeps.racing import contenders, next_round, runs_to_tell
from resnet_dist.sweeps.sweep import Sweep

runs_of_a_point = st.lists(st.floats(-10, 10), min_size=2, max_size=4)


@given(runs_of_a_point, runs_of_a_point)
def test_whether_two_points_can_be_told_apart_is_students_test(first: list[float], second: list[float]) -> None:
    assume(np.var(first) + np.var(second) > 1e-6)
    with warnings.catch_warnings(action="ignore"):  # scipy's, on runs that are nearly the same
        p_value = ttest_ind(first, second).pvalue
    assume(abs(p_value - 0.05) > 1e-6)
    assert (len(contenders({0: first, 1: second})) == 2) == (p_value > 0.05)


def test_points_that_vary_much_far_from_the_best_do_not_make_its_rivals_level() -> None:
    best, rival, wild = [-0.326, -0.201, -0.451], [-0.817, -0.736, -0.898], [-1.0, -3.9, -7.0]
    assert list(contenders({0: wild, 1: rival, 2: best})) == [2]
    assert 1 in contenders({0: wild, 1: [-0.817], 2: best}), "the spread of a single run is unknown"
    assert 1 in contenders({0: wild, 1: [-0.397, -0.380, -0.415], 2: best})


def test_without_a_repeated_point_anything_may_be_the_best() -> None:
    assert contenders({0: [1.0], 1: [3.0], 2: [2.0]}) == {1: 0.0, 2: math.inf, 0: math.inf}
    assert contenders({}) == {}


def test_the_better_half_gets_another_seed_and_at_least_four_points_do() -> None:
    first_runs = {point: [float(point)] for point in range(12)}
    assert next_round(Race(), first_runs) == [(point, 1) for point in (11, 10, 9, 8, 7, 6)]
    assert next_round(Race(), {point: [float(point)] for point in range(5)}) == [(p, 1) for p in (4, 3, 2, 1)]
    assert next_round(Race(), {0: [1.0]}) == next_round(Race(), {}) == []


def test_a_race_ends_when_the_answer_is_known_or_does_not_matter_or_seeds_are_used_up() -> None:
    close: dict[int, list[float | None]] = {0: [90.0, 90.4, 90.2], 1: [90.1, 90.3, 90.5], 2: [80.0]}
    assert next_round(Race(), close) == [(1, 3), (0, 3)]
    assert next_round(Race(min_difference=1.0), close) == []
    assert next_round(Race(max_seeds=3), close) == []
    assert next_round(Race(max_seeds=4), close) == [(1, 3), (0, 3)]
    assert next_round(Race(), {**close, 0: [85.0, 85.4, 85.2]}) == []
    same: dict[int, list[float | None]] = {0: [90.0, 90.0], 1: [90.0, 90.0]}
    assert next_round(Race(), same) == [], "more seeds would change nothing"


def test_a_run_that_failed_is_not_tried_for_ever() -> None:
    runs: dict[int, list[float | None]] = {0: [90.0, 90.4, None], 1: [90.1, 90.3]}
    assert next_round(Race(max_seeds=3), runs) == [(1, 2)]


def test_how_many_runs_tell_two_points_apart() -> None:
    assert runs_to_tell(1.0, 1.0, num_points=2) == 8  # 2 * 1.96 ** 2
    assert runs_to_tell(0.5, 1.0, num_points=2) == 31
    assert runs_to_tell(0.0, 1.0, num_points=2) == math.inf


@pytest.mark.parametrize("points", ["16 around an optimum, spread 1", "the same, spreads of 0.5 to 2"])
def test_a_race_keeps_the_best_point_and_beats_equal_shares_of_its_runs(points: str) -> None:
    """See tune_spaces/results/README.md for more, and for what other ways to spend seeds cost."""
    arms = simulate(SIMULATED[points], num_races=100)
    runs, regret, _, kept, _ = arms["race"]
    assert kept >= 0.95
    assert regret < 0.6 * arms["equal shares"][1]
    assert runs < 0.5 * arms["8 runs of each"][0]
    assert regret <= arms["8 runs of each"][1] + 0.01


# ---- in a sweep ------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Fragile(Ledger):
    """Its driver is killed instead of writing one event too many."""

    def __init__(self, events: Sequence[Event], most: float) -> None:
        super().__init__(events)
        self._most = len(self.events) + most

    def append(self, event: Event) -> None:
        if len(self.events) >= self._most:
            raise Killed
        super().append(event)


def a_space(**more: Any) -> Space:
    parameters = {"optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1}}
    return Space.model_validate({"base": "b", "space": parameters, "search": {"kind": "sobol"}, "trials": 8, **more})


def score(point: Mapping[str, Any], seed: int) -> float:
    lr = point["optim.lr"]
    return 90 - 3 * abs(math.log10(lr / 0.1)) + random.Random(f"{lr} {seed}").gauss(0, 0.5)


def run(space: Space, events: Sequence[Event] = (), events_of_a_driver: float = math.inf) -> list[Event]:
    """All events of a sweep whose drivers are killed again and again."""
    clock = itertools.count()
    while True:
        ledger = Fragile(events, events_of_a_driver)
        try:
            sweep = Sweep(
                space,
                ledger,
                planned=planned_points(space, space.trials or 0),
                total_epochs=lambda point: 1,
                now_s=lambda: float(next(clock)),
            )
            sweep.begin()
            while (trial := sweep.next_trial()) is not None:
                sweep.start(trial)
                metrics = {"val/top1": score(trial.point, trial.seed_number)}
                sweep.end(trial.name, "finished", epoch=1, step=1, metrics=metrics, reason="finished")
            return ledger.events
        except Killed:
            events = ledger.events


def added(events: Sequence[Event]) -> list[str]:
    return [event.trial for event in events if isinstance(event, TrialAdded)]


@pytest.mark.parametrize("events_of_a_driver", [3, 4, 5, 7])
def test_a_race_is_the_same_wherever_its_drivers_are_killed(events_of_a_driver: int) -> None:
    space = a_space(race={"max_seeds": 5})
    assert added(run(space, events_of_a_driver=events_of_a_driver)) == added(run(space))


def test_seeds_are_what_all_points_get_and_the_race_adds_to_them() -> None:
    names = added(run(a_space(seeds=2, race={"max_seeds": 4})))
    counts = Counter(name.partition("-")[0] for name in names)
    assert sorted(names[:16]) == sorted(f"t{number:04d}{seed}" for number in range(8) for seed in ("", "-s1"))
    assert min(counts.values()) == 2
    assert max(counts.values()) == 4


def test_a_finished_sweep_races_on_with_more_seeds() -> None:
    short = run(a_space(race={"max_seeds": 3}))
    assert added(run(a_space(race={"max_seeds": 3}), short)) == added(short)
    assert added(run(a_space(race={"max_seeds": 6}), short)) == added(run(a_space(race={"max_seeds": 6})))
    assert len(added(run(a_space(), run(a_space())))) == 8


def test_the_budget_ends_a_race_and_a_larger_one_resumes_it() -> None:
    space = a_space(race={"max_seeds": 5})
    part = run(a_space(race={"max_seeds": 5}, budget={"epochs": 11}))
    assert added(part) == added(run(space))[: len(added(part))]
    assert added(run(space, part)) == added(run(space))
