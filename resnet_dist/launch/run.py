"""One run from its checks to its end: its lease, its events, its MLflow run.

    with Run.open(prepare(recipe, profile, name)) as run:
        run.begin(nodes)
        result = execute(run, on=ray_group)

Every training is such a block: `train`'s, a sweep's trials, a study's. Only leaving the block writes the run's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import Node
from resnet_dist.launch.control import Status
from resnet_dist.launch.lease import HeldLease, held
from resnet_dist.launch.mlflow_description import (
    Log,
    Undelivered,
    describe_in_mlflow,
    hardware_summary,
    open_mlflow_run,
    send_files,
    short,
    waits,
)
from resnet_dist.launch.preflight import Prepared, require_no_sweep, require_none_written
from resnet_dist.launch.progress import EventLog, ProgressReporter, Startup
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.connection import Unanswered
from resnet_dist.tracking.mlflow_run import RunEnd, RunHandle, record_end, send_end_status
from resnet_dist.tracking.sync import sync
from resnet_dist.training.context import WorkerResult

UNPUBLISHED = "finished; its model is not in MLflow yet"
_SYNC_LIMIT_S = 600.0
_UNEXPECTED = RunEnd("FAILED", "an unexpected error")


@dataclass
class Record:
    """The MLflow run of a run that this process drives; leaving its `with` block writes its end, once.

    Data that MLflow does not accept stay in storage for `resnet-dist tracking sync`, and one warning says so.
    """

    handle: RunHandle
    lease: HeldLease
    class_names: Sequence[str]
    log: Log
    brief: bool = False
    """Whether only numbers are logged: no description, plots or lists of files. For trials of seconds."""
    end: RunEnd = _UNEXPECTED
    """What will be written."""
    trained: str = ""
    """What was reached, once the training is over and its model should be published."""
    _failure: Undelivered | None = None
    _is_away: bool = False
    _is_measured: bool = False

    @property
    def storage(self) -> RunStorage:
        return self.handle.storage

    def send_measured(self) -> Undelivered | None:
        """Sends MLflow what the workers left, then plots, checkpoints and events; returns the error that stopped it, if
        any."""
        self._is_measured = True
        return self._deliver(
            partial(sync, self.storage, self.handle.tracking_uri, limit_s=_SYNC_LIMIT_S, with_end=False),
            partial(send_files, self.storage, self.handle, self.class_names),
        )

    def unpublished(self, why: Undelivered) -> Fault | UserError:
        """What to raise when a finished training cannot be brought to MLflow: never that the training failed."""
        self._is_away |= isinstance(why, Unanswered)
        self.end = RunEnd("FINISHED", f"{UNPUBLISHED}: {short(why)}")
        kind = UserError if isinstance(why, UserError) else Fault
        return kind(
            f"{self.trained} ({self.storage.location}), but MLflow does not have all of it: {short(why)}; "
            f"{waits(self.storage.location, self.handle.tracking_uri)}, or by the same command again"
        )

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.lease.is_ours():
            return  # the run is another driver's, and so is its end
        if error is not None and self.end.status != "FINISHED":
            self.end = _end_of(error)
        record_end(self.handle, self.end.status, self.end.reason)
        if not self.brief and not self._is_measured:
            self.send_measured()
        end_failure = self._deliver(partial(send_end_status, self.handle))
        if self.trained and error is not None:
            return  # the error says what MLflow lacks
        if self.trained and end_failure is not None:
            raise self.unpublished(end_failure) from end_failure
        if self._failure is not None:
            self.log(f"warning: {short(self._failure)}; {waits(self.storage.location, self.handle.tracking_uri)}")

    def _deliver(self, *steps: Callable[[], object]) -> Undelivered | None:
        """Does them all, but asks an unreachable server only once. Returns the first failure."""
        first: Undelivered | None = None
        for step in steps:
            if self._is_away:
                break
            try:
                step()
            except (Fault, UserError, OSError) as error:
                first = first or error
                self._is_away = isinstance(error, Unanswered)
        self._failure = self._failure or first
        return first


def _end_of(error: BaseException) -> RunEnd:
    if isinstance(error, KeyboardInterrupt):
        return RunEnd("KILLED", "interrupted")
    if isinstance(error, (UserError, Fault, OSError)):
        return RunEnd("FAILED", f"failed: {error}")
    return RunEnd("FAILED", f"{_UNEXPECTED.reason}: {type(error).__name__}")


@dataclass
class Run:
    """A run that this process drives."""

    prepared: Prepared
    lease: HeldLease
    progress: ProgressReporter
    events: EventLog
    startup: Startup | None = None
    parent_run_id: str | None = None
    brief: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    _until_end: ExitStack = field(default_factory=ExitStack)
    _record: Record | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        prepared: Prepared,
        *,
        parent_run_id: str | None = None,
        brief: bool = False,
        tags: Mapping[str, str] | None = None,
        startup: Startup | None = None,
    ) -> Iterator[Run]:
        """Takes the run's lease; its end is written and the lease released when the block is left.

        Args:
            prepared: the run's checks, passed.
            parent_run_id: the MLflow run of the sweep or study that this run belongs to.
            brief: see `Record.brief`.
            tags: more tags for the MLflow run.
            startup: a clock that started with the command; its line goes to the events.

        Raises UserError if another driver has the run, its folder is a sweep's, or none of its checkpoints is complete.
        """
        storage, progress = prepared.storage, ProgressReporter(prepared.plan)
        require_no_sweep(storage)
        if prepared.none_complete:
            require_none_written(storage, prepared.damaged)
        for warning in prepared.warnings:
            progress.log(f"warning: {warning}")
        with held(storage, prepared.profile.failure.driver_timeout_s, progress.log) as lease, ExitStack() as until_end:
            events = EventLog(storage, lease)
            yield cls(prepared, lease, progress, events, startup, parent_run_id, brief, tags or {}, until_end)

    def begin(self, nodes: Sequence[Node]) -> None:
        """Opens the MLflow run, or continues it, and describes there what will be trained on `nodes`. Raises Fault if
        MLflow does not respond: nothing has been started yet.
        """
        handle, code = open_mlflow_run(
            self.prepared, nodes, parent_run_id=self.parent_run_id, tags=self.tags, with_code=not self.brief
        )
        class_names = self.prepared.val.class_names
        self._record = self._until_end.enter_context(Record(handle, self.lease, class_names, self.log, self.brief))
        in_code = "" if self.brief else f", code {code.commit[:12] if code else 'not in git'}"
        self.events.note(f"driver began: {hardware_summary(nodes)}{in_code}")
        if not self.brief:
            describe_in_mlflow(handle, self.prepared, nodes, code, self.log)
        if self.startup is not None:
            self.startup.passed("MLflow")

    @property
    def record(self) -> Record:
        assert self._record is not None, "run.begin comes first"
        return self._record

    @property
    def storage(self) -> RunStorage:
        return self.prepared.storage

    def log(self, line: str) -> None:
        """One line for the user, on stderr."""
        self.progress.log(line)

    def observe(self, status: Status) -> None:
        """Shows the workers' progress, and records what is new. Call it often."""
        self.progress.show(status)
        self.events.observe(status)
        if self.startup is not None and (line := self.startup.observe(status)) is not None:
            self.events.note(line)

    def ends(self, result: WorkerResult, reason: str = "") -> None:
        """Sets how the run ended, unless something fails before its block is left."""
        match result.outcome:
            case "finished":
                self.record.end = RunEnd("FINISHED", reason or "finished")
            case "stopped":
                self.record.end = RunEnd("KILLED", reason or f"stopped after step {result.step}")
            case "diverged":
                self.record.end = RunEnd("FAILED", reason or "diverged")
