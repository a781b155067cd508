"""Encodes units as Ray tasks: back-pressure, bounded waits, lost tasks again, and an end in order.

On the cluster of RAY_ADDRESS (`ray job submit` sets it), else on a local Ray that lives as long as the conversion.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from data_prep.convert.part import part_path
from data_prep.convert.plan import Plan, WorkUnit
from data_prep.convert.progress import Progress
from data_prep.convert.run import EncodeUnits
from data_prep.convert.stop import StopFlag, Stopped
from data_prep.convert.tasks import encode_unit_task
from data_prep.convert.unit import UnitReport
from data_prep.errors import Fault, UserError
from data_prep.sources.base import Source

MAX_LOSSES = 3
"""Times one unit may be lost (worker or node died) before the conversion ends."""
STALL_LIMIT_S = 900.0
"""Longest time without a finished unit."""
POLL_S = 0.5


def encode_with_ray(workers: int | None, ray_address: str | None, progress: Progress, stop: StopFlag) -> EncodeUnits:
    """`workers`: tasks at a time; None: one per CPU. `ray_address`: a running cluster; None: start a local Ray."""

    def encode_units(
        source: Source, plan: Plan, units: Sequence[WorkUnit], folder: Path
    ) -> Generator[UnitReport, None, None]:
        if not units:
            return
        with _ray_session(workers, ray_address, progress, stop) as max_tasks:
            source_ref = ray.put(source)

            def submit(unit: WorkUnit) -> ray.ObjectRef:
                return encode_unit_task.remote(source_ref, unit, plan.settings, plan.digest, folder)

            for report in _run_tasks(units, submit, max_tasks, progress, stop):
                _check_visible(report, folder)
                yield report

    return encode_units


@contextmanager
def _ray_session(workers: int | None, address: str | None, progress: Progress, stop: StopFlag) -> Iterator[int]:
    """Yields the number of tasks to run at a time. Uses, and leaves alone, a Ray this process is connected to."""
    is_ours = not ray.is_initialized()
    if is_ours:
        progress.note(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
        try:
            _connect(workers, address)
        except SystemExit:  # what ray.init's own handler makes of a SIGTERM
            raise Stopped(signal.SIGTERM) from None
    try:
        stop.install()  # ray.init put its own handlers in place
        stop.check()
        num_cpus = int(ray.cluster_resources().get("CPU", 0))
        if num_cpus < 1:
            raise UserError("the Ray cluster has no CPUs to encode with; add a node that has some")
        if workers is not None and workers > num_cpus:
            progress.note(f"the Ray cluster has {num_cpus} CPUs: as many workers, not {workers}")
        yield min(workers or num_cpus, num_cpus)
    finally:
        if is_ours:
            ray.shutdown()


def _connect(workers: int | None, address: str | None) -> None:
    if address is None:
        num_cpus = workers or len(os.sched_getaffinity(0))
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}") from None


def _run_tasks(
    units: Sequence[WorkUnit],
    submit: Callable[[WorkUnit], ray.ObjectRef],
    max_tasks: int,
    progress: Progress,
    stop: StopFlag,
) -> Generator[UnitReport, None, None]:
    waiting = list(reversed(units))
    running: dict[ray.ObjectRef, WorkUnit] = {}
    losses: Counter[int] = Counter()
    last_finished_s = time.monotonic()
    try:
        while waiting or running:
            stop.check()
            while waiting and len(running) < max_tasks:
                unit = waiting.pop()
                running[submit(unit)] = unit
            ready, _ = ray.wait(list(running), timeout=POLL_S)
            if not ready:
                _check_stall(time.monotonic() - last_finished_s, len(running))
                continue
            last_finished_s = time.monotonic()
            unit = running.pop(ready[0])
            report = _result(ready[0], unit)
            if isinstance(report, UnitReport):
                yield report
                continue
            losses[unit.number] += 1
            if losses[unit.number] > MAX_LOSSES:
                raise Fault(f"samples {unit.start}..{unit.stop - 1} were lost {MAX_LOSSES + 1} times, last: {report}")
            progress.note(f"samples {unit.start}..{unit.stop - 1} were lost and are encoded again: {report}")
            waiting.append(unit)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def _result(ref: ray.ObjectRef, unit: WorkUnit) -> UnitReport | str:
    """The report, or why the task was lost with its worker or node. Fault when the task itself failed."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Fault):
            raise Fault(str(cause)) from None
        raise Fault(
            f"samples {unit.start}..{unit.stop - 1} cannot be encoded: {type(cause).__name__}: {cause}"
        ) from error
    except RayError as error:
        return str(error).strip().split("\n", 1)[0]


def _check_stall(stalled_s: float, num_running: int) -> None:
    if stalled_s > STALL_LIMIT_S:
        free, total = (int(get().get("CPU", 0)) for get in (ray.available_resources, ray.cluster_resources))
        raise Fault(
            f"no unit of {num_running} was finished in {stalled_s:.0f} s; of the cluster's {total} CPUs {free} are free"
        )


def _check_visible(report: UnitReport, folder: Path) -> None:
    if not report.bad and not part_path(folder, report.unit).exists():
        raise UserError(
            f"{folder}: a worker wrote there, but this machine does not see it; choose an --output on storage that all "
            "nodes of the cluster share"
        )
