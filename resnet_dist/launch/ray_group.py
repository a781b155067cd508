"""Training on a Ray Train worker group: starts it, watches it, restarts it after faults, ends it."""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from data_prep.beton.files import write_text_atomically
from data_prep.runtime.ray_errors import explain, first_death, is_lost_process
from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault, UserError
from resnet_dist.gpus.device import collective_backend
from resnet_dist.launch.cluster import HeadWatch, alive_nodes, start_timeout_s, worker_capacity, worker_environment
from resnet_dist.launch.control import WorkerStatus, start_control
from resnet_dist.launch.execute import clear_leftovers
from resnet_dist.launch.ray_internals import (
    NO_RESERVATION,
    make_cleanup_ask_own_cluster,
    release,
    release_request,
)
from resnet_dist.launch.run import Run
from resnet_dist.launch.worker import WorkerSetup, prepare_worker, worker_main
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.locations import is_url, split
from resnet_dist.tracking.connection import server_credentials
from resnet_dist.training.checkpoint_manager import damaged_names, newest_step
from resnet_dist.training.context import Observer, WorkerResult

_POLL_EVERY_S = 0.5
_ANSWER_LIMIT_S = 5.0


def ray_group(run: Run, observer: Observer) -> WorkerResult:
    """Trains on the cluster that this process is connected to; for `execute`.

    Ray Train restarts lost workers itself. A new Ray trainer is needed when its controller died, and when a node of its
    workers is about to leave; in both cases it begins at the newest complete checkpoint.
    """
    profile, failure = run.prepared.profile, run.prepared.profile.failure
    run.starts_on(alive_nodes())
    release_request(run.lease.left_request)
    ray_trainers = RayTrainers(run, observer)
    lost_controllers = preemptions = 0
    while True:
        ended = ray_trainers.run_once()
        match ended:
            case WorkerResult():
                return ended
            case ControllerLost():
                lost_controllers += 1
                if lost_controllers > failure.max_controller_failures:
                    limit = f"failure.max_controller_failures allows {failure.max_controller_failures}"
                    raise Fault(f"{ended.why} ({lost_controllers} times; {limit})")
            case Preempted():
                preemptions += 1
                if failure.max_preemptions is not None and preemptions > failure.max_preemptions:
                    raise Fault(f"nodes left the run {preemptions} times (failure.max_preemptions)")
        run.log(ended.event)
        run.events.note(ended.event)
        wait_for_remaining_capacity(profile, observer.stop_requested)


@dataclass(frozen=True)
class ControllerLost:
    """Ray Train's controller, a process beside the driver, is gone, and the workers with it."""

    why: str

    @property
    def event(self) -> str:
        return f"{self.why}; another is started, from the last checkpoint"


@dataclass(frozen=True)
class Preempted:
    """A node of the workers is about to leave: they saved a checkpoint and ended."""

    step: int

    @property
    def event(self) -> str:
        return f"a node leaves: the workers saved a checkpoint after step {self.step} and start elsewhere"


class RayTrainers:
    """Runs one Ray Train trainer after another for the same run, and passes on what their workers report."""

    def __init__(self, run: Run, observer: Observer) -> None:
        self._run, self._observer = run, observer
        self._control = start_control()
        self._setup = _worker_setup(run, self._control)
        if self._setup.cache is not None:
            gigabytes = (run.prepared.train.beton_bytes + run.prepared.val.beton_bytes) / 1e9
            folder = self._setup.cache.folder
            run.log(f"each node first copies what it does not have yet of {gigabytes:.1f} GB to {folder}")
        self._number = 0
        self._reservation = NO_RESERVATION
        self._evaluated_step = 0
        self._seen_lines: tuple[str, ...] = ()
        """The lines of the last status."""
        self._metrics: Mapping[str, float] = {}
        """The last ones of the newest worker group that ended in order."""

    def run_once(self) -> WorkerResult | ControllerLost | Preempted:
        """Trains until the workers end, or their controller does. Raises UserError and Fault if the run must end."""
        run, profile = self._run, self._run.prepared.profile
        if self._observer.stop_requested():
            return self._stopped()
        damaged: Collection[str] = ()
        with suppress(OSError, Fault):  # if storage does not respond now, nothing counts as damaged
            damaged = damaged_names(run.storage) if self._number else run.prepared.damaged
        clear_leftovers(run.storage, profile.checkpoint.keep, damaged)
        self._number += 1
        ray_trainer = FitThread(build_ray_trainer(profile, run.storage, self._setup))
        with run.progress.live():
            self._watch(ray_trainer)
        if ray_trainer.is_running():
            return self._stopped()
        ended = ray_trainer.result(run.storage)
        if isinstance(ended, ControllerLost):
            release(self._reservation)
            return ended
        self._metrics = ended.metrics
        preempted = ended.outcome == "stopped" and not self._observer.stop_requested()
        return Preempted(ended.step) if preempted else ended

    def _stopped(self) -> WorkerResult:
        """The result of a stop while there are no workers."""
        return WorkerResult("stopped", newest_step(self._run.storage), self._metrics)

    def _watch(self, ray_trainer: FitThread) -> None:
        """Returns when the Ray trainer has ended, or should stop and has no workers yet.

        Raises UserError or Fault once it cannot succeed: a worker found so, the workers do not stop in time, the
        cluster's head does not respond, another driver has the run.
        """
        run, failure = self._run, self._run.prepared.profile.failure
        head = HeadWatch(failure.head_timeout_s)
        self._poll(stop=False)  # a new number cancels the stop of the Ray trainer before
        stop_by_s: float | None = None
        has_workers = False
        while ray_trainer.is_running(_POLL_EVERY_S):
            if stop_by_s is None and self._observer.stop_requested():
                stop_by_s = time.monotonic() + failure.stop_grace_s
                run.log("stopping: the workers save a checkpoint first (again to stop at once)")
            if stop_by_s is not None and not has_workers:
                return
            if stop_by_s is not None and time.monotonic() > stop_by_s:
                raise Fault(f"the workers did not stop within {failure.stop_grace_s:g} s (failure.stop_grace_s)")
            head.check()
            has_workers |= self._poll(stop=stop_by_s is not None)
            if run.lease.lost is not None:
                raise run.lease.lost
        self._poll(stop=False)

    def _poll(self, *, stop: bool) -> bool:
        """Exchanges with the actor: whether to stop, and what is new of the workers. Returns whether there are any.

        Raises UserError or Fault if a worker found that no restart would help.
        """
        try:
            status: WorkerStatus = ray.get(
                self._control.poll.remote(
                    self._number, stop=stop, evaluated_step=self._evaluated_step, seen=self._seen_lines
                ),
                timeout=_ANSWER_LIMIT_S,
            )
        except RayError:
            return False  # for example while it restarts
        self._seen_lines = status.lines
        if status.mistake is not None:
            raise UserError(status.mistake)
        if status.given_up is not None:
            raise Fault(status.given_up)
        self._run.observe(status)
        if status.resumed_step is not None:
            self._observer.progressed(status.step)
        if status.reservation not in (self._reservation, NO_RESERVATION):
            self._reservation = status.reservation
            self._run.lease.note_request(status.reservation.request)
        for step, metrics in status.evaluations:  # newer than `_evaluated_step`: none that a resumed run repeats
            self._evaluated_step = step
            self._observer.evaluated(step, metrics)
        return status.has_workers


def _worker_setup(run: Run, control: Any) -> WorkerSetup:
    prepared, profile = run.prepared, run.prepared.profile
    return WorkerSetup(
        job=prepared.job(),
        storage=run.storage,
        run_id=run.record.handle.run_id,
        tracking_uri=profile.tracking_uri,
        control=control,
        failure=profile.failure,
        lease=run.lease.token,
        gpus_per_worker=profile.gpus_per_worker,
        cache=prepared.node_cache,
        credentials=server_credentials(os.environ),
    )


class FitThread:
    """`TorchTrainer.fit()` in a separate thread, so that the main thread can handle signals and show progress."""

    def __init__(self, ray_trainer: TorchTrainer) -> None:
        self._result: ray.train.Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(ray_trainer,), name="ray-train-fit", daemon=True)
        self._thread.start()

    def _run(self, ray_trainer: TorchTrainer) -> None:
        try:
            self._result = ray_trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            self._error = error

    def is_running(self, wait_s: float = 0.0) -> bool:
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def result(self, storage: RunStorage) -> WorkerResult | ControllerLost:
        """Rank 0's result. Raises UserError or Fault with the cause; the full error goes to `failure.log`."""
        if self._error is not None:
            log = storage.folder / "failure.log"
            write_text_atomically(log, "".join(traceback.format_exception(self._error)))
            storage.upload(log)
            if is_lost_process(self._error):
                why = explain(self._error).sentence
                return ControllerLost(f"Ray Train's controller, a process beside the driver, died: {why}")
            if isinstance(self._error, ControllerError) and isinstance(self._error.controller_failure, Fault):
                raise self._error.controller_failure from None
            if isinstance(self._error, ControllerError) and isinstance(self._error.controller_failure, OSError):
                reason = explain(self._error.controller_failure).sentence
                return ControllerLost(f"Ray Train's controller could not write its bookkeeping: {reason}")
            raise Fault(f"training failed: {_cause(self._error)}; the log is {storage.location}/{log.name}") from None
        returned = self._result.return_value if self._result else None
        if isinstance(returned, str):
            raise UserError(returned)
        if not isinstance(returned, WorkerResult):
            raise Fault(f"training ended without a result: rank 0 returned {returned!r}")
        return returned


class WorkersLost(UserCallback):
    """Logs why a worker group ended, which Ray Train does not report while it may try again."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._control.warn.remote(f"a worker failed: {_of_ranks(worker_exceptions)}")


@dataclass
class CheckedTorchConfig(TorchConfig):
    """Ray Train's, but every worker's GPU is checked first: NCCL's error names neither the node nor the reason.

    Args:
        control: handle of the `RunControl` actor.
    """

    gpus_per_worker: int = 0
    control: Any = None

    @property
    def backend_cls(self) -> type:
        return _CheckedBackend


_TorchBackend: Any = TorchConfig().backend_cls


class _CheckedBackend(_TorchBackend):
    """Runs in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: CheckedTorchConfig) -> None:
        try:
            self._require_ready(worker_group, backend_config)
            super().on_start(worker_group, backend_config)
        except Exception:
            # Ray 2.60 leaves the placement group of a group that fails here, and the next one waits for its resources.
            with suppress(RayError):
                worker_group.shutdown()
            raise

    def _require_ready(self, worker_group: Any, backend_config: CheckedTorchConfig) -> None:
        """Raises Fault, which ends the run, before the run's first step: a user's mistake is one clear line then. Later
        raises WorkerGroupError, after which Ray starts another group, as often as `failure.max_failures` allows.
        """
        answers = worker_group.execute(prepare_worker, backend_config.gpus_per_worker)
        failures = {rank: Fault(problem) for rank, problem in enumerate(answers) if problem}
        if not failures:
            return
        problems = list(dict.fromkeys(map(str, failures.values())))  # GPUs of one node mostly have the same
        text = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else "")
        if not _has_begun(backend_config.control):
            raise Fault(text)
        backend_config.control.warn.remote(f"workers cannot start: {text}")
        raise WorkerGroupError(text, failures)


def _has_begun(control: Any) -> bool:
    with suppress(RayError):  # while it restarts: then Ray may try again
        return bool(ray.get(control.has_begun.remote(), timeout=_ANSWER_LIMIT_S))
    return True


def build_ray_trainer(profile: Profile, storage: RunStorage, setup: WorkerSetup) -> TorchTrainer:
    failure, workers = profile.failure, profile.workers
    folder, name, file_system = ray_storage(storage.location)
    use_gpu = profile.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": profile.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = profile.gpus_per_worker
    trainer = TorchTrainer(
        worker_main,
        train_loop_config={"setup": setup},
        torch_config=CheckedTorchConfig(
            backend=collective_backend(profile.gpus_per_worker),
            timeout_s=math.ceil(failure.collective_timeout_s),
            gpus_per_worker=profile.gpus_per_worker,
            control=setup.control,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min, workers.max) if workers.elastic else workers.min,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector=profile.node_labels or None,
            elastic_resize_monitor_interval_s=profile.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=file_system,
            failure_config=ray.train.FailureConfig(
                max_failures=failure.max_failures,
                max_preemption_failures=-1 if failure.max_preemptions is None else failure.max_preemptions,
                controller_failure_limit=max(1, math.ceil(failure.wait_for_resources_s / start_timeout_s(failure)) - 1),
            ),
            # Ray Train prunes what it was given to report: pruned by us, its own list would name folders that are gone.
            # `clear_leftovers` prunes what earlier Ray trainers left, of which this one knows nothing.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=profile.checkpoint.keep),
            callbacks=[WorkersLost(setup.control)],
            worker_runtime_env=worker_environment(profile),
        ),
    )
    make_cleanup_ask_own_cluster(trainer)
    return trainer


def wait_for_remaining_capacity(profile: Profile, stop_requested: Callable[[], bool]) -> None:
    """Waits until the nodes that stay have room for the fewest workers, `failure.wait_for_resources_s` at most. Also
    returns when the run should stop. Raises Fault at the limit.
    """
    limit_s = profile.failure.wait_for_resources_s
    deadline = time.monotonic() + limit_s
    while (room := worker_capacity(alive_nodes(), profile)) < profile.workers.min and not stop_requested():
        if time.monotonic() > deadline:
            raise Fault(
                f"the nodes that are left have room for {room} workers of {profile.workers}, and no more came for "
                f"{limit_s:g} s (failure.wait_for_resources_s); add nodes and run the same command again"
            )
        time.sleep(2 * _POLL_EVERY_S)


def _cause(error: BaseException) -> str:
    """The root cause: a worker's own exception, not its wrappers."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return _of_ranks(error.worker_failures)
    return explain(error).sentence


def _of_ranks(failures: Mapping[int, BaseException]) -> str:
    rank, death = first_death(failures)
    return f"rank {rank}: {death.sentence}"


def ray_storage(location: str) -> tuple[str, str, Any]:
    """`storage_path`, `name` and `storage_filesystem` of a RunConfig whose folder is `location`.

    Ray gets our S3 client, so that one set of credentials and one endpoint apply everywhere.
    """
    parent, name = split(location)
    if not is_url(location):
        return parent, name, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from resnet_dist.storage.objects import connect

    return parent.partition("://")[2], name, PyFileSystem(FSSpecHandler(connect()))
