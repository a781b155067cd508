"""The order of a sweep's points, and what is said about its certainty."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resnet_dist.config.space import Space
from resnet_dist.sweeps.analysis.ranking import Ranking, rank
from resnet_dist.sweeps.ledger import (
    SweepState,
    TrialAdded,
    TrialEnded,
    TrialKind,
    TrialOutcome,
    TrialStarted,
    replay,
    trial_name,
)
from tests.resnet_dist.sweeps.ledgers import RecordedRun, events_of

SPACE = Space.model_validate(
    {
        "base": "base.yaml",
        "space": {
            "optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1},
            "optim.weight_decay": {"kind": "loguniform", "low": 1e-5, "high": 1e-2},
        },
        "trials": 16,
    }
)


def ranking_of(*runs: tuple[int, int, TrialOutcome, float], space: Space = SPACE) -> Ranking:
    """`runs`: point, seed, outcome, top-1."""
    recorded = [
        RecordedRun(
            number,
            seed,
            {"optim.lr": 0.1 * (number + 1), "optim.weight_decay": 5e-4},
            outcome,
            [] if outcome == "diverged" else [score],
        )
        for number, seed, outcome, score in runs
    ]
    return rank(space, replay(events_of(space, recorded, {})))


def seeds(number: int, *scores: float) -> list[tuple[int, int, TrialOutcome, float]]:
    return [(number, seed, "finished", score) for seed, score in enumerate(scores)]


def test_a_point_that_diverges_with_some_seeds_counts_with_the_worst() -> None:
    steady = seeds(1, 94, 94.1, 94.2)
    ranking = ranking_of((0, 0, "finished", 95), (0, 1, "diverged", 0), (0, 2, "diverged", 0), *steady)
    assert [(row.number, row.num_runs, row.num_diverged) for row in ranking.rows] == [(1, 3, 0), (0, 3, 2)]
    assert ranking.rows[1].score == pytest.approx(95 / 3)
    assert "one other cannot be told from it: 0.1 / 0.0005 (t0000)" in ranking.verdict()


def test_a_worse_point_does_not_become_a_rival_by_varying_more() -> None:
    ranking = ranking_of(*seeds(0, 95, 95.1, 95.2), *seeds(1, 94, 94.1, 94.2), *seeds(2, 60, 90, 120))
    assert [row.number for row in ranking.rows] == [0, 1, 2]
    assert not any(row.in_noise for row in ranking.rows)
    assert "its lead over both others is more than chance" in ranking.verdict()


FIRST = "Best: optim.lr 0.1, optim.weight_decay 0.0005 (t0000)"


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        pytest.param([], "No trial has reached its end yet.", id="nothing has begun"),
        pytest.param([(0, 0, "diverged", 0)], "No trial reached its end.", id="all diverged"),
        pytest.param(
            [*seeds(0, 95, 96), (1, 0, "stopped", 90)],
            f"{FIRST} with val/top1 95.5 ± 6.4 (mean of 2 runs); no other point "
            "reached its end, so there is nothing to compare it with. "
            "Dropped without a whole run: one by a score before the end.",
            id="one point",
        ),
        pytest.param(
            [*seeds(0, 95), *seeds(1, 94)],
            f"{FIRST} with val/top1 95 (one run); whether its lead is chance is "
            "unknown: every point has one run (--set race.max_seeds=8 adds some).",
            id="no seeds",
        ),
        pytest.param(
            [*seeds(0, 95, 95), *seeds(1, 94, 94)],
            f"{FIRST} with val/top1 95 (mean of 2 runs); whether its lead is "
            "chance is unknown: the seeds of each point gave the same score.",
            id="seeds change nothing",
        ),
        pytest.param(
            [*seeds(0, 95.0, 95.2, 95.1), *seeds(1, 94.9, 95.1, 95.0), *seeds(2, 80.0, 80.2, 80.1)],
            f"{FIRST} with val/top1 95.1 ± 0.16 (mean of 3 runs); one other "
            "cannot be told from it: 0.2 / 0.0005 (t0001). It may be better by up to 0.19; about 11 runs of each would "
            "tell them apart (--set race.max_seeds=11).",
            id="one rival",
        ),
        pytest.param(
            [*(run for number in range(6) for run in seeds(number, 95.0, 96.0)), (6, 0, "diverged", 0)],
            f"{FIRST} with val/top1 95.5 ± 1.2 (mean of 2 runs); five others "
            "cannot be told from it: 0.2 / 0.0005 (t0001), 0.3 / 0.0005 (t0002), 0.4 / 0.0005 (t0003) and 2 more. "
            "One of them may be better by up to 7; they are so close that more seeds would hardly tell: take any.",
            id="all equal",
        ),
    ],
)
def test_the_verdict_says_what_was_found_and_how_certain_it_is(
    runs: list[tuple[int, int, TrialOutcome, float]], expected: str
) -> None:
    assert ranking_of(*runs).verdict() == expected


def test_of_a_loss_the_lowest_is_best() -> None:
    space = SPACE.model_copy(update={"metric": "val/top1_error"})
    runs = [*seeds(0, 5.0, 5.2), *seeds(1, 4.0, 4.2)]
    events = events_of(space, [RecordedRun(n, s, {"optim.lr": 0.1}, o, [score]) for n, s, o, score in runs], {})
    renamed = [
        replace(event, metrics={"val/top1_error": event.metrics["val/top1"]})
        if isinstance(event, TrialEnded)
        else event
        for event in events
    ]
    ranking = rank(space, replay(renamed))
    assert [(row.number, row.score) for row in ranking.rows] == [(1, pytest.approx(4.1)), (0, pytest.approx(5.1))]
    assert "with val/top1_error 4.1 ± 0.43 (mean of 2 runs); its lead over the other one is more" in ranking.verdict()


def with_trial(
    state: SweepState, number: int, kind: TrialKind, rung: float, outcome: TrialOutcome, top1: float, epoch: float
) -> None:
    name = trial_name(number, kind=kind, rung=rung)
    point = {"optim.lr": 0.1 * (number + 1)}
    added = TrialAdded(trial=name, number=number, seed_number=0, point=point, time_s=1.0, kind=kind, rung=rung)
    metrics = {"val/top1": top1}
    end = TrialEnded(trial=name, outcome=outcome, epoch=epoch, step=1, metrics=metrics, reason=outcome, time_s=2.0)
    for event in (added, TrialStarted(trial=name, time_s=1.0), end):
        state.apply(event)


def test_points_that_lost_at_a_rung_of_short_schedules_are_behind_those_that_finished() -> None:
    state = SweepState()
    for number, top1 in enumerate((50, 40, 30, 20)):
        with_trial(state, number, "short", 1, "finished", top1, 1)
    for number, top1 in enumerate((60, 70)):
        with_trial(state, number, "short", 3, "finished", top1, 3)
    with_trial(state, 1, "point", 0, "finished", 65, 9)
    with_trial(state, 4, "short", 1, "diverged", 99, 0.5)
    rows = rank(SPACE, state).rows
    assert [(row.number, row.score, row.num_runs, row.status, row.epoch, row.judged_by) for row in rows[:-1]] == [
        (1, 65, 1, "finished", 9, "point"),
        (0, 60, 0, "stopped", 3, "short"),
        (2, 30, 0, "stopped", 1, "short"),
        (3, 20, 0, "stopped", 1, "short"),
    ]
    assert (rows[-1].number, rows[-1].status) == (4, "diverged")
    assert rank(SPACE, state).verdict().endswith("Dropped without a whole run: three by a shorter schedule.")


def test_a_point_that_lost_after_its_cooldown_has_the_cooldowns_score() -> None:
    state = SweepState()
    with_trial(state, 0, "point", 0, "finished", 65, 9)
    for number, raw, cooled in ((1, 40, 50), (2, 45, 48)):
        with_trial(state, number, "point", 0, "stopped", raw, 3)
        with_trial(state, number, "cooldown", 1, "finished", 30, 1.2)
        with_trial(state, number, "cooldown", 3, "finished", cooled, 3.6)
    rows = rank(SPACE, state).rows
    assert [(row.number, row.score, row.num_runs, row.status, row.epoch, row.judged_by) for row in rows] == [
        (0, 65, 1, "finished", 9, "point"),
        (1, 50, 0, "stopped", 3, "cooldown"),
        (2, 48, 0, "stopped", 3, "cooldown"),
    ]
    assert rank(SPACE, state).verdict().endswith("Dropped without a whole run: two by a score after a cooldown.")
