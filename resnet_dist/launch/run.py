"""One run from its checks to its end: its lease, its events, its MLflow run.

    with Run.open(prepare(recipe, profile, name)) as run:
        result = execute(run, on=ray_group)

Every training is such a block: `train`'s, a sweep's trials, a study's. Only leaving the block writes the run's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.code_version import read_code_version
from resnet_dist.data.checks import picture_settings
from resnet_dist.launch.cluster import ClusterNode
from resnet_dist.launch.control import WorkerStatus
from resnet_dist.launch.lease import HeldLease, held
from resnet_dist.launch.mlflow_description import describe_in_mlflow, hardware_summary, open_mlflow_run
from resnet_dist.launch.preflight import Prepared, require_trainable
from resnet_dist.launch.progress import EventLog, ProgressReporter, Startup
from resnet_dist.launch.record import MlflowRecord
from resnet_dist.launch.start import write_start
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.mlflow_run import RunEnd
from resnet_dist.training.context import WorkerResult


@dataclass
class Run:
    """A run that this process drives."""

    prepared: Prepared
    lease: HeldLease
    progress: ProgressReporter
    events: EventLog
    startup: Startup | None
    parent_run_id: str | None
    brief: bool
    tags: Mapping[str, str]
    _until_end: ExitStack
    _record: MlflowRecord | None = None

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
        """Takes the run's lease; leaving the block writes the run's end and releases the lease.

        Args:
            prepared: the run's checks, passed.
            parent_run_id: the MLflow run of the sweep or study that this run belongs to.
            brief: see `MlflowRecord.brief`.
            tags: more tags for the MLflow run.
            startup: a clock that started with the command; its line goes to the events.

        Raises UserError if another driver has the run, its folder is a sweep's, or none of its checkpoints is complete.
        """
        storage, progress = prepared.storage, ProgressReporter(prepared.plan)
        require_trainable(prepared)
        for warning in prepared.warnings:
            progress.log(f"warning: {warning}")
        with held(storage, prepared.profile.failure.driver_timeout_s, progress.log) as lease, ExitStack() as until_end:
            if prepared.start is not None and not prepared.has_begun:
                for line in prepared.start.lines:
                    progress.log(line)
                write_start(
                    prepared.recipe, prepared.profile, storage, prepared.identity, picture_settings(prepared.train)
                )
            yield cls(
                prepared=prepared,
                lease=lease,
                progress=progress,
                events=EventLog(storage, lease),
                startup=startup,
                parent_run_id=parent_run_id,
                brief=brief,
                tags=tags or {},
                _until_end=until_end,
            )

    def starts_on(self, nodes: Sequence[ClusterNode]) -> None:
        """Opens the MLflow run, or continues it, and describes there what will be trained on `nodes`.

        Called first by `in_process` and `ray_group`. Raises Fault if MLflow does not respond: nothing has started yet.
        """
        # Not in `open`: between the two a cluster is connected and found large enough, and a user's mistake that only
        # this shows (no such cluster, too few CPUs) leaves no failed run in MLflow.
        code = None if self.brief else read_code_version(Path(__file__).parents[2])
        tags = {**(self.prepared.start.tags if self.prepared.start else {}), **self.tags}
        handle = open_mlflow_run(self.prepared, nodes, code, parent_run_id=self.parent_run_id, tags=tags)
        class_names = self.prepared.val.class_names
        self._record = self._until_end.enter_context(
            MlflowRecord.open(handle, self.lease, class_names, self.log, brief=self.brief)
        )
        in_code = "" if self.brief else f", code {code.commit[:12] if code else 'not in git'}"
        self.events.note(f"driver began: {hardware_summary(nodes)}{in_code}")
        if not self.brief:
            describe_in_mlflow(handle, self.prepared, nodes, code, self.log)
        if self.startup is not None:
            self.startup.passed("MLflow")

    @property
    def record(self) -> MlflowRecord:
        assert self._record is not None, "the run has not been executed"
        return self._record

    @property
    def storage(self) -> RunStorage:
        return self.prepared.storage

    def log(self, line: str) -> None:
        """One line for the user, on stderr."""
        self.progress.log(line)

    def observe(self, status: WorkerStatus) -> None:
        """Shows the workers' progress, and records what is new. Call it once with each status."""
        self.progress.show(status)
        self.events.observe(status)
        if self.startup is not None and (line := self.startup.observe(status)) is not None:
            self.events.note(line)

    def ends(self, result: WorkerResult, reason: str = "") -> None:
        """Sets how the run ended, unless something fails before its block is left."""
        ending = self.record.ending
        match result.outcome:
            case "finished":
                ending.end = RunEnd("FINISHED", reason or finished(result.reason))
            case "stopped":
                ending.end = RunEnd("KILLED", reason or f"stopped after step {result.step}")
            case "diverged":
                ending.end = RunEnd("FAILED", reason or f"diverged: {result.reason}".removesuffix(": "))


def finished(early: str) -> str:
    """How a finished run ended, in words. `early`: why it ended before its last step; "" if it did not."""
    return f"finished early: {early}" if early else "finished"
