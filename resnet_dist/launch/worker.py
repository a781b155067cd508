"""The code inside a worker of a Ray Train group: `worker_main`, and the `RunContext` that its training loop sees."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import ray
import ray.train
from ray.exceptions import ActorDiedError, RayError
from ray.train import Checkpoint, CheckpointUploadMode

from data_prep.beton.class_names import difference
from data_prep.beton.manifest import load_manifest
from resnet_dist.config.profile import FailureConfig
from resnet_dist.data.checks import data_digest
from resnet_dist.data.node_cache import NodeCache
from resnet_dist.errors import Fault, UserError
from resnet_dist.gpus import nccl
from resnet_dist.gpus.device import device_of, gpu_problem, hide_gpus
from resnet_dist.launch.control import ask_every_s
from resnet_dist.launch.execute import stacks_file
from resnet_dist.launch.lease import FencedStorage, Lease
from resnet_dist.launch.ray_internals import current_reservation
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.connection import configure_environment
from resnet_dist.tracking.system_metrics import NodeMonitor
from resnet_dist.tracking.tracker import SpoolTracker, Tracker
from resnet_dist.training.collectives import prepare_connections
from resnet_dist.training.context import RunContext, TrainingJob, WorkerResult
from resnet_dist.training.curves import MAX_OWN_CURVES
from resnet_dist.training.watchdog import Watchdog

_UPLOAD_POLL_S = 1.0


@dataclass(frozen=True)
class WorkerSetup:
    """What the driver sends to every worker."""

    job: TrainingJob
    storage: RunStorage
    run_id: str
    tracking_uri: str = field(repr=False)  # may hold a password, and Ray's dashboard shows the workers' arguments
    control: Any
    """Handle of the `RunControl` actor."""
    failure: FailureConfig
    lease: Lease
    """The lease of these workers' driver."""
    gpus_per_worker: int = 0
    cache: NodeCache | None = None
    """What each node copies to its own disk before the first step."""
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables with which a worker logs in at the MLflow server."""


class RayContext(RunContext):
    """Rank, device, checkpoints through `ray.train.report`, stop and progress through the control actor."""

    def __init__(self, setup: WorkerSetup, monitor: NodeMonitor | None, spool: SpoolTracker | None) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        # Ray Train chooses among the GPUs, but would also give the first one to a worker that asked for none.
        self.device = ray.train.torch.get_device() if setup.gpus_per_worker else device_of(0)
        self._reports_transports = self.rank == 0 and self.world_size > 1 and setup.gpus_per_worker > 0
        self._has_other_nodes = context.get_local_world_size() < self.world_size
        failure, control = setup.failure, setup.control
        self.storage = FencedStorage(
            setup.storage, setup.lease, failure.storage_timeout_s, control.warn.remote, control.give_up.remote
        )
        self.storage_timeout_s = failure.storage_timeout_s
        self.keep = None  # Ray Train removes old checkpoints itself: see `build_ray_trainer`
        self._setup = setup
        self._monitor = monitor
        self._spool = spool
        self._stop_requested = False
        self._done = threading.Event()
        self._upload: threading.Event | None = None
        self._watchdog = Watchdog(failure.progress_timeout_s, stacks_file(self.storage, self.rank), self.storage.upload)
        threading.Thread(target=self._ask_for_stop, name="ask-for-stop", daemon=True).start()

    def save_checkpoint(self, name: str, commit: Callable[[], None] | None, metrics: Mapping[str, float]) -> None:
        """Ray's upload thread writes straight into storage; Ray ends a worker only when its uploads are done."""
        # At most two copies of the state in memory; other ranks wait in Ray's barrier, half of its limit at most.
        self._wait_for_upload(self._setup.failure.collective_timeout_s / 2)
        done = threading.Event()

        def upload(_: Checkpoint, name_in_storage: str) -> Checkpoint:
            assert commit is not None
            try:
                self._persist_points()
                commit()
            finally:
                done.set()
            ray_storage = ray.train.get_context().get_storage()
            return Checkpoint(
                ray_storage.build_checkpoint_path_from_name(name_in_storage), ray_storage.storage_filesystem
            )

        ray.train.report(
            {key: float(value) for key, value in metrics.items()},
            checkpoint=Checkpoint.from_directory(str(self.storage.folder)) if commit else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload if commit else None,
            delete_local_checkpoint_after_upload=False,
        )
        self._upload = done if commit else None

    def wait_for_checkpoints(self) -> None:
        self._wait_for_upload(self.storage_timeout_s)

    def stop_requested(self) -> bool:
        return self._stop_requested

    def log(self, line: str) -> None:
        if self.rank == 0:
            self._setup.control.log.remote(line)

    def warn(self, line: str) -> None:
        self._setup.control.warn_of_rank.remote(self.rank, line)

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.rank == 0:
            self._setup.control.progressed.remote(step, dict(metrics))
        if metrics and self._reports_transports:  # with the first point of the curves NCCL has connected
            self._reports_transports = False
            report_transports(self._setup.control, os.environ, between_nodes=self._has_other_nodes)
        if self._monitor is not None:
            self._monitor.observe(step)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.rank == 0:
            self._setup.control.evaluated.remote(step, dict(metrics))
        if self._monitor is not None:
            self._monitor.observe(step)

    def report_stragglers(self, slow: Mapping[int, float]) -> None:
        if self.rank == 0:
            all_have_curves = self.world_size <= MAX_OWN_CURVES
            self._setup.control.report_stragglers.remote(dict(slow), all_have_curves=all_have_curves)

    def heartbeat(self) -> None:
        self._watchdog.heartbeat()

    def close(self) -> None:
        self._done.set()
        self._watchdog.close()
        if self._monitor is not None:
            self._monitor.close()
        nccl.remove_log(os.environ)

    def _persist_points(self) -> None:
        """Makes the metrics before a checkpoint durable first: a run that resumes from it does not log them again."""
        limit_s = self.storage_timeout_s
        if self._spool is not None and not self._spool.persist(limit_s):
            self._give_up(f"{self.storage.location} has not accepted the metrics for {limit_s:g} s")

    def _wait_for_upload(self, limit_s: float) -> None:
        if self._upload is None:
            return
        deadline = time.monotonic() + limit_s
        while not self._upload.wait(_UPLOAD_POLL_S):
            self.heartbeat()
            if time.monotonic() > deadline:
                self._give_up(f"{self.storage.location} has not accepted the last checkpoint for {limit_s:g} s")

    def _give_up(self, reason: str) -> NoReturn:
        """Ends the run: no restart would help."""
        reason += " (failure.storage_timeout_s); repair it, and run the same command again"
        self._setup.control.give_up.remote(reason)
        raise Fault(reason)

    def _ask_for_stop(self) -> None:
        """In a thread: a response may take long, and the training loop must not wait for it."""
        # With every call: an actor that was killed restarts empty.
        me = (self.rank, ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
        every_s = ask_every_s(self.world_size)
        wait_s = every_s * (self.rank + 1) / self.world_size  # the workers ask in turns
        while not self._done.wait(wait_s):
            wait_s = every_s
            try:
                if ray.get(self._setup.control.should_stop.remote(*me), timeout=5.0):
                    self._stop_requested = True
                    return
            except ActorDiedError:
                return  # the driver is gone, and Ray ends this worker too
            except RayError:
                continue  # a stall: a worker that stopped asking would miss the next Ctrl-C


def prepare_worker(gpus_per_worker: int) -> str:
    """Runs in every worker before its process group is made. Returns why the worker cannot compute where the profile
    wants it to, in one line; "" if it can.
    """
    context = ray.train.get_context()
    problem = prepare_connections(context.get_world_rank(), context.get_world_size())
    if not gpus_per_worker:
        hide_gpus()
    elif not problem and not (problem := gpu_problem()):
        if context.get_world_rank() == 0:
            os.environ.update(nccl.log_settings(os.environ))
        else:
            os.environ.setdefault("NCCL_DEBUG", "WARN")
    return problem and f"node {ray.util.get_node_ip_address()}: {problem}"


def report_transports(control: Any, environment: Mapping[str, str], *, between_nodes: bool) -> None:
    """Logs which transports NCCL chose, in one line; TCP between nodes is a warning."""
    found = nccl.parse_log(nccl.read_log(environment))
    if line := nccl.describe(found, between_nodes=between_nodes):
        (control.warn if between_nodes and found.is_tcp else control.log).remote(line)


def worker_main(config: Mapping[str, WorkerSetup]) -> WorkerResult | str:
    """Ray Train's `train_loop_per_worker`. A user's mistake is returned as text, since a restart would not help."""
    setup = config["setup"]
    configure_environment(os.environ)  # a node may have its own settings
    os.environ.update(setup.credentials)
    try:
        return _train(setup)
    except UserError as error:
        # To the driver directly: Ray reads only what rank 0 returns, and only when all workers are done.
        setup.control.report_mistake.remote(str(error))
        return str(error)


def _train(setup: WorkerSetup) -> WorkerResult:
    from resnet_dist.training.loop import run_worker  # imports ffcv and numba, which the driver does not need

    setup.lease.require_held()
    if setup.cache is not None:
        setup.cache.fill()  # before the watchdog starts: a copy has its own, longer limit
    require_same_data(setup.job)
    place = ray.train.get_context()
    spool = _open_spool(setup, place.get_world_rank(), place.get_node_rank(), place.get_local_rank())
    num_nodes = -(-place.get_world_size() // place.get_local_world_size())  # exact if all have as many workers
    monitor = NodeMonitor(spool, place.get_node_rank(), num_nodes=num_nodes) if spool else None
    context = RayContext(setup, monitor, spool)
    tracker = Tracker()
    if spool is not None and context.rank == 0:
        setup.control.workers_started.remote(context.world_size, current_reservation())
        tracker = spool
        tracker.tags({"workers": str(context.world_size)})
    try:
        return run_worker(setup.job, context, tracker)
    except BaseException:
        for warning in nccl.warnings_in(nccl.read_log(os.environ)):
            print(f"NCCL WARN {warning}", file=sys.stderr)  # to the run's log, where NCCL itself would write it
        raise
    finally:
        context.close()
        if spool is not None:
            spool.flush(timeout_s=30.0)
            spool.close()


def require_same_data(job: TrainingJob) -> None:
    """UserError if this machine's betons are not those that the driver found, or have other class names."""
    train, val = load_manifest(job.train_beton), load_manifest(job.val_beton)
    here = data_digest(train, val)
    where = f"{socket.gethostname()}: {job.train_beton.parent}"
    if here != job.identity.data_digest:
        raise UserError(
            f"{where} holds data {here}, the run is of {job.identity.data_digest}; put the same betons on all nodes"
        )
    if not job.identity.class_names:
        return
    for manifest in (train, val):
        differ = difference(manifest.class_names, job.identity.class_names, "this node's betons", "the run")
        if differ is not None:
            raise UserError(f"{where} has other class names: {differ}; put the same manifests on all nodes")


def _open_spool(setup: WorkerSetup, rank: int, node_rank: int, local_rank: int) -> SpoolTracker | None:
    """Rank 0's tracker, for everything in the run; on every other node one worker's, for system metrics."""
    opened = partial(SpoolTracker, setup.storage, setup.run_id, setup.tracking_uri, lease=setup.lease.number)
    if rank == 0:
        return opened(warn=setup.control.warn.remote)
    if local_rank == 0 and node_rank > 0:
        return opened(writer=f"node-{node_rank}")
    return None
