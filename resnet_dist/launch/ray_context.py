"""`RunContext` over Ray Train: the only code that runs inside a Ray worker and knows it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointUploadMode

from resnet_dist.errors import UserError
from resnet_dist.tracking.base import NullTracker, Tracker
from resnet_dist.tracking.mlflow_tracker import SpoolTracker
from resnet_dist.training.checkpoint import commit, newest_whole
from resnet_dist.training.context import WriteCheckpoint
from resnet_dist.training.job import Job, WorkerResult

_STOP_POLL_S = 1.0


@dataclass(frozen=True)
class WorkerSetup:
    """What the driver sends to every worker."""

    job: Job
    run_dir: Path
    run_id: str
    tracking_uri: str
    control: Any
    """Handle of the `RunControl` actor."""


class RayContext:
    """Rank, device, checkpoints through `ray.train.report`, stop and progress through the control actor."""

    def __init__(self, run_dir: Path, control: Any) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
        self._run_dir = run_dir
        self._control = control
        self._stop = threading.Event()
        self._done = threading.Event()
        threading.Thread(target=self._poll_stop, name="stop-poll", daemon=True).start()

    def report(self, metrics: Mapping[str, float], write: WriteCheckpoint | None, name: str) -> None:
        """Ray's upload thread writes straight into storage; Ray ends a worker only when its uploads are done."""

        def upload(_: Checkpoint, name_in_storage: str) -> Checkpoint:
            assert write is not None
            commit(self._run_dir / name_in_storage, write)
            return Checkpoint.from_directory(str(self._run_dir / name_in_storage))

        ray.train.report(
            {key: float(value) for key, value in metrics.items()},
            checkpoint=Checkpoint.from_directory(str(self._run_dir)) if write else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload if write else None,
            delete_local_checkpoint_after_upload=False,
        )

    def restore(self) -> Path | None:
        found = newest_whole(self._run_dir)
        return found[0] if found else None

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.rank == 0:
            self._control.progressed.remote(step, dict(metrics))

    def close(self) -> None:
        self._done.set()

    def _poll_stop(self) -> None:
        while not self._done.wait(_STOP_POLL_S):
            try:
                if ray.get(self._control.stop_requested.remote(), timeout=5.0):
                    self._stop.set()
                    return
            except RayError:
                return  # the driver is gone, and Ray ends this worker too


def worker_main(config: Mapping[str, WorkerSetup]) -> WorkerResult | str:
    """Ray Train's `train_loop_per_worker`. A user's mistake is returned as its text: a restart would not mend it."""
    from resnet_dist.training.worker import run_worker  # brings ffcv and numba, which the driver can do without

    setup = config["setup"]
    context = RayContext(setup.run_dir, setup.control)
    tracker: Tracker = NullTracker()
    if context.rank == 0:
        setup.control.began.remote(context.world_size)
        tracker = SpoolTracker(setup.run_dir, setup.run_id, setup.tracking_uri)
    try:
        return run_worker(setup.job, context, tracker)
    except UserError as error:
        return str(error)
    finally:
        context.close()
        tracker.flush(timeout_s=30.0)
        tracker.close()
