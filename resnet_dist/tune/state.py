"""Where a sweep stands: its ledger read from the top. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from resnet_dist.tune.events import (
    Began,
    DriverStarted,
    Event,
    TrialAdded,
    TrialEnded,
    TrialLeft,
    TrialReported,
    TrialStarted,
    Verdict,
)
from resnet_dist.tune.points import Point

Status = Literal["waiting", "running", "paused", "finished", "stopped", "diverged", "failed"]
"""waiting: to begin, or to go on from a checkpoint. paused: until the scheduler says more."""
ENDED: tuple[Status, ...] = ("finished", "stopped", "diverged", "failed")


@dataclass
class TrialState:
    name: str
    number: int
    seed_number: int
    point: Point
    status: Status = "waiting"
    reports: list[TrialReported] = field(default_factory=list)
    """By ascending epoch, each once."""
    end: TrialEnded | None = None
    num_faults: int = 0
    seconds: float = 0.0
    """Computing, over all its starts."""
    last_fault: str = ""
    told: Verdict = "go on"
    """What the scheduler last said to it; it may not have acted on it yet."""

    @property
    def epoch(self) -> float:
        """How far it came, as far as it said."""
        return self.end.epoch if self.end else (self.reports[-1].epoch if self.reports else 0.0)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The newest."""
        if self.end and self.end.metrics:
            return self.end.metrics
        return self.reports[-1].metrics if self.reports else {}


@dataclass
class SweepState:
    began: Began | None = None
    trials: dict[str, TrialState] = field(default_factory=dict)
    """In the order in which they were added."""
    wall_s: float = 0.0
    """Time that drivers were at work, from each one's start to its last event."""
    num_drivers: int = 0
    _driver_s: float = 0.0
    last_s: float = 0.0
    """When the newest event happened."""
    _started_s: dict[str, float] = field(default_factory=dict)

    def apply(self, event: Event) -> None:
        match event:
            case Began():
                self.began = event
            case DriverStarted():
                self._rest()
                self.num_drivers += 1
                self._driver_s = event.time_s
            case TrialAdded():
                point = dict(event.point)
                self.trials[event.trial] = TrialState(event.trial, event.number, event.seed_number, point)
            case TrialStarted():
                self.trials[event.trial].status, self.trials[event.trial].told = "running", "go on"
                self._started_s[event.trial] = event.time_s
            case TrialReported():
                reports = self.trials[event.trial].reports
                self.trials[event.trial].told = event.verdict
                if not reports or event.epoch > reports[-1].epoch:
                    reports.append(event)
            case TrialLeft():
                self._left(event)
            case TrialEnded():
                trial = self.trials[event.trial]
                trial.end, trial.status = event, event.outcome
                trial.seconds += event.time_s - self._started_s.pop(event.trial, event.time_s)
        self.last_s = max(self.last_s, event.time_s)

    def wall_until(self, now_s: float) -> float:
        """Seconds that drivers were at work, this one included."""
        return self.wall_s + max(now_s - self._driver_s, 0.0)

    def trial_seconds_until(self, now_s: float) -> float:
        """Seconds that trials were computing, summed over them, those that run included."""
        running = sum(max(now_s - started_s, 0.0) for started_s in self._started_s.values())
        return sum(trial.seconds for trial in self.trials.values()) + running

    def _left(self, event: TrialLeft) -> None:
        trial = self.trials[event.trial]
        trial.status = "paused" if trial.told == "wait" else "waiting"
        trial.seconds += event.time_s - self._started_s.pop(event.trial, event.time_s)
        if event.is_fault:
            trial.num_faults += 1
            trial.last_fault = event.why

    def _rest(self) -> None:
        """Nothing runs any more: the driver that started it has gone."""
        if self.num_drivers:
            self.wall_s += max(self.last_s - self._driver_s, 0.0)
        for name, started_s in self._started_s.items():
            trial = self.trials[name]
            trial.seconds += max(self.last_s - started_s, 0.0)
            if trial.status == "running":
                trial.status = "paused" if trial.told == "wait" else "waiting"
        self._started_s.clear()


def replay(events: Iterable[Event]) -> SweepState:
    state = SweepState()
    for event in events:
        state.apply(event)
    return state


def trial_name(number: int, seed_number: int) -> str:
    """`t0007`, `t0007-s1` for the second seed of the same point."""
    return f"t{number:04d}" + (f"-s{seed_number}" if seed_number else "")


def spent_epochs(state: SweepState) -> float:
    return sum(trial.epoch for trial in state.trials.values())
