"""Ray Train at work: one trainer from its start to its end, and what came of it."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import ray.train
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from data_prep.beton.files import write_text_atomically
from data_prep.runtime.ray_errors import explain, first_death, is_lost_process
from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import alive_nodes, start_timeout_s, worker_environment, workers_with_room
from resnet_dist.launch.control import StopSignal
from resnet_dist.launch.worker import WorkerSetup, worker_main
from resnet_dist.storage.base import RunStorage, is_url, split
from resnet_dist.training.context import WorkerResult

_LOOK_EVERY_S = 1.0


class ControllerLost(Fault):
    """Ray Train's controller, a process beside the driver, is gone, and the workers with it."""


class Fit:
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
        """Rank 0's result. Raises ControllerLost, and UserError or Fault with the cause; the whole story goes to
        `failure.log`.
        """
        if self._error is not None:
            log = storage.folder / "failure.log"
            write_text_atomically(log, "".join(traceback.format_exception(self._error)))
            storage.publish(log)
            if is_lost_process(self._error):
                why = explain(self._error).sentence
                raise ControllerLost(f"Ray Train's controller, a process beside the driver, died: {why}") from None
            if isinstance(self._error, ControllerError) and isinstance(self._error.controller_failure, OSError):
                reason = explain(self._error.controller_failure).sentence
                raise ControllerLost(f"Ray Train's controller could not write its bookkeeping: {reason}") from None
            raise Fault(f"training failed: {_cause(self._error)}; the log is {storage.location}/{log.name}") from None
        returned = self._result.return_value if self._result else None
        if isinstance(returned, str):
            raise UserError(returned)
        if not isinstance(returned, WorkerResult):
            raise Fault(f"training ended without a result: rank 0 returned {returned!r}")
        return returned


class WorkersLost(UserCallback):
    """Says why a worker group ended, which Ray Train keeps to itself while it may try again."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._control.warn.remote(f"a worker failed: {_of_ranks(worker_exceptions)}")


def build_trainer(profile: Profile, storage: RunStorage, setup: WorkerSetup) -> TorchTrainer:
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
            failure_config=ray.train.FailureConfig(
                max_failures=failure.max_failures,
                max_preemption_failures=-1 if failure.max_preemptions is None else failure.max_preemptions,
                controller_failure_limit=max(1, math.ceil(failure.wait_for_resources_s / start_timeout_s(failure)) - 1),
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=profile.checkpoint.keep),
            callbacks=[WorkersLost(setup.control)],
            worker_runtime_env=worker_environment(profile),
        ),
    )


def wait_for_room(profile: Profile, stop: StopSignal) -> None:
    """Until the nodes that stay have room for the fewest workers, `failure.wait_for_resources_s` at most.

    Returns too when the user wishes to stop. Raises Fault at the limit.
    """
    limit_s = profile.failure.wait_for_resources_s
    deadline = time.monotonic() + limit_s
    while (room := workers_with_room(alive_nodes(), profile)) < profile.workers.min and stop.number is None:
        if time.monotonic() > deadline:
            raise Fault(
                f"the nodes that are left have room for {room} workers of {profile.workers}, and no more came for "
                f"{limit_s:g} s (failure.wait_for_resources_s); add nodes and give the same command again"
            )
        time.sleep(_LOOK_EVERY_S)


def _cause(error: BaseException) -> str:
    """What went wrong first: a worker's own exception, not the wrapping around it."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return _of_ranks(error.worker_failures)
    return explain(error).sentence


def _of_ranks(failures: Mapping[int, BaseException]) -> str:
    rank, told = first_death(failures)
    return f"rank {rank}: {told.sentence}"


# A run's storage in Ray Train's words.


def ray_storage(location: str) -> tuple[str, str, Any]:
    """`storage_path`, `name` and `storage_filesystem` of a RunConfig whose folder is `location`.

    Ray gets the same S3 client as everybody else, so that one set of credentials and one endpoint hold for all.
    """
    parent, name = split(location)
    if not is_url(location):
        return parent, name, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from resnet_dist.storage.objects import connect

    return parent.partition("://")[2], name, PyFileSystem(FSSpecHandler(connect()))
