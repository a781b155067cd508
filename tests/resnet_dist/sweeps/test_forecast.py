"""What a sweep still has to train, and how long that takes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from resnet_dist.config.space import Space
from resnet_dist.sweeps.forecast import (
    Speed,
    contenders,
    epochs_to_come,
    measured_speed,
    point_cost,
    seconds_left,
)
from resnet_dist.sweeps.ledger import (
    DriverStarted,
    Event,
    Ledger,
    SweepState,
    TrialAdded,
    TrialEnded,
    TrialReported,
    TrialStarted,
    TrialState,
    replay,
    spent_epochs,
)
from resnet_dist.sweeps.points import planned_points
from resnet_dist.sweeps.sweep import Sweep

STEPS_PER_EPOCH = 31
ANNEALED = {"kind": "annealed", "rungs": [0.11, 0.33], "cooldown": 0.2, "reduction_factor": 3}
HALVING = {"kind": "halving", "rungs": [1, 3, 9], "reduction_factor": 3}
RECORD = {"kind": "record", "cooldowns": [0.11, 0.33], "shorts": [1, 3]}
ASHA = {"kind": "asha", "first_rung": 0.11, "rungs": 2}
WAITING_RULES = [{"kind": "fifo"}, ANNEALED, HALVING, RECORD]


def a_space(scheduler: dict[str, Any], num_points: int, seeds: int = 1) -> Space:
    parameter = {"kind": "uniform", "low": 0, "high": 1}
    return Space.model_validate(
        {
            "base": "b",
            "space": {"optim.lr": parameter},
            "scheduler": scheduler,
            "trials": num_points,
            "seeds": seeds,
        }
    )


def played(space: Space, at_once: int, seed: int, is_diverging: bool = False) -> list[tuple[SweepState, float]]:
    """Plays a sweep with scores and an order by chance. After each event: the state, and the epochs in all by the
    forecast.
    """
    chance, clock = random.Random(seed), map(float, itertools.count())
    num_points = space.trials or 0
    cost = point_cost(space, 9.0, STEPS_PER_EPOCH, 1)
    ledger = Ledger()
    sweep = Sweep(
        space,
        ledger,
        planned=planned_points(space, num_points),
        total_epochs=lambda point: 9.0,
        now_s=lambda: next(clock),
    )
    running: list[TrialState] = []
    seen: list[tuple[SweepState, float]] = []

    def look() -> None:
        state = replay(ledger.events)
        coming = epochs_to_come(space, state, dict.fromkeys(range(num_points), cost))
        seen.append((state, spent_epochs(state) + sum(map(sum, coming))))

    look()
    sweep.begin()
    look()
    while not sweep.is_over():
        while len(running) < at_once and (trial := sweep.next_trial()) is not None:
            sweep.start(trial)
            running.append(trial)
        trial = running.pop(chance.randrange(len(running)))
        metrics = {"val/top1": chance.random()}
        match trial.kind:
            case "short":
                end = trial.rung
            case "cooldown":
                end = trial.rung + max(1, round(0.2 * trial.rung * STEPS_PER_EPOCH)) / STEPS_PER_EPOCH
            case _:
                end = 9.0
        epoch = min(trial.epoch + 1, end) if trial.kind == "point" else end
        step = round(epoch * STEPS_PER_EPOCH)
        if is_diverging and chance.random() < 0.05:
            sweep.end(trial.name, "diverged", epoch=epoch, step=step, metrics={}, reason="diverged")
        else:
            verdict = sweep.report(trial.name, epoch, step, metrics)
            if verdict == "stop":
                sweep.end(trial.name, "stopped", epoch=epoch, step=step, metrics=metrics, reason="stopped")
            elif verdict == "wait":
                sweep.leave(trial.name, "waits")
            elif epoch == end:
                sweep.end(trial.name, "finished", epoch=epoch, step=step, metrics=metrics, reason="finished")
            else:
                running.append(trial)
        look()
    return seen


@pytest.mark.parametrize("scheduler", WAITING_RULES, ids=lambda scheduler: scheduler["kind"])
@pytest.mark.parametrize(("num_points", "at_once", "seeds"), [(27, 1, 1), (10, 4, 2), (1, 2, 3)])
def test_the_forecast_is_exact_from_the_first_event_to_the_last_where_verdicts_do_not_depend_on_the_order(
    scheduler: dict[str, Any], num_points: int, at_once: int, seeds: int
) -> None:
    seen = played(a_space(scheduler, num_points, seeds), at_once, seed=num_points)
    assert [total for _, total in seen] == pytest.approx([spent_epochs(seen[-1][0])] * len(seen))


@pytest.mark.parametrize(
    "scheduler",
    [*WAITING_RULES, ASHA, {"kind": "median"}, {"kind": "hyperband"}],
    ids=lambda scheduler: scheduler["kind"],
)
def test_the_forecast_ends_at_what_was_spent_and_is_never_below_it(scheduler: dict[str, Any]) -> None:
    seen = played(a_space(scheduler, 12, seeds=2), at_once=3, seed=5, is_diverging=True)
    assert all(total >= spent_epochs(state) for state, total in seen)
    assert seen[-1][1] == pytest.approx(spent_epochs(seen[-1][0]))


def test_the_forecast_of_asha_is_near_what_it_costs_in_the_long_run() -> None:
    seen = played(a_space(ASHA, 60), at_once=4, seed=1)
    assert seen[0][1] == pytest.approx(60 * 1 + 20 * 2 + 60 / 9 * 6)
    assert seen[0][1] == pytest.approx(spent_epochs(seen[-1][0]), rel=0.3)


def test_a_cooldown_costs_its_own_steps_and_a_rung_is_where_there_is_an_evaluation() -> None:
    space = a_space(ANNEALED, 27)
    cost = point_cost(space, 9.0, 31, 1)
    assert (cost.length, cost.rungs) == (9.0, (1.0, 3.0))
    assert cost.stages == pytest.approx((1 + 6 / 31, 2 + 19 / 31, 6))
    assert point_cost(space, 9.0, 31, 3).rungs == (3.0, 3.0)
    assert contenders(space, 28, 2) == [28, 10, 4]


def state_of(trials: int, reports: int, start_s: float, epoch_s: float) -> SweepState:
    """One trial after the other; each takes `start_s` before its first epoch."""
    now_s = 0.0
    events: list[Event] = [DriverStarted(time_s=0.0)]
    for number in range(trials):
        name = f"t{number:04d}"
        events += [
            TrialAdded(trial=name, number=number, seed_number=0, point={}, time_s=now_s),
            TrialStarted(trial=name, time_s=now_s),
        ]
        now_s += start_s
        for epoch in range(1, reports + 1):
            now_s += epoch_s
            events.append(TrialReported(trial=name, epoch=epoch, step=epoch, metrics={}, verdict="go on", time_s=now_s))
        events.append(
            TrialEnded(trial=name, outcome="finished", epoch=reports, step=reports, metrics={}, reason="", time_s=now_s)
        )
    return replay(events)


def test_the_time_of_a_start_is_not_taken_for_that_of_an_epoch() -> None:
    assert measured_speed(SweepState()) is None
    assert measured_speed(state_of(3, reports=4, start_s=20.0, epoch_s=2.0)) == Speed(2.0, 20.0)
    assert measured_speed(state_of(3, reports=1, start_s=20.0, epoch_s=2.0)) == Speed(22.0)


def test_the_time_left_counts_places_and_the_rungs_that_wait() -> None:
    fifo, annealed = a_space({"kind": "fifo"}, 5), a_space(ANNEALED, 5)
    speed = Speed(epoch_s=2.0, start_s=1.0)
    assert seconds_left(fifo, [[10.0] * 5], speed, at_once=4) == 2 * 21
    assert seconds_left(fifo, [[10.0, 0.0], [4.0]], speed, at_once=2) == 21
    assert seconds_left(annealed, [[10.0, 0.0], [4.0]], speed, at_once=2) == 21 + 9
    assert seconds_left(fifo, [[]], speed, at_once=0) == 0
