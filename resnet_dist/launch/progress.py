"""A run's progress: lines and a bar on the terminal, `events.log`, and the times of the stages of a start."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise

from data_prep.beton.files import Unfit, append, open_regular
from data_prep.redaction import redacted
from resnet_dist.launch.control import WorkerStatus
from resnet_dist.launch.lease import HeldLease
from resnet_dist.launch.progress_bar import ProgressBar
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.system_metrics import process_began_s
from resnet_dist.training.schedule import RunPlan


def describe(status: WorkerStatus, plan: RunPlan) -> str:
    """One line: the run's progress and its newest metrics."""
    metrics = status.metrics
    parts = [f"epoch {plan.epoch_of(max(status.step - 1, 0)) + 1}/{-(-plan.last_step // plan.steps_per_epoch)}"]
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.4f}")
    if "val/top1" in metrics:
        parts.append(f"val top-1 {metrics['val/top1']:.2f} %")
    if "speed/images_per_s" in metrics:
        parts.append(f"{metrics['speed/images_per_s']:.0f} images/s")
    return ", ".join(parts)


class ProgressReporter:
    """Shows statuses as lines and a bar."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan, self._bar, self._last = plan, ProgressBar("step"), WorkerStatus()
        self.log = self._bar.log

    def live(self) -> AbstractContextManager[None]:
        return self._bar.live("waiting for workers")

    def show(self, status: WorkerStatus) -> None:
        """Call it once with each status; it prints what is new."""
        if status.attempt > self._last.attempt:
            again = "" if status.attempt == 1 else f" (attempt {status.attempt}: the workers were restarted)"
            self.log(f"{status.world_size} workers are up{again}")
        for line in status.lines:
            self.log(line)
        if status.step:
            self._bar.show(status.step, self._plan.last_step, describe(status, self._plan))
        self._last = status


_MAX_READ_BYTES = 1 << 20
_WORKERS = re.compile(r"^\S+ workers up: (\d+)")


class EventLog:
    """Appends to the run's `events.log`, which outlives the driver."""

    def __init__(self, storage: RunStorage, lease: HeldLease | None = None) -> None:
        """`lease`: of the driver that writes; a driver that has lost the run writes nothing more."""
        self._storage, self._lease = storage, lease
        self.path = storage.folder / "events.log"
        self._attempt = 0
        self._step = 0
        self._unwritten: list[str] = []

    def note(self, event: str) -> None:
        """One line, the time (UTC) before it."""
        if self._lease is not None and not self._lease.is_ours():
            return
        self._unwritten.append(
            f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {redacted(' '.join(event.split()))}\n"
        )
        try:
            append(self.path, "".join(self._unwritten))
            self._unwritten.clear()
            self._storage.upload(self.path)
        except OSError:
            return  # a full disk or an unreachable store must not end a run here; written with the next event

    def observe(self, status: WorkerStatus) -> None:
        """Call it once with each status; it records every worker group that began, and every line of its workers."""
        if status.attempt < self._attempt:  # the actor was killed, and counts from zero
            self._attempt = 0
        if status.attempt > self._attempt and status.resumed_step is not None:
            before = f" (last seen at step {self._step})" if self._attempt else ""
            self.note(f"workers up: {status.world_size}, from step {status.resumed_step}{before}")
            self._attempt = status.attempt
        if status.resumed_step is not None:
            self._step = status.step
        for line in status.lines:
            self.note(line)

    def read(self) -> str:
        """The newest megabyte of it."""
        try:
            with os.fdopen(open_regular(self.path, os.O_RDONLY), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_READ_BYTES))
                return file.read(_MAX_READ_BYTES).decode("utf-8", "replace")
        except (FileNotFoundError, Unfit):
            return ""


def count_events(log: str) -> dict[str, str]:
    """Tags of the run: how often its workers were restarted, and how often their number changed."""
    sizes = [int(match.group(1)) for line in log.splitlines() if (match := _WORKERS.match(line))]
    resizes = sum(before != after for before, after in pairwise(sizes))
    return {"restarts": str(max(len(sizes) - 1, 0)), "resizes": str(resizes)}


class Startup:
    """A clock that is read after every stage; the first stage begins with this process."""

    def __init__(self, clock: Callable[[], float] = time.time, began_s: float | None = None) -> None:
        """`clock` and `began_s`: Unix time, in seconds."""
        self._clock = clock
        self._began_s = self._passed_s = process_began_s() if began_s is None else began_s
        self._stages: list[str] = []
        self._seen = 0
        """How many of the three stages in statuses have passed: workers up, ready, first steps done."""

    def passed(self, stage: str) -> None:
        """`stage` ends now, the next one begins."""
        now_s = self._clock()
        self._stages.append(f"{stage} {now_s - self._passed_s:.1f}")
        self._passed_s = now_s

    def observe(self, status: WorkerStatus) -> str | None:
        """Call it with every status, often for accuracy. Returns the complete line once it is known."""
        if self._seen == 0 and status.attempt:
            self.passed("workers")
            self._seen = 1
        if self._seen == 1 and status.resumed_step is not None:
            self.passed("data and model")
            self._seen = 2
        if self._seen == 2 and status.resumed_step is not None and status.step > status.resumed_step:
            steps = status.step - status.resumed_step
            self.passed("first step" if steps == 1 else f"first {steps} steps")
            self._seen = 3
            return f"start-up took {self._passed_s - self._began_s:.1f} s: {', '.join(self._stages)}"
        return None
