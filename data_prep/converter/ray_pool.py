"""Runs tasks on Ray, with back-pressure, bounded waits, resubmission of lost tasks and an orderly end.

On the cluster of RAY_ADDRESS (`ray job submit` sets it), else on a local Ray that ends with the pool.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from data_prep.converter.context import ItemT, JobT, Progress, ReportT
from data_prep.errors import Fault, Interrupted, UserError
from data_prep.runtime.ray_connection import connect, start_local
from data_prep.runtime.ray_errors import as_raised, explain
from data_prep.runtime.stop import StopFlag

MAX_LOSSES = 3
"""Times one task may be lost (worker or node died) before the conversion ends."""
STALL_LIMIT_S = 900.0
"""Longest time without a finished task."""
POLL_S = 0.5
TASKS_AHEAD = 2
"""Tasks submitted beyond those that can run, so that the next one need not wait for the driver. Only on a local Ray:
elsewhere an autoscaler might start a node for them."""


@ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
def _call(task: Callable[[Any, Any], Any], job: Any, item: Any) -> Any:
    return task(job, item)


class RayPool:
    """Connects when there is work to do; the end of the `with` block ends the connection, unless it existed before.

    Args:
        workers: tasks at a time; None: one per CPU of the cluster.
        address: of a running cluster; None: start a Ray on this machine.
    """

    def __init__(self, workers: int | None, address: str | None, progress: Progress, stop: StopFlag) -> None:
        self._workers = workers
        self._address = address
        self._progress = progress
        self._stop = stop
        self._cpus: ClusterCpus | None = None
        self._is_ours = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            ray.shutdown()
        self._cpus = None

    def run(
        self, task: Callable[[JobT, ItemT], ReportT], job: JobT, items: Iterator[ItemT | None]
    ) -> Generator[ReportT, None, None]:
        """See `context.Pool`. Fault when a task fails, is lost too often, or nothing is finished for too long."""
        first = next(items, None)
        if first is None:
            return
        items = chain([first], items)
        cpus = self._cpus = self._cpus or self._open()
        job_ref = ray.put(job)
        to_repeat: list[ItemT] = []
        running: dict[ray.ObjectRef, ItemT] = {}
        losses: Counter[str] = Counter()
        last_finished_s = time.monotonic()
        try:
            while True:
                self._stop.check()
                while (
                    len(running) < self._max_tasks(cpus.latest())
                    and (item := to_repeat.pop() if to_repeat else next(items, None)) is not None
                ):
                    running[_call.remote(task, job_ref, item)] = item
                if not running:
                    return
                ready, _ = ray.wait(list(running), timeout=POLL_S)
                if not ready:
                    _check_stall(time.monotonic() - last_finished_s, len(running), cpus.latest())
                    continue
                last_finished_s = time.monotonic()
                done = running.pop(ready[0])
                report = _result(ready[0], done)
                if not isinstance(report, _Lost):
                    yield report
                    continue
                losses[str(done)] += 1
                if losses[str(done)] > MAX_LOSSES:
                    raise Fault(f"{done} were lost {MAX_LOSSES + 1} times, last: {report}")
                self._progress.log(f"{done} were lost and are done again: {report}")
                to_repeat.append(done)
        finally:
            for ref in running:
                ray.cancel(ref, force=True)

    def _open(self) -> ClusterCpus:
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            where = f"connecting to Ray at {self._address}" if self._address else "starting Ray on this machine"
            self._progress.log(where)
            try:
                if self._address is None:
                    start_local(num_cpus=self._workers or len(os.sched_getaffinity(0)), dashboard=False)
                else:
                    connect(self._address, source="RAY_ADDRESS")
            except SystemExit:  # raised by ray.init's own handler of SIGTERM
                raise Interrupted(signal.SIGTERM) from None
        self._stop.install_again()
        self._stop.check()
        cpus = ClusterCpus()
        num_cpus = cpus.latest()
        if num_cpus < 1:
            self._progress.log(f"the Ray cluster has no CPUs yet: waiting for a node, {STALL_LIMIT_S:.0f} s at most")
        elif self._workers is not None and self._workers > num_cpus:
            self._progress.log(
                f"the Ray cluster has {num_cpus} CPUs: until it has more, as many workers, not {self._workers}"
            )
        return cpus

    def _max_tasks(self, num_cpus: int) -> int:
        """Tasks to submit at a time. An autoscaler starts nodes for those that cannot run yet."""
        at_a_time = self._workers or max(num_cpus, 1)
        return at_a_time + (TASKS_AHEAD if self._address is None and at_a_time >= num_cpus else 0)


class _Lost(str):
    """Why a task was lost with its worker or node."""


def _result(ref: ray.ObjectRef, item: object) -> Any:
    """The task's report, or `_Lost`. Fault or UserError when the task itself failed."""
    try:
        return ray.get(ref)
    except RayError as error:
        explained = explain(error)
        if explained.is_transient:
            return _Lost(explained.sentence)
        if isinstance(error, RayTaskError) and isinstance(error.cause, Fault | UserError):
            raise type(error.cause)(explained.sentence) from None
        raise as_raised(error, f"{item} cannot be converted") from error


def _check_stall(stalled_s: float, num_running: int, num_cpus: int) -> None:
    if stalled_s > STALL_LIMIT_S:
        raise Fault(
            f"no task of {num_running} was finished in {stalled_s:.0f} s; the Ray cluster had {num_cpus} CPUs when it "
            "last answered; add nodes or look into theirs, then run the same command again"
        )


# --- how many CPUs a cluster has, which changes as nodes come and go --------------------------------------------------


ASKED_EVERY_S = 5.0
FIRST_ANSWER_LIMIT_S = 30.0


class ClusterCpus:
    """Asks in a thread: Ray's call has no time limit, and a head that restarts responds late or not at all."""

    def __init__(self) -> None:
        """Waits for the first response, `FIRST_ANSWER_LIMIT_S` at most."""
        self._num_cpus = 0
        self._start_asking().join(FIRST_ANSWER_LIMIT_S)

    def latest(self) -> int:
        """The last known number of CPUs above 0; 0 if there was none. Does not wait."""
        if not self._thread.is_alive() and time.monotonic() - self._asked_s > ASKED_EVERY_S:
            self._start_asking()
        return self._num_cpus

    def _start_asking(self) -> threading.Thread:
        self._asked_s = time.monotonic()
        self._thread = threading.Thread(target=self._ask, daemon=True, name="cluster-cpus")
        self._thread.start()
        return self._thread

    def _ask(self) -> None:
        with suppress(Exception):  # many kinds of error when the head is gone: it is asked again later
            self._num_cpus = int(ray.cluster_resources().get("CPU", 0)) or self._num_cpus
