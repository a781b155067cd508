"""The ledger of a sweep: its events, the file with one line for each, and the state that follows from them.

It is the sweep's only memory, so a sweep can be killed at any moment: the next driver reads it from the top and knows
which trials have ended, which resume, and what the search has seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.beton.files import open_regular, read_small
from data_prep.strict_json import parse
from resnet_dist.config.records import MAX_RECORD_BYTES, read_record
from resnet_dist.config.space import Space
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import SWEEP_LEDGER
from resnet_dist.sweeps.points import Point

TrialOutcome = Literal["finished", "stopped", "diverged", "failed"]
"""stopped: early, by the scheduler. failed: its retries are used up."""
Verdict = Literal["go on", "stop", "wait"]
"""The answer to an evaluation. wait: save, release the resources, and perhaps resume later."""
TrialKind = Literal["point", "short", "cooldown"]
"""point: the whole schedule, whose end is the point's score. short: a whole schedule of fewer epochs. cooldown: a fork
of the point's first run in which the rate goes to zero."""


@dataclass(frozen=True, kw_only=True)
class Began:
    """The first event: what is searched, on which data. Times are Unix seconds."""

    name: str
    sweep_hash: str
    space: Mapping[str, Any]
    base: Mapping[str, Any]
    """The base recipe's file as read."""
    num_proxy_samples: int
    num_base_samples: int | None
    data_digest: str
    first_points: Sequence[Mapping[str, Any]]
    """Tried before all others: the space's, and what a warm start brought."""
    known: Sequence[tuple[Mapping[str, Any], float]]
    """Points and scores of earlier sweeps over the same proxy; a model starts with them."""
    time_s: float
    class_names: Sequence[str] = ()
    """The data's, by label; empty in ledgers of versions that did not keep them."""
    tried: Sequence[Mapping[str, Any]] = ()
    """Points of earlier sweeps whose trials would be the same runs: they are not trained again."""


@dataclass(frozen=True, kw_only=True)
class DriverStarted:
    """The command was run: no trial of an earlier driver runs any more."""

    time_s: float


@dataclass(frozen=True, kw_only=True)
class TrialAdded:
    trial: str
    number: int
    """The point's."""
    seed_number: int
    point: Mapping[str, Any]
    time_s: float
    kind: TrialKind = "point"
    rung: float = 0.0
    """Epochs of a short schedule, or those after which a cooldown forks."""


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    trial: str
    time_s: float


@dataclass(frozen=True, kw_only=True)
class TrialReported:
    """One evaluation, and the scheduler's verdict."""

    trial: str
    epoch: float
    step: int
    metrics: Mapping[str, float]
    verdict: Verdict
    time_s: float


@dataclass(frozen=True, kw_only=True)
class TrialLeft:
    """The trial stopped computing but is not over: it will resume from its checkpoint."""

    trial: str
    why: str
    time_s: float
    is_fault: bool = False
    """Whether it counts as one of the trial's failures."""
    is_saved: bool = True
    """False: its last checkpoint is before its last report."""


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    trial: str
    outcome: TrialOutcome
    epoch: float
    step: int
    metrics: Mapping[str, float]
    reason: str
    time_s: float
    run_id: str = ""
    """MLflow's."""


Event = Began | DriverStarted | TrialAdded | TrialStarted | TrialReported | TrialLeft | TrialEnded
_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (Began, DriverStarted, TrialAdded, TrialStarted, TrialReported, TrialLeft, TrialEnded)
}


def encode(event: Event) -> bytes:
    return json.dumps({"event": type(event).__name__, **asdict(event)}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Event:
    """Raises ValueError for a line that is not an event."""
    fields = parse(line, max_bytes=MAX_RECORD_BYTES, allow_nan=True)
    kind = _KINDS.get(str(fields.get("event"))) if isinstance(fields, dict) else None
    if kind is None:
        raise ValueError("is not an event of a sweep")
    return read_record(kind, line)


MAX_LEDGER_BYTES = 1 << 30


def ledger_file(sweep_dir: Path) -> Path:
    """One line for each event, appended and never changed."""
    return sweep_dir / SWEEP_LEDGER


def read_ledger(sweep_dir: Path) -> list[Event]:
    """See `read_events`."""
    return read_events(ledger_file(sweep_dir))


def read_events(path: Path) -> list[Event]:
    """All events of a ledger's file; a last line without its end, which is being written, is left out.

    Raises UserError without a ledger, Fault for a damaged line.
    """
    try:
        data = read_small(path, MAX_LEDGER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a sweep, <storage>/<sweep's name>") from None
    events = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            events.append(decode(line))
        except ValueError as error:
            raise Fault(f"{path}: line {number} is damaged ({error}); fix or remove that line") from None
    return events


class Ledger:
    """A sweep's events, in memory only; `open_ledger` opens one with a file."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events = list(events)

    def append(self, event: Event) -> None:
        self.events.append(event)


class _FileLedger(Ledger):
    def __init__(self, descriptor: int, events: Iterable[Event]) -> None:
        super().__init__(events)
        self._descriptor = descriptor

    def append(self, event: Event) -> None:
        """On return the event survives a power cut."""
        line = encode(event)
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
        super().append(event)


@contextmanager
def open_ledger(sweep_dir: Path) -> Iterator[Ledger]:
    """Opens the ledger for its one driver. A line that a killed driver left unfinished is cut off.

    Raises UserError while another driver has it.
    """
    path = ledger_file(sweep_dir)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{sweep_dir}: another command is running this sweep; wait for it, or stop it") from None
        data = read_small(path, MAX_LEDGER_BYTES)
        if not data.endswith(b"\n"):
            os.ftruncate(descriptor, data.rfind(b"\n") + 1)
        yield _FileLedger(descriptor, read_ledger(sweep_dir))
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


TrialStatus = Literal["waiting", "running", "paused", "finished", "stopped", "diverged", "failed"]
"""waiting: to start, or to resume from a checkpoint. paused: until the scheduler resumes or ends it."""


@dataclass
class TrialState:
    name: str
    number: int
    seed_number: int
    point: Point
    kind: TrialKind = "point"
    rung: float = 0.0
    """See `TrialAdded`."""
    status: TrialStatus = "waiting"
    reports: list[TrialReported] = field(default_factory=list)
    """By ascending epoch, each once."""
    end: TrialEnded | None = None
    num_faults: int = 0
    seconds: float = 0.0
    """Time of computing, over all its starts."""
    last_fault: str = ""
    verdict: Verdict = "go on"
    """The newest; the trial may not have acted on it yet."""

    @property
    def epoch(self) -> float:
        """How far it has come, by its newest report."""
        return self.end.epoch if self.end else (self.reports[-1].epoch if self.reports else 0.0)

    @property
    def spent_epochs(self) -> float:
        """Epochs that it trained itself: those before a cooldown's fork are its trunk's."""
        return max(self.epoch - self.rung, 0.0) if self.kind == "cooldown" else self.epoch

    @property
    def stage(self) -> tuple[bool, float]:
        """Orders a point's trials: those of its rungs, then its whole run."""
        return self.kind == "point", self.rung

    @property
    def is_first_run(self) -> bool:
        """Whether it is the run that decides about its point."""
        return self.kind == "point" and self.seed_number == 0

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
    """Seconds in which drivers worked, from each one's start to its last event, without the newest driver."""
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
                self._stop_all()
                self.num_drivers += 1
                self._driver_s = event.time_s
            case TrialAdded():
                self.trials[event.trial] = TrialState(
                    event.trial, event.number, event.seed_number, dict(event.point), event.kind, event.rung
                )
            case TrialStarted():
                self.trials[event.trial].status, self.trials[event.trial].verdict = "running", "go on"
                self._started_s[event.trial] = event.time_s
            case TrialReported():
                reports = self.trials[event.trial].reports
                self.trials[event.trial].verdict = event.verdict
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
        """Seconds in which drivers worked, this one included."""
        return self.wall_s + max(now_s - self._driver_s, 0.0)

    def trial_seconds_until(self, now_s: float) -> float:
        """Seconds of computing, summed over all trials, running ones included."""
        running = sum(max(now_s - started_s, 0.0) for started_s in self._started_s.values())
        return sum(trial.seconds for trial in self.trials.values()) + running

    def _left(self, event: TrialLeft) -> None:
        trial = self.trials[event.trial]
        trial.status = "paused" if trial.verdict == "wait" and event.is_saved else "waiting"
        trial.seconds += event.time_s - self._started_s.pop(event.trial, event.time_s)
        if event.is_fault:
            trial.num_faults += 1
            trial.last_fault = event.why

    def _stop_all(self) -> None:
        """No trial runs any more: the driver that started them is gone."""
        if self.num_drivers:
            self.wall_s += max(self.last_s - self._driver_s, 0.0)
        for name, started_s in self._started_s.items():
            trial = self.trials[name]
            trial.seconds += max(self.last_s - started_s, 0.0)
            if trial.status == "running":
                trial.status = "paused" if trial.verdict == "wait" else "waiting"
        self._started_s.clear()


def replay(events: Iterable[Event]) -> SweepState:
    state = SweepState()
    for event in events:
        state.apply(event)
    return state


def trial_name(number: int, seed_number: int = 0, kind: TrialKind = "point", rung: float = 0.0) -> str:
    """`t0007`; `t0007-s1` for the second seed of the same point, `t0007-e3` for a short schedule of 3 epochs,
    `t0007-c3` for a cooldown after 3 epochs.
    """
    match kind:
        case "short":
            return f"t{number:04d}-e{rung:g}"
        case "cooldown":
            return f"t{number:04d}-c{rung:g}"
    return f"t{number:04d}" + (f"-s{seed_number}" if seed_number else "")


def final_score(space: Space, end: TrialEnded) -> float:
    """The worst score for a trial that diverged or failed, however well it did before."""
    return space.worst_score if end.outcome in ("diverged", "failed") else space.score(end.metrics)


def spent_epochs(state: SweepState) -> float:
    return sum(trial.spent_epochs for trial in state.trials.values())


def saved_epochs(state: SweepState, epochs_per_trial: float) -> float:
    """Epochs that the points that were stopped early, or lost at a rung of short schedules, did not train."""
    spent: dict[int, float] = defaultdict(float)
    farthest: dict[int, float] = defaultdict(float)
    for trial in state.trials.values():
        spent[trial.number] += trial.spent_epochs
        farthest[trial.number] = max(farthest[trial.number], trial.rung if trial.kind == "short" else epochs_per_trial)
    stopped = {trial.number for trial in state.trials.values() if trial.status == "stopped"}
    # A rung of short schedules starts the next one's the moment it decides.
    lost = {number for number, epochs in farthest.items() if epochs < max(farthest.values())}
    return sum(epochs_per_trial - spent[number] for number in stopped | lost)


def summary(state: SweepState, epochs_per_trial: float) -> dict[str, float]:
    counts = dict.fromkeys(("finished", "stopped", "diverged", "failed"), 0.0)
    for trial in state.trials.values():
        if trial.status in counts:
            counts[trial.status] += 1
    return {
        **counts,
        "trials": float(len(state.trials)),
        "epochs_spent": spent_epochs(state),
        "epochs_saved": saved_epochs(state, epochs_per_trial),
        "wall_hours": state.wall_until(state.last_s) / 3600,
        "trial_hours": sum(trial.seconds for trial in state.trials.values()) / 3600,
    }
