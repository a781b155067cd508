"""The driver of a run: checks, connects, opens the MLflow run, lets Ray Train work, hands over the model.

`train` is the one driver function; a trial of a sweep is the same call with two more overrides. It can be killed at any
moment and called again with the same arguments: what is done is not done again.
"""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import alive_nodes, cluster_address, ray_session, require_capacity
from resnet_dist.launch.control import Status, start_control
from resnet_dist.launch.doctor import RAY_SNAPSHOT
from resnet_dist.launch.hand_over import hand_over
from resnet_dist.launch.node_cache import node_cache
from resnet_dist.launch.preflight import prepare
from resnet_dist.launch.ray_context import WorkerSetup, worker_main
from resnet_dist.launch.ray_storage import ray_storage
from resnet_dist.launch.record import Record, begin_record
from resnet_dist.launch.result import RunResult, read_result, write_result
from resnet_dist.launch.screen import Screen
from resnet_dist.launch.signals import StopSignal, stop_signals
from resnet_dist.storage.base import TEMPORARY, RunStorage
from resnet_dist.tracking.mlflow_run import EndStatus, end_run
from resnet_dist.tracking.transport import client_environment, server_credentials
from resnet_dist.training.checkpoint import newest_first, newest_whole
from resnet_dist.training.job import Job, WorkerResult

_SHOW_EVERY_S = 0.5


@dataclass(frozen=True)
class Stopped:
    """The user stopped the run; a checkpoint of `step` lies in storage, the same command goes on from there."""

    exit_code: int
    step: int
    run_dir: str
    """Path or URL."""


def train(recipe: Recipe, profile: Profile, name: str, *, parent_run_id: str | None = None) -> RunResult | Stopped:
    """Trains `recipe` on `profile`'s hardware under `name`, or goes on where that name stands.

    `parent_run_id`: the MLflow run of the sweep whose trial this is (`tracking.sweep_run.open_sweep`).
    Paths in `profile` are absolute. Raises UserError before any worker starts, Fault when there is no result.
    """
    prepared = prepare(recipe, profile, name)
    if (done := read_result(prepared.storage)) is not None:
        return done
    screen = Screen(prepared.plan)
    for warning in prepared.warnings:
        screen.say(f"warning: {warning}; the checkpoint before it is used")
    with ray_session(profile):
        nodes = alive_nodes()
        require_capacity(nodes, profile)
        with stop_signals() as stop:
            record = begin_record(recipe, profile, name, prepared, nodes, screen.say, parent_run_id)
            status: EndStatus = "FAILED"
            reason = "an unexpected error"
            try:
                result = train_and_record(recipe, profile, record, screen, stop)
                if result.outcome == "stopped":
                    status, reason = "KILLED", f"stopped after step {result.step}"
                    return Stopped(stop.exit_code, result.step, prepared.storage.location)
                if result.outcome == "diverged":
                    raise Fault(
                        f"the training loss is not a number any more after step {result.step} of "
                        f"{prepared.storage.location}; "
                        "lower optim.lr or lengthen schedule.warmup, and give another --name"
                    )
                finished = hand_over(recipe, profile, name, record, result)
                status, reason = "FINISHED", "finished"
            except KeyboardInterrupt:
                status, reason = "KILLED", "interrupted"
                raise
            except (UserError, Fault) as error:
                reason = f"failed: {error}"
                raise
            finally:
                end_run(record.handle, status, reason)
    write_result(prepared.storage, finished)
    return finished


def train_and_record(
    recipe: Recipe,
    profile: Profile,
    record: Record,
    screen: Screen,
    stop: StopSignal,
    observe: Callable[[Status], None] = lambda status: None,
) -> WorkerResult:
    """Lets the workers train to the end or to a stop, and sends what came of it to MLflow; connected to Ray.

    `observe` is called about twice a second with where the run stands, and may set `stop`.
    """
    try:
        result = _train_on_ray(recipe, profile, record, screen, stop, observe)
    except (UserError, Fault) as error:
        record.end(f"failed: {error}")
        raise
    record.end(f"{result.outcome} after step {result.step}")
    return result


def _train_on_ray(
    recipe: Recipe,
    profile: Profile,
    record: Record,
    screen: Screen,
    stop: StopSignal,
    observe: Callable[[Status], None],
) -> WorkerResult:
    """Runs the workers to the end or to a stop, showing where they stand."""
    prepared, handle = record.prepared, record.handle
    _clear_bookkeeping(prepared.storage, profile.checkpoint.keep)
    control = start_control()
    job = Job(
        recipe=recipe,
        plan=prepared.plan,
        identity=prepared.identity,
        train_beton=prepared.train_beton,
        val_beton=prepared.val_beton,
        loader_threads=profile.cpus_per_worker,
        recompute_activations=profile.recompute_activations,
    )
    setup = WorkerSetup(
        job,
        prepared.storage,
        handle.run_id,
        profile.tracking_uri,
        control,
        progress_timeout_s=profile.failure.progress_timeout_s,
        save_every_s=60 * profile.checkpoint.every_minutes if profile.checkpoint.every_minutes else None,
        heeds_preemption=cluster_address(profile, os.environ) is not None,
        credentials=server_credentials(os.environ),
        cache=node_cache(profile, (prepared.train_source, prepared.val_source)),
    )
    if setup.cache is not None:
        gigabytes = (prepared.train.beton_bytes + prepared.val.beton_bytes) / 1e9
        screen.say(f"each node copies what it lacks of {gigabytes:.1f} GB to {setup.cache.folder} first")
    fit = _Fit(_trainer(profile, prepared.storage, setup))
    asked_at: float | None = None

    def watch(status: Status) -> None:
        screen.show(status)
        record.events.observe(status)
        observe(status)

    with screen.live():
        while fit.is_running(_SHOW_EVERY_S):
            if stop.number is not None and asked_at is None:
                asked_at = time.monotonic()
                screen.say("stopping: the workers save a checkpoint first (once more to stop at once)")
                control.request_stop.remote()
            if asked_at is not None and time.monotonic() - asked_at > profile.failure.stop_grace_s:
                raise Fault(
                    f"the workers did not stop within {profile.failure.stop_grace_s:g} s (failure.stop_grace_s)"
                )
            watch(_status(control))
        watch(_status(control))
    return fit.result(prepared.storage)


def _trainer(profile: Profile, storage: RunStorage, setup: WorkerSetup) -> TorchTrainer:
    failure, workers = profile.failure, profile.workers
    folder, name, file_system = ray_storage(storage.location)
    use_gpu = profile.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": profile.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = profile.gpus_per_worker
    return TorchTrainer(
        worker_main,
        train_loop_config={"setup": setup},
        # Counts and the stop flag travel between CPUs without waiting for the GPU's queue.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=math.ceil(failure.collective_timeout_s)
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
            failure_config=ray.train.FailureConfig(max_failures=failure.max_failures, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=profile.checkpoint.keep),
            worker_runtime_env=worker_environment(profile),
        ),
    )


def worker_environment(profile: Profile) -> dict[str, dict[str, str]] | None:
    """The profile's variables, and short MLflow requests for workers that talk to a server.

    None where there are neither: Ray then gives workers that are already up.
    """
    client = client_environment() if profile.tracking_uri.startswith("http") else {}
    merged = {**client, **profile.env}
    return {"env_vars": merged} if merged else None


class _Fit:
    """`trainer.fit()` in a thread of its own, so that the main thread can look at signals and show progress."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._result: ray.train.Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(trainer,), name="ray-train-fit", daemon=True)
        self._thread.start()

    def _run(self, trainer: TorchTrainer) -> None:
        try:
            self._result = trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            self._error = error

    def is_running(self, wait_s: float) -> bool:
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def result(self, storage: RunStorage) -> WorkerResult:
        """Rank 0's result. Raises UserError or Fault with the cause; the whole story goes to `failure.log`."""
        if self._error is not None:
            log = storage.folder / "failure.log"
            log.write_text("".join(traceback.format_exception(self._error)), encoding="utf-8")
            storage.publish(log)
            raise Fault(f"training failed: {_cause(self._error)}; the log is {storage.location}/{log.name}") from None
        returned = self._result.return_value if self._result else None
        if isinstance(returned, str):
            raise UserError(returned)
        if not isinstance(returned, WorkerResult):
            raise Fault(f"training ended without a result: rank 0 returned {returned!r}")
        return returned


def _cause(error: BaseException) -> str:
    """The last line of what went wrong first: the lowest rank's own exception, not the wrapping around it."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = min(error.worker_failures.items())
        return f"rank {rank}: {_last_line(failure)}"
    if isinstance(error, TrainingFailedError | RayError):
        return _last_line(error)
    return repr(error)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _status(control: ray.actor.ActorHandle) -> Status:
    try:
        status: Status = ray.get(control.status.remote(), timeout=5.0)
        return status
    except RayError:
        return Status()


def _clear_bookkeeping(storage: RunStorage, keep: int) -> None:
    """Removes what a former driver left: Ray's snapshot, damaged checkpoints, whole ones beyond the newest `keep`.

    Where to resume is decided by the whole checkpoints themselves (`checkpoint.newest_whole`). Ray's snapshot of them
    is not written atomically and refuses a run whose folders changed, so no driver starts from another's.
    """
    storage.remove(RAY_SNAPSHOT)
    names = storage.names()
    for name in names:
        if name.startswith(".") and name.endswith(TEMPORARY):
            storage.remove(name)
    with newest_whole(storage) as found:
        if found is None:
            return
    newest_to_oldest = newest_first(names)
    whole = newest_to_oldest.index(found.name)
    for name in newest_to_oldest[:whole] + newest_to_oldest[whole + keep :]:
        storage.remove(name)
