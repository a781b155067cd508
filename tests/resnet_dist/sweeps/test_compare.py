"""Schedulers compared on recorded curves: exact where the curves determine the result."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.compare import compare
from resnet_dist.sweeps.ledger import SweepState, TrialOutcome, replay, trial_name
from tests.resnet_dist.sweeps.ledgers import RecordedRun, events_of

POINTS, EPOCHS = 9, 9
Curve = Callable[[int, int, int], float]
"""(point, seed, epoch) -> top-1."""


def a_sweep(curve: Curve, *, seeds: int = 1, last: TrialOutcome = "finished") -> SweepState:
    space = Space.model_validate(
        {
            "base": "b",
            "space": {"optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1}},
            "search": {"kind": "random"},
            "trials": POINTS,
            "budget": {"wall_hours": 0.001, "epochs": 5},
            "seeds": seeds,
        }
    )
    runs = [
        RecordedRun(
            number=point,
            seed=seed,
            point={"optim.lr": 0.01 + point / 10},
            outcome=last if point == POINTS - 1 else "finished",
            scores=[curve(point, seed, epoch) for epoch in range(1, EPOCHS + 1)],
        )
        for point in range(POINTS)
        for seed in range(seeds)
    ]
    return replay(events_of(space, runs, base={}))


def rows(table: str) -> dict[str, list[str]]:
    """Rule -> epochs, share, mean, median, nine tenths, hits."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {name: values for name, *values in cells[2:]}


def test_where_curves_never_cross_early_stopping_loses_nothing() -> None:
    table = rows(compare(a_sweep(lambda point, seed, epoch: 50 + point + epoch), ["{kind: asha}"], 200, at_once=1))
    assert table["every point to its end"] == ["81.0", "100%", "0.00", "0.00", "0.00", "100%"]
    asha = table["{kind: asha}"]
    assert asha[2:] == ["0.00", "0.00", "0.00", "100%"]
    assert float(asha[0]) < 0.7 * 81
    assert float(table["random search, as many epochs"][2]) > 0.5


def test_a_late_bloomer_is_lost_unless_nobody_was_there_to_beat_it() -> None:
    """Worst until the last epoch, then best: it continues only as the first of the order, one draw in nine."""

    def curve(point: int, seed: int, epoch: int) -> float:
        return (90.0 if epoch == EPOCHS else 1.0) if point == 0 else 40.0 + point

    asha = rows(compare(a_sweep(curve), ["{kind: asha}"], 300, at_once=1))["{kind: asha}"]
    assert 0.06 < float(asha[5].strip("%")) / 100 < 0.17
    assert asha[3] == f"{90 - 48:.2f}"


def test_the_picked_point_is_scored_by_its_other_seeds() -> None:
    """Each seed loves another point; over both, point 5 is best."""

    def curve(point: int, seed: int, epoch: int) -> float:
        lucky = {0: 1, 1: 7}
        return 80.0 if point == lucky[seed] else 70.0 if point == 5 else 50.0

    table = rows(compare(a_sweep(curve, seeds=2), ["{kind: asha}"], 10, at_once=1))
    assert table["every point to its end"][2:] == ["20.00", "20.00", "20.00", "0%"]


def test_seeds_that_not_every_point_has_do_not_count() -> None:
    def curve(point: int, seed: int, epoch: int) -> float:
        return 50.0 + point - 30 * seed

    state = a_sweep(curve, seeds=2)
    del state.trials[trial_name(3, 1)]
    table = compare(state, ["{kind: asha}"], 10, at_once=1)
    assert table.startswith("9 points with 1 seed(s)")
    assert rows(table)["every point to its end"][2:] == [*["0.00"] * 3, "100%"]


def test_a_trial_that_diverged_is_worst() -> None:
    state = a_sweep(lambda point, seed, epoch: 50.0 + point, last="diverged")
    assert rows(compare(state, ["{kind: asha}"], 10, at_once=2))["every point to its end"][2:] == [
        *["0.00"] * 3,
        "100%",
    ]


def test_a_sweep_that_stopped_trials_tells_nothing_of_their_ends() -> None:
    with pytest.raises(UserError, match=r"whose points have all reached their end; not so: t0008"):
        compare(a_sweep(lambda point, seed, epoch: 1.0, last="stopped"), ["{kind: asha}"], 10, at_once=1)


def test_an_unknown_scheduler_is_named() -> None:
    with pytest.raises(UserError, match=r"--scheduler: scheduler"):
        compare(a_sweep(lambda point, seed, epoch: 1.0), ["{kind: asah}"], 10, at_once=1)
