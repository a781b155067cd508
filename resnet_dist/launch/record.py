"""The MLflow run of a run that this process drives: what the workers left unsent, and how the run ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.lease import HeldLease
from resnet_dist.launch.mlflow_description import Log, Undelivered, send_files, short, waits
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.connection import ServerUnavailable
from resnet_dist.tracking.mlflow_run import (
    Ending,
    EndStatus,
    RunEnd,
    RunHandle,
    end_status,
    record_end,
    send_end_status,
)
from resnet_dist.tracking.sync import sync

UNPUBLISHED = "finished; its model is not in MLflow yet"
_SYNC_LIMIT_S = 600.0


@dataclass
class MlflowRecord:
    """A run's MLflow run, held by its driver: sends what the workers left in the spool, and records the end.

    Data that MLflow does not accept stay in storage for `resnet-dist tracking sync`, and one warning says so.
    """

    handle: RunHandle
    lease: HeldLease
    class_names: Sequence[str]
    log: Log
    brief: bool = False
    """Whether only numbers are logged: no description, plots or lists of files. For trials of seconds."""
    ending: Ending = field(default_factory=Ending)
    reached: str = ""
    """What was reached, once the training is over and its model should be published."""
    is_published: bool = False
    _failure: Undelivered | None = None
    _is_unreachable: bool = False
    _is_measured: bool = False
    _is_reported: bool = False

    @classmethod
    @contextmanager
    def open(
        cls, handle: RunHandle, lease: HeldLease, class_names: Sequence[str], log: Log, *, brief: bool = False
    ) -> Iterator[MlflowRecord]:
        """Leaving the block writes the run's end, once, if this driver still holds the run."""
        record = cls(handle, lease, class_names, log, brief)
        with end_status(record._write_end) as record.ending:
            record.ending.end = RunEnd("FAILED", "nothing was trained")
            yield record

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
        """What to raise when a finished training cannot be published to MLflow: never that the training failed."""
        self._is_reported = True
        self._is_unreachable |= isinstance(why, ServerUnavailable)
        self.ending.end = RunEnd("FINISHED", f"{UNPUBLISHED}: {short(why)}")
        kind = UserError if isinstance(why, UserError) else Fault
        return kind(
            f"{self.reached} ({self.storage.location}), but MLflow does not have all of it: {short(why)}; "
            f"{waits(self.storage.location, self.handle.tracking_uri)}, or by the same command again"
        )

    def _write_end(self, status: EndStatus, reason: str) -> None:
        if not self.lease.is_ours():
            return  # the run is another driver's, and so is its end
        record_end(self.handle, status, reason)
        if not self.brief and not self._is_measured:
            self.send_measured()
        unsent = self._deliver(partial(send_end_status, self.handle))
        if self._is_reported:
            return  # the error that is being raised says what MLflow lacks
        if self.is_published and unsent is not None:
            raise self.unpublished(unsent) from unsent
        if self._failure is not None:
            self.log(f"warning: {short(self._failure)}; {waits(self.storage.location, self.handle.tracking_uri)}")

    def _deliver(self, *steps: Callable[[], object]) -> Undelivered | None:
        """Does them all, but asks an unreachable server only once. Returns the first failure."""
        first: Undelivered | None = None
        for step in steps:
            if self._is_unreachable:
                break
            try:
                step()
            except (Fault, UserError, OSError) as error:
                first = first or error
                self._is_unreachable = isinstance(error, ServerUnavailable)
        self._failure = self._failure or first
        return first
