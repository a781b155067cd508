"""The rules of early stopping compared with Ray Tune's own schedulers, on random sweeps."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, HyperBandScheduler, MedianStoppingRule
from ray.tune.schedulers.trial_scheduler import TrialScheduler

from resnet_dist.config.space import Asha, Halving, HyperBand, Median, SchedulerConfig, Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.ledger import Verdict
from resnet_dist.sweeps.prepare import require_judged_at_rungs
from resnet_dist.sweeps.scheduler import SchedulerEvent, decide, smoothed

EPOCHS = 18
VERDICTS: dict[str, Verdict] = {
    TrialScheduler.CONTINUE: "go on",
    TrialScheduler.NOOP: "go on",
    TrialScheduler.STOP: "stop",
    TrialScheduler.PAUSE: "wait",
}
RULES: list[Asha | Median | HyperBand] = [
    Asha(kind="asha"),
    Asha(kind="asha", first_rung=0.05, rungs=4, reduction_factor=2),
    Asha(kind="asha", first_rung=0.3, rungs=1, reduction_factor=2.5),
    Median(kind="median"),
    Median(kind="median", grace=0.5, min_trials=1),
    HyperBand(kind="hyperband"),
    HyperBand(kind="hyperband", reduction_factor=2),
    HyperBand(kind="hyperband", reduction_factor=4),
]


def tunes_scheduler(config: Asha | Median | HyperBand) -> TrialScheduler:
    common: dict[str, Any] = {"time_attr": "time", "metric": "score", "mode": "max"}
    match config:
        case Asha(first_rung=first, rungs=rungs, reduction_factor=factor):
            last = first * factor ** (rungs - 1)
            return AsyncHyperBandScheduler(
                **common,
                grace_period=first,
                reduction_factor=factor,
                max_t=last * factor**0.5,
                stop_last_trials=False,
            )
        case Median(grace=grace, min_trials=num):
            return MedianStoppingRule(
                **common, grace_period=grace, min_samples_required=num, min_time_slice=math.inf, hard_stop=True
            )
        case HyperBand(reduction_factor=factor):
            return HyperBandScheduler(**common, max_t=round(factor**2), reduction_factor=factor)


class FakeTrial:
    """The attributes of Tune's `Trial` that a scheduler reads."""

    is_saving = False

    def __init__(self, name: str) -> None:
        self.trial_id, self.status = name, Trial.PENDING


class TunesDecisions:
    """Tune's scheduler, and what it asks of Tune's controller."""

    def __init__(self, config: Asha | Median | HyperBand) -> None:
        self.scheduler, self.trials, self.stopped = tunes_scheduler(config), dict[str, FakeTrial](), list[str]()
        self.units = round(config.reduction_factor**2) if isinstance(config, HyperBand) else 1
        self.first = config.first_rung if isinstance(config, Asha) else 0.0

    def see(self, seen: SchedulerEvent) -> Verdict | None:
        if seen.kind == "added":
            self.trials[seen.trial] = FakeTrial(seen.trial)
            self.scheduler.on_trial_add(self, self.trials[seen.trial])
            return None
        trial = self.trials[seen.trial]
        if seen.kind == "reported":
            trial.status = Trial.RUNNING
            verdict = VERDICTS[self.scheduler.on_trial_result(self, trial, self.result(seen.share, seen.score))]
            trial.status = Trial.PAUSED if verdict == "wait" else Trial.RUNNING
            return verdict
        if trial.status != Trial.TERMINATED:
            trial.status = Trial.TERMINATED
            self.scheduler.on_trial_complete(self, trial, self.result(max(seen.share, self.first), seen.score))
        return None

    def resumable(self) -> set[str]:
        if not isinstance(self.scheduler, HyperBandScheduler):
            return set()
        brackets = [bracket for band in self.scheduler._hyperbands for bracket in band if bracket]
        return {trial.trial_id for bracket in brackets for trial in bracket.trials_to_unpause}

    def result(self, share: float, score: float) -> dict[str, Any]:
        return {"time": share * self.units, "score": score, "training_iteration": share * self.units}

    def get_live_trials(self) -> set[FakeTrial]:
        return {trial for trial in self.trials.values() if trial.status != Trial.TERMINATED}

    def stop_trial(self, trial: FakeTrial) -> None:
        self.scheduler.on_trial_remove(self, trial)
        trial.status = Trial.TERMINATED
        self.stopped.append(trial.trial_id)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_verdicts_are_those_of_tunes_scheduler(rule: SchedulerConfig) -> None:
    verdicts = set()
    for seed in range(15):
        verdicts |= play(rule, random.Random(seed))
    assert verdicts == {"go on", "stop"} | ({"wait"} if isinstance(rule, HyperBand) else set())


def play(rule: SchedulerConfig, draws: random.Random) -> set[Verdict]:
    """A sweep of up to 40 trials, four at a time, some of which diverge; checks every decision."""
    theirs, history, verdicts = TunesDecisions(rule), list[SchedulerEvent](), set[Verdict]()
    epochs: dict[str, int] = {}
    waiting, running, paused = [f"t{number}" for number in range(draws.randint(1, 40))], list[str](), set[str]()

    def see(seen: SchedulerEvent) -> Verdict | None:
        history.append(seen)
        return theirs.see(seen)

    for name in waiting:
        see(SchedulerEvent("added", name))
    for _ in range(40 * EPOCHS):
        while len(running) < 4 and (ready := [*sorted(paused & decide(rule, history).resumable), *waiting]):
            running.append(ready[0])
            paused.discard(ready[0])
            waiting = [name for name in waiting if name != ready[0]]
        if not running:
            break
        name = draws.choice(running)
        epochs[name] = epochs.get(name, 0) + draws.choice([1, 1, 1, 2])
        share, score = min(epochs[name] / EPOCHS, 1.0), round(draws.uniform(0, 100), draws.choice([0, 6]))
        if draws.random() < 0.03:
            see(SchedulerEvent("ended", name, share, score=0.0))
            running.remove(name)
            continue
        verdict, decision = see(SchedulerEvent("reported", name, share, score)), decide(rule, history)
        if share < 1:
            assert decision.verdict == verdict
            verdicts.add(decision.verdict)
        assert decision.resumable & paused == theirs.resumable() & paused
        assert set(theirs.stopped) <= set(decision.abandoned)
        paused -= set(theirs.stopped)
        if share == 1 or verdict == "stop":
            see(SchedulerEvent("ended", name, share, score))
        if share == 1 or verdict != "go on":
            running.remove(name)
        if verdict == "wait" and share < 1:
            paused.add(name)
    return verdicts


def test_hyperband_with_a_fractional_factor_lets_the_best_come_to_their_end() -> None:
    rule = HyperBand(kind="hyperband", reduction_factor=2.5)  # six units of time; rungs at 2 and 5 of them
    history = [SchedulerEvent("added", f"t{number}") for number in range(7)]
    for share, verdicts in ((2 / 6, ["wait", "wait", "wait", "go on"]), (5 / 6, ["go on", "go on"])):
        for number, verdict in zip(range(7 - len(verdicts), 7), verdicts, strict=True):
            history.append(SchedulerEvent("reported", f"t{number}", share, score=number))
            assert decide(rule, history).verdict == verdict
    assert decide(rule, history).abandoned == ["t3", "t4"]


def test_smoothed_scores_see_that_a_point_was_lucky() -> None:
    positions = [(x / 4, y / 4) for x in range(5) for y in range(5)]
    truth = [-10 * math.dist(position, (0.25, 0.5)) for position in positions]
    lucky = positions.index((1.0, 1.0))
    scores = [*truth[:lucky], 1.0, *truth[lucky + 1 :]]
    smooth = smoothed(positions, scores)
    assert max(scores) == scores[lucky]
    assert max(smooth) == smooth[positions.index((0.25, 0.5))]


def test_smoothed_scores_depend_neither_on_the_order_nor_on_points_that_diverged() -> None:
    rng = np.random.default_rng(0)
    positions, scores = rng.random((9, 2)).tolist(), rng.normal(size=9).tolist()
    smooth = smoothed(positions, scores)
    assert smoothed(positions[::-1], scores[::-1])[::-1] == pytest.approx(smooth)
    assert smoothed([*positions, [0.5, 0.5]], [*scores, -math.inf]) == [*smooth, -math.inf]
    assert smoothed([[0.1]], [-math.inf]) == [-math.inf]
    assert smoothed([[0.1]], [3.0]) == [3.0]


@pytest.mark.parametrize(("smooth", "kept"), [(False, {"t3"}), (True, {"t1"})])
def test_halving_judges_smoothed_scores_if_asked(smooth: bool, kept: set[str]) -> None:
    at = {"t0": (0.0, 5.0), "t1": (0.1, 8.0), "t2": (0.2, 7.0), "t3": (1.0, 8.5), "t4": (0.9, 1.0), "t5": (0.8, 0.0)}
    history = [SchedulerEvent("added", name, position=(place,)) for name, (place, _) in at.items()]
    history += [SchedulerEvent("judged", name, score=score) for name, (_, score) in at.items()]
    assert decide(Halving(kind="halving", rungs=(1, 9), reduction_factor=6, smooth=smooth), history).promoted == [kept]


def a_space(**scheduler: Any) -> Space:
    lr = {"optim.lr": {"kind": "uniform", "low": 1, "high": 2}}
    return Space.model_validate({"base": "b", "space": lr, "scheduler": scheduler, "trials": 16, "seeds": 2})


def test_rungs_without_an_evaluation_are_refused() -> None:
    """The scheduler judges at epoch 3, but the first evaluation is at epoch 5."""
    space = a_space(kind="asha", first_rung=0.11, rungs=2, reduction_factor=3)
    require_judged_at_rungs(space, epochs=24, eval_every_epochs=1)
    with pytest.raises(UserError, match=r"judges a trial at epoch 3 of 24, but eval\.every_epochs is 5 .* at epoch 5"):
        require_judged_at_rungs(space, epochs=24, eval_every_epochs=5)
    require_judged_at_rungs(a_space(kind="fifo"), epochs=24, eval_every_epochs=5)
    with pytest.raises(UserError, match="median"):
        require_judged_at_rungs(a_space(kind="median", grace=0.3), epochs=20, eval_every_epochs=5)
