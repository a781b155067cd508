"""A sweep's decisions: what to train next, whether a trial continues, when the sweep is over. No Ray, no training.

Each decision follows from the ledger and is written there before it is acted upon, so a new `Sweep` over the ledger of
a killed driver decides as that driver would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Protocol

from resnet_dist.config.space import Annealed, Halving, Record, Space
from resnet_dist.sweeps.ledger import (
    DriverStarted,
    Event,
    Ledger,
    SweepState,
    TrialAdded,
    TrialEnded,
    TrialKind,
    TrialLeft,
    TrialOutcome,
    TrialReported,
    TrialStarted,
    TrialState,
    Verdict,
    final_score,
    spent_epochs,
    trial_name,
)
from resnet_dist.sweeps.points import Point, PointKey, position, random_point
from resnet_dist.sweeps.racing import next_round, scores_by_seed
from resnet_dist.sweeps.scheduler import Decision, SchedulerEvent, decide

PROPOSALS = 5
"""How often the searcher may propose points that were tried before a random one takes their place."""
_DRAWS = 500
"""How many random points are tried before a space counts as exhausted."""


class Searcher(Protocol):
    """Proposes points one by one, as `searcher.OptunaSearcher` does."""

    def suggest(self, events: Sequence[Event], num_refused: int = 0) -> Point:
        """The next point to try: a function of the ledger's events and `num_refused` alone.

        `num_refused` is the number of proposals before this one, all refused because their point had been tried.
        """


class Sweep:
    """
    Args:
        space: what is searched, and how.
        ledger: what has happened so far; decisions are appended.
        planned: all points, or None if `searcher` proposes them.
        total_epochs: the length of a point's schedule, in epochs.
        now_s: the clock, in Unix seconds.
        key: equal for points that are the same run.
    """

    def __init__(
        self,
        space: Space,
        ledger: Ledger,
        *,
        planned: Sequence[Point] | None,
        total_epochs: Callable[[Point], float],
        searcher: Searcher | None = None,
        now_s: Callable[[], float],
        key: PointKey = repr,
    ) -> None:
        self.space, self.state = space, SweepState()
        self._ledger, self._planned, self._searcher = ledger, planned, searcher
        self._total_epochs, self._now_s, self._key = total_epochs, now_s, key
        self._is_exhausted = False
        self._lengths: dict[int, float] = {}
        """Epochs of each point's schedule."""
        self._history: list[SchedulerEvent] = []
        self._decided: tuple[int, SchedulerEvent | None, Decision] = (0, None, Decision())
        """The newest decision, after how many events, and the last of them."""
        for event in ledger.events:
            self._apply(event)

    def begin(self, is_saved: Callable[[TrialState], bool] = lambda trial: True) -> None:
        """Starts a driver, and completes what a killed one left undone.

        Args:
            is_saved: whether a trial that waits has the checkpoint of its last report.
        """
        last = next((event for event in reversed(self._ledger.events) if not isinstance(event, DriverStarted)), None)
        self._write(DriverStarted(time_s=self._now_s()))
        # Planned points are added at once: a rule that halves needs its trials together.
        scheduler, known = self.space.scheduler, {trial.number for trial in self.state.trials.values()}
        for number, point in enumerate(self._planned or ()):
            if number in known:
                continue
            if isinstance(scheduler, Halving):
                self._add(number, point, kind="short", rung=scheduler.rungs[0])
            else:
                self._add(number, point)
        for trial in list(self.state.trials.values()):
            if trial.verdict == "stop" and trial.end is None:
                self._end_early(trial)
            elif trial.status == "finished" and trial.is_first_run:
                self._add_seeds(trial)
            elif trial.status == "paused" and isinstance(scheduler, Annealed | Record) and not is_saved(trial):
                self.leave(trial.name, "has no checkpoint to fork or to resume from", is_saved=False)
        self._add_due(list(self.state.trials.values()))
        self._end_abandoned()
        self._race(was_cut=isinstance(last, TrialAdded))

    def next_trial(self) -> TrialState | None:
        """The trial to start now, if there is one. A trial that was started before comes before a new one."""
        if self.budget_spent():
            return None
        trials = self.state.trials.values()
        waiting = [trial for trial in trials if trial.status == "waiting" and self._can_start(trial)]
        if paused := [trial for trial in trials if trial.status == "paused"]:
            resumable = self._decision().resumable
            waiting += [trial for trial in paused if trial.name in resumable]
        if waiting:
            # Cooldowns first: trials wait for them.
            return min(waiting, key=lambda t: (t.kind != "cooldown", not t.reports, t.seed_number, t.number))
        number = sum(trial.is_first_run for trial in trials)
        if self._searcher is not None and number < self.num_points:
            tried = {self._key(trial.point) for trial in trials if trial.is_first_run}
            earlier = {self._key(dict(point)) for point in self.state.began.tried} if self.state.began else set()
            candidates = self._candidates(len(tried))
            point = next((point for point in candidates if self._key(point) not in tried | earlier), None)
            if point is not None:
                return self._add(number, point)
            self._is_exhausted = True
            if self._race():
                return self.next_trial()
        if any(trial.status == "running" for trial in trials):
            return None
        # The scheduler waits for trials that will never come, so the one that has come farthest resumes.
        return max(paused, key=lambda trial: trial.epoch, default=None)

    def start(self, trial: TrialState) -> None:
        self._write(TrialStarted(trial=trial.name, time_s=self._now_s()))

    def report(self, trial: str, epoch: float, step: int, metrics: Mapping[str, float]) -> Verdict:
        """The verdict on a running trial after an evaluation. At the end of its schedule it is always "go on".

        A trial that was killed between its report and its checkpoint evaluates again, and gets the same verdict again.
        """
        known = self.state.trials[trial]
        event = TrialReported(
            trial=trial, epoch=epoch, step=step, metrics=_finite(metrics), verdict="go on", time_s=self._now_s()
        )
        if known.reports and epoch <= known.reports[-1].epoch:
            last = known.reports[-1]
            if last.verdict != "wait" or epoch < last.epoch or trial in self._decision().resumable:
                return known.verdict
            event = last  # it died before its checkpoint, and is where it waits again
        elif known.is_first_run and epoch < self._lengths[known.number]:
            verdict = self._decision(self._scheduler_event(event)).verdict
            event = event if verdict == "go on" else replace(event, verdict=verdict)
        self._write(event)
        self._add_due([known])
        self._end_abandoned()
        return event.verdict

    def end(
        self,
        trial: str,
        outcome: TrialOutcome,
        *,
        epoch: float,
        step: int,
        metrics: Mapping[str, float],
        reason: str,
        run_id: str = "",
    ) -> None:
        """The trial is over. A point that reached its end gets its further seeds, and the last trial begins a race."""
        self._write(
            TrialEnded(
                trial=trial,
                outcome=outcome,
                epoch=epoch,
                step=step,
                metrics=_finite(metrics),
                reason=reason,
                time_s=self._now_s(),
                run_id=run_id,
            )
        )
        known = self.state.trials[trial]
        if outcome == "finished" and known.is_first_run:
            self._add_seeds(known)
        self._add_due([known])
        self._end_abandoned()
        self._race()

    def leave(self, trial: str, why: str, *, is_fault: bool = False, is_saved: bool = True) -> None:
        """The trial has stopped computing but is not over.

        Args:
            is_saved: whether its last report has its checkpoint.
        """
        self._write(TrialLeft(trial=trial, why=why, time_s=self._now_s(), is_fault=is_fault, is_saved=is_saved))

    def budget_spent(self) -> str | None:
        """Which limit of the budget is reached, or None."""
        budget, now_s = self.space.budget, self._now_s()
        wall_hours = self.state.wall_until(now_s) / 3600
        if budget.wall_hours is not None and wall_hours >= budget.wall_hours:
            return f"budget.wall_hours: {budget.wall_hours:g} spent"
        if budget.trial_hours is not None and self.state.trial_seconds_until(now_s) / 3600 >= budget.trial_hours:
            return f"budget.trial_hours: {budget.trial_hours:g} spent"
        if budget.epochs is not None and (epochs := spent_epochs(self.state)) >= budget.epochs:
            return f"budget.epochs: {epochs:g} of {budget.epochs:g} spent"
        return None

    @property
    def num_points(self) -> int:
        """How many points the sweep will try, those that are still to be proposed included."""
        if self._planned is not None:
            return len(self._planned)
        tried = sum(trial.is_first_run for trial in self.state.trials.values())
        return tried if self._is_exhausted else (self.space.trials or 0)

    def is_over(self) -> bool:
        """Nothing is left to do."""
        return self._are_over(self.state.trials.values())

    def _are_over(self, trials: Collection[TrialState]) -> bool:
        points = {trial.number for trial in trials}
        return len(points) >= self.num_points and all(trial.end is not None for trial in trials)

    def _candidates(self, num_tried: int) -> Iterator[Point]:
        """Points to try next, in order of preference; the caller skips those that were tried.

        The same recipe ends in the same bits, so to train it twice would teach nothing.
        """
        assert self._searcher is not None
        searcher, events = self._searcher, self._ledger.events
        return chain(
            (dict(point) for point in self.space.first_points),
            (searcher.suggest(events, num_refused) for num_refused in range(PROPOSALS)),
            (random_point(self.space, num_tried, index) for index in range(_DRAWS)),
        )

    def _can_start(self, trial: TrialState) -> bool:
        """A cooldown needs the checkpoint with which its trunk waits."""
        return trial.kind != "cooldown" or self.state.trials[trial_name(trial.number)].status == "paused"

    def _add(
        self, number: int, point: Point, *, seed_number: int = 0, kind: TrialKind = "point", rung: float = 0.0
    ) -> TrialState:
        name = trial_name(number, seed_number, kind, rung)
        if name not in self.state.trials:
            self._write(
                TrialAdded(
                    trial=name,
                    number=number,
                    seed_number=seed_number,
                    point=point,
                    kind=kind,
                    rung=rung,
                    time_s=self._now_s(),
                )
            )
        return self.state.trials[name]

    def _add_seeds(self, first: TrialState) -> None:
        for seed_number in range(1, self.space.seeds):
            self._add(first.number, first.point, seed_number=seed_number)

    def _race(self, *, was_cut: bool = False) -> bool:
        """Adds the race's next round if nothing else is left to do. Whether there is one.

        Args:
            was_cut: a driver was killed after it had added trials, which may be some of a round. None of them has
                started, so the round is worked out without them.
        """
        first_of_race = self.space.seeds if was_cut else math.inf
        trials = [t for t in self.state.trials.values() if t.end is not None or t.seed_number < first_of_race]
        if self.space.race is None or not self._are_over(trials):
            return False
        due = next_round(self.space.race, scores_by_seed(self.space, trials))
        for number, seed_number in due:
            self._add(number, self.state.trials[trial_name(number)].point, seed_number=seed_number)
        return bool(due)

    def _add_due(self, changed: Iterable[TrialState]) -> None:
        """Adds the cooldowns and the short schedules that are due by what has happened.

        Args:
            changed: trials to which something has happened.
        """
        scheduler, trials = self.space.scheduler, self.state.trials
        match scheduler:
            case Annealed() | Record():
                for trunk in (trial for trial in changed if trial.is_first_run):
                    if trunk.verdict == "wait":
                        self._add(trunk.number, trunk.point, kind="cooldown", rung=trunk.reports[-1].epoch)
                    for epochs in scheduler.shorts if isinstance(scheduler, Record) else ():
                        self._add(trunk.number, trunk.point, kind="short", rung=epochs)
                    if trunk.end is not None:
                        forks = [t for t in trials.values() if t.kind == "cooldown" and t.number == trunk.number]
                        for fork in (fork for fork in forks if fork.status == "waiting"):
                            reason = f"{trunk.name} has ended"
                            self.end(fork.name, "failed", epoch=0, step=0, metrics={}, reason=reason)
            case Halving(rungs=rungs):
                points = {trial_name(trial.number): trial for trial in trials.values() if trial.rung == rungs[0]}
                for epochs, promoted in zip(rungs[1:], self._decision().promoted, strict=True):
                    kind: TrialKind = "point" if epochs == rungs[-1] else "short"
                    for first in sorted((points[name] for name in promoted), key=lambda trial: trial.number):
                        self._add(first.number, first.point, kind=kind, rung=0.0 if kind == "point" else epochs)

    def _end_abandoned(self) -> None:
        if any(trial.status == "paused" for trial in self.state.trials.values()):
            for name in self._decision().abandoned:
                if self.state.trials[name].status == "paused":
                    self._end_early(self.state.trials[name])

    def _end_early(self, trial: TrialState) -> None:
        last, reason = trial.reports[-1], stopped_at(trial)
        self.end(trial.name, "stopped", epoch=last.epoch, step=last.step, metrics=last.metrics, reason=reason)

    def _decision(self, *now: SchedulerEvent) -> Decision:
        num, last = len(self._history) + len(now), next(reversed((*self._history[-1:], *now)), None)
        if self._decided[:2] != (num, last):  # asked several times for each event
            self._decided = num, last, decide(self.space.scheduler, [*self._history, *now])
        return self._decided[2]

    def _write(self, event: Event) -> None:
        self._ledger.append(event)
        self._apply(event)

    def _apply(self, event: Event) -> None:
        self.state.apply(event)
        if not isinstance(event, TrialAdded | TrialReported | TrialEnded):
            return
        trial = self.state.trials[event.trial]
        if isinstance(event, TrialAdded):
            if trial.number not in self._lengths:
                self._lengths[trial.number] = self._total_epochs(trial.point)
                at = position(self.space, trial.point)
                self._history.append(SchedulerEvent("added", trial_name(trial.number), position=at))
        elif trial.is_first_run:
            self._history.append(self._scheduler_event(event))
        elif isinstance(event, TrialEnded) and self._is_judged_by(trial):
            is_dead = event.outcome in ("diverged", "failed")
            judged = replace(self._scheduler_event(event), kind="judged", trial=trial_name(trial.number))
            self._history.append(replace(judged, score=-math.inf) if is_dead else judged)

    def _is_judged_by(self, trial: TrialState) -> bool:
        """Whether the trial's score decides if its point continues."""
        return trial.kind == "cooldown" or (trial.kind == "short" and isinstance(self.space.scheduler, Halving))

    def _scheduler_event(self, event: TrialReported | TrialEnded) -> SchedulerEvent:
        share = event.epoch / self._lengths[self.state.trials[event.trial].number]
        sign = 1 if self.space.higher_is_better else -1
        if isinstance(event, TrialEnded):
            return SchedulerEvent("ended", event.trial, share, sign * final_score(self.space, event))
        return SchedulerEvent("reported", event.trial, share, sign * self.space.score(event.metrics))


def stopped_at(trial: TrialState) -> str:
    return f"stopped early at epoch {trial.epoch:g}"


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
