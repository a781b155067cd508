"""A sweep's decisions: what to train next, whether a trial goes on, when it is all over. No Ray, no clock, no training.

Everything is written to the ledger before it is acted upon, and everything it knows it has from the ledger: a new
`Sweep` over the ledger of a killed one decides as that one would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from resnet_dist.config.space import Space
from resnet_dist.sweeps.ledger import (
    DriverStarted,
    Event,
    Outcome,
    SweepState,
    TrialAdded,
    TrialEnded,
    TrialLeft,
    TrialReported,
    TrialStarted,
    TrialState,
    Verdict,
    spent_epochs,
    trial_name,
)
from resnet_dist.sweeps.points import Point, PointKey, random_point
from resnet_dist.sweeps.ranking import score_of, worst_score

_MOST_REPEATS = 5
"""Times that the model may propose what was tried before a random point takes its place."""
_MOST_DRAWS = 500
"""Random points that are looked at before a space counts as exhausted."""


class Scheduler(Protocol):
    """Ends trials early. `launch.sweep.tune_scheduler` has Ray Tune's."""

    def add(self, trial: str) -> None: ...

    def start(self, trial: str) -> None: ...

    def report(self, trial: str, share: float, score: float) -> Verdict:
        """`share`: of the trial's own schedule that is done."""

    def end(self, trial: str, share: float, score: float) -> None: ...

    def resumable(self) -> list[str]:
        """Trials that were told to wait and may go on now."""

    def abandoned(self) -> list[str]:
        """Trials that were told to wait and are not worth going on."""


class Searcher(Protocol):
    """Proposes points from what was seen. `launch.sweep.tune_search` has Ray Tune's."""

    def propose(self, trial: str, known: Point | None = None) -> Point:
        """`known`: the point to take, because it was proposed for this trial before or is chosen by others.

        Another call for a trial whose proposal was ended is a new proposal.
        """

    def report(self, trial: str, epoch: float, score: float) -> None: ...

    def end(self, trial: str, outcome: Outcome, score: float) -> None: ...


class Writer(Protocol):
    """`ledger.Ledger`, or a list in a test."""

    def append(self, event: Event) -> None: ...


class Sweep:
    def __init__(
        self,
        space: Space,
        events: Sequence[Event],
        writer: Writer,
        *,
        planned: Sequence[Point] | None,
        total_epochs: Callable[[Point], float],
        scheduler: Scheduler,
        searcher: Searcher | None,
        now_s: Callable[[], float],
        key: PointKey = repr,
    ) -> None:
        """`events`: the ledger so far. `planned`: all points, or None if `searcher` proposes them. `key`: equal for
        points that are the same run."""
        self.space, self.state = space, SweepState()
        self._writer, self._scheduler, self._searcher = writer, scheduler, searcher
        self._planned, self._total_epochs, self._now_s, self._key = planned, total_epochs, now_s, key
        self._is_exhausted = False
        for event in events:
            self._learn(event)
            self.state.apply(event)

    def begin(self, event: DriverStarted) -> None:
        """A new driver takes over: what a killed one left undone is done."""
        self._write(event)
        self._add_planned()
        self._settle()

    def _add_planned(self) -> None:
        """All points that are known before anything was seen; a bracket of HyperBand needs its trials together."""
        for number, point in enumerate(self._planned or ()):
            if trial_name(number, 0) not in self.state.trials:
                self._add(number, 0, point)

    def next_trial(self) -> TrialState | None:
        """What to start now, or None: nothing, or nothing yet. A trial that was begun comes before a new one."""
        if self.spent_too_much():
            return None
        trials = self.state.trials.values()
        waiting = [trial for trial in trials if trial.status == "waiting"]
        resumable = set(self._scheduler.resumable())
        waiting += [trial for trial in trials if trial.status == "paused" and trial.name in resumable]
        if waiting:
            return min(waiting, key=lambda trial: (not trial.reports, trial.seed_number, trial.number))
        number = sum(trial.seed_number == 0 for trial in trials)
        if self._searcher is not None and number < self.num_points:
            point = self._new_point(self._searcher, trial_name(number, 0))
            if point is not None:
                return self._add(number, 0, point)
        if any(trial.status == "running" for trial in trials):
            return None
        # A scheduler that waits for trials that will never come.
        paused = [trial for trial in trials if trial.status == "paused"]
        return max(paused, key=lambda trial: trial.epoch, default=None)

    def start(self, trial: TrialState) -> None:
        self._note(TrialStarted(trial.name, self._now_s()))

    def report(self, trial: str, epoch: float, step: int, metrics: Mapping[str, float]) -> Verdict:
        """One evaluation of a running trial; whether it goes on. At the end of its schedule it always does."""
        known, finite = self.state.trials[trial], _finite(metrics)
        if known.reports and epoch <= known.reports[-1].epoch:
            return known.told
        share = epoch / self._total_epochs(known.point)
        verdict: Verdict = "go on"
        if known.seed_number == 0:
            verdict = self._scheduler.report(trial, share, score_of(self.space, finite))
        if share >= 1:
            verdict = "go on"
        event = TrialReported(trial, epoch, step, finite, verdict, self._now_s())
        self._tell_searcher(event)
        self._write(event)
        self._end_abandoned()
        return verdict

    def end(
        self,
        trial: str,
        outcome: Outcome,
        epoch: float,
        step: int,
        metrics: Mapping[str, float],
        reason: str,
        run_id: str,
    ) -> None:
        self._note(TrialEnded(trial, outcome, epoch, step, _finite(metrics), reason, self._now_s(), run_id))
        known = self.state.trials[trial]
        if outcome == "finished" and known.seed_number == 0:
            self._add_seeds(known)
        self._end_abandoned()

    def leave(self, trial: str, why: str, *, is_fault: bool = False) -> None:
        """The trial computes no more but is not over."""
        self._note(TrialLeft(trial, why, self._now_s(), is_fault))

    def _settle(self) -> None:
        """What a killed driver left undone: trials told to stop end, finished points get their further seeds."""
        for trial in list(self.state.trials.values()):
            if trial.told == "stop" and trial.end is None:
                self.end(
                    trial.name, "stopped", trial.epoch, trial.reports[-1].step, trial.metrics, stopped_at(trial), ""
                )
            elif trial.status == "finished" and trial.seed_number == 0:
                self._add_seeds(trial)

    def spent_too_much(self) -> str | None:
        """Which limit of the budget is reached, or None."""
        budget = self.space.budget
        hours, epochs = self.state.wall_until(self._now_s()) / 3600, spent_epochs(self.state)
        if budget.wall_hours is not None and hours >= budget.wall_hours:
            return f"budget.wall_hours: {budget.wall_hours:g} spent"
        trial_hours = self.state.trial_seconds_until(self._now_s()) / 3600
        if budget.trial_hours is not None and trial_hours >= budget.trial_hours:
            return f"budget.trial_hours: {budget.trial_hours:g} spent"
        if budget.epochs is not None and epochs >= budget.epochs:
            return f"budget.epochs: {epochs:g} of {budget.epochs:g} spent"
        return None

    @property
    def num_points(self) -> int:
        """That the sweep is to try, those that are still to be proposed among them."""
        if self._planned is not None:
            return len(self._planned)
        tried = sum(trial.seed_number == 0 for trial in self.state.trials.values())
        return tried if self._is_exhausted else (self.space.trials or 0)

    def is_over(self) -> bool:
        """Nothing is left to do."""
        points = {trial.number for trial in self.state.trials.values()}
        return len(points) >= self.num_points and all(trial.end is not None for trial in self.state.trials.values())

    def _new_point(self, searcher: Searcher, trial: str) -> Point | None:
        """A point that was not tried yet, the model's if it finds one; None if the space seems to hold no more.

        A run of one recipe ends in the same bits. So the model gets the score of a point that it proposes again at
        once, and nothing is trained.
        """
        tried = {self._key(dict(known.point)): known for known in self.state.trials.values() if not known.seed_number}
        for _ in range(_MOST_REPEATS):
            point = searcher.propose(trial)
            known = tried.get(self._key(point))
            if known is None:
                return point
            is_scored = known.end is not None and known.status != "failed"
            searcher.end(trial, "finished" if is_scored else "failed", self._score_at_end(known))
        for index in range(_MOST_DRAWS):
            point = random_point(self.space, len(tried), index)
            if self._key(point) not in tried:
                return searcher.propose(trial, point)
        self._is_exhausted = True
        return None

    def _score_at_end(self, trial: TrialState) -> float:
        return worst_score(self.space) if trial.end is None else self._end_score(trial.end)

    def _add(self, number: int, seed_number: int, point: Point) -> TrialState:
        name = trial_name(number, seed_number)
        if seed_number == 0:
            self._scheduler.add(name)
        self._write(TrialAdded(name, number, seed_number, point, self._now_s()))
        return self.state.trials[name]

    def _add_seeds(self, first: TrialState) -> None:
        for seed_number in range(1, self.space.seeds):
            if trial_name(first.number, seed_number) not in self.state.trials:
                self._add(first.number, seed_number, first.point)

    def _end_abandoned(self) -> None:
        for name in self._scheduler.abandoned():
            trial = self.state.trials[name]
            if trial.status == "paused":
                self.end(name, "stopped", trial.epoch, trial.reports[-1].step, trial.metrics, stopped_at(trial), "")

    def _note(self, event: Event) -> None:
        self._write(event)
        self._tell_scheduler(event)
        self._tell_searcher(event)

    def _write(self, event: Event) -> None:
        self._writer.append(event)
        self.state.apply(event)

    def _learn(self, event: Event) -> None:
        """An event of an earlier driver: scheduler and searcher go through what they went through then."""
        if isinstance(event, TrialAdded) and event.seed_number == 0:
            self._scheduler.add(event.trial)
            if self._searcher is not None:
                self._searcher.propose(event.trial, dict(event.point))
        self._tell_scheduler(event)
        self._tell_searcher(event)

    def _tell_scheduler(self, event: Event) -> None:
        if not isinstance(event, TrialStarted | TrialReported | TrialEnded):
            return
        if self.state.trials[event.trial].seed_number:
            return
        if isinstance(event, TrialStarted):
            self._scheduler.start(event.trial)
            return
        share = event.epoch / self._total_epochs(self.state.trials[event.trial].point)
        if isinstance(event, TrialReported):
            self._scheduler.report(event.trial, share, score_of(self.space, event.metrics))
            self._scheduler.abandoned()
        else:
            self._scheduler.end(event.trial, share, self._end_score(event))

    def _tell_searcher(self, event: Event) -> None:
        if self._searcher is None or not isinstance(event, TrialReported | TrialEnded):
            return
        if self.state.trials[event.trial].seed_number:
            return
        if isinstance(event, TrialReported):
            self._searcher.report(event.trial, event.epoch, score_of(self.space, event.metrics))
        else:
            self._searcher.end(event.trial, event.outcome, self._end_score(event))

    def _end_score(self, event: TrialEnded) -> float:
        if event.outcome in ("diverged", "failed"):
            return worst_score(self.space)
        return score_of(self.space, event.metrics)


def stopped_at(trial: TrialState) -> str:
    return f"stopped early at epoch {trial.epoch:g}"


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
