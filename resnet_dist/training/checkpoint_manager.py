"""The checkpoints of a run in training: written in the background, kept, found, restored; and the best weights.

`best/epoch=007-step=00012345/` has the net alone: half the size of a checkpoint, written only when an evaluation beats
all before it. Checkpoints are for resuming and only the newest few are kept, so the best one may not be among them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from resnet_dist.errors import Fault
from resnet_dist.storage.base import RunStorage
from resnet_dist.training.checkpoint import (
    METADATA,
    CheckpointMetadata,
    Damaged,
    Found,
    Identity,
    checkpoint_name,
    load_state,
    newest_complete,
    newest_first,
    opened,
    read_metadata,
    require_same,
    write_checkpoint,
)
from resnet_dist.training.collectives import sum_over_workers
from resnet_dist.training.context import RunContext, TrainingJob
from resnet_dist.training.state import TrainState, copied

BEST = "best"
_METRIC = "val/top1"
_MAX_REASON = 200
_HEARTBEAT_EVERY_S = 1.0


class CheckpointManager:
    """Saves and restores the state of one worker group. Every worker has a manager; all call `save` and `restore`
    together.

    The manager decides what is saved and when a write is waited for. The context commits it: in a process on its own at
    once (`LocalContext`), in a worker group by Ray Train in the background (`launch.worker.RayContext`). Storage is
    fenced by the run's lease in both, and both keep the newest `checkpoint.keep`.
    """

    def __init__(self, job: TrainingJob, ctx: RunContext, state: TrainState) -> None:
        self._job, self._ctx, self._state = job, ctx, state
        self._best_top1 = -1.0
        self._best_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="best-weights")
        self._best_write: Future[bool] | None = None
        self.saved_step = -1
        """The step of the newest checkpoint."""

    def save(self, metrics: Mapping[str, float]) -> None:
        """Saves the state as it is now, unless it is saved already. The write itself happens during the next steps."""
        state = self._state
        if self.saved_step >= state.step:
            return
        if state.gradient_memory is not None:
            state.gradient_memory.gather()
        metadata = self._metadata(metrics)
        write = None
        if self._ctx.rank == 0:  # the state is equal on all workers
            write = partial(write_checkpoint, state=state.snapshot(), metadata=metadata)
        self._ctx.save_checkpoint(checkpoint_name(metadata.epoch, metadata.step), write, metrics)
        self.saved_step = state.step

    def save_if_best(self, metrics: Mapping[str, float]) -> None:
        """Keeps the evaluated net if its `val/top1` is the highest so far. Only rank 0 does anything."""
        if self._ctx.rank != 0 or metrics[_METRIC] <= self._best_top1:
            return
        self._best_top1 = metrics[_METRIC]
        net = copied(self._state.evaluated_net.state_dict())
        self._wait_for_best()  # at most one copy of the net waits in memory
        self._best_write = self._best_writer.submit(keep_if_best, self._ctx.storage, net, self._metadata(metrics))

    def restore(self) -> Mapping[str, float]:
        """Loads the newest complete checkpoint, if there is one. Returns its metrics, {} if there is none.

        Raises:
            UserError: the checkpoint is of another recipe or of other data.
            Fault: storage cannot be reached, or the workers found different checkpoints.
        """
        ctx, job, metrics = self._ctx, self._job, {}
        ctx.wait_for_checkpoints()
        sum_over_workers(torch.zeros(1))  # a barrier: nobody looks before all have written
        with newest_complete(ctx.storage) as found:
            if found is not None:
                require_same(found.metadata, job.identity, job.recipe, ctx.storage.location)
                saved = load_state(found.directory, ctx.device, self._state.net)
                try:
                    self._state.load_state_dict(saved)
                except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    why = " ".join(f"{type(error).__name__}: {error}".split())
                    raise Fault(
                        f"{ctx.storage.location}/{found.name}: its state is not one of this run ({why[:_MAX_REASON]}); "
                        "remove that checkpoint"
                    ) from None
                metrics = dict(found.metadata.metrics)
                self.saved_step = self._state.step
        step = self._state.step
        if int(sum_over_workers(torch.tensor([step]))) != step * ctx.world_size:
            raise Fault(
                f"worker {ctx.rank} found step {step} in storage, others another step: is storage shared by all nodes?"
            )
        return metrics

    def wait(self) -> None:
        """Waits until everything is written."""
        self._wait_for_best()
        self._ctx.wait_for_checkpoints()

    def _wait_for_best(self) -> None:
        if self._best_write is None:
            return
        # A slow storage is no hang, so the watchdog must not end this worker for it. Past the limit the heartbeats
        # stop, and the watchdog does.
        deadline_s = time.monotonic() + self._ctx.storage_timeout_s
        while time.monotonic() < deadline_s and not wait([self._best_write], _HEARTBEAT_EVERY_S).done:
            self._ctx.heartbeat()
        self._best_write.result()
        self._best_write = None

    def _metadata(self, metrics: Mapping[str, float]) -> CheckpointMetadata:
        job, step = self._job, self._state.step
        return CheckpointMetadata(
            epoch=job.plan.epoch_of(step),
            step=step,
            identity=job.identity,
            recipe=job.recipe.model_dump(mode="json"),
            metrics={key: value for key, value in metrics.items() if math.isfinite(value)},  # JSON has no NaN
            files={},
            pictures=job.pictures,
        )


def keep_if_best(storage: RunStorage, net: Mapping[str, Any], metadata: CheckpointMetadata) -> bool:
    """Keeps the net's state dict if its `val/top1` is higher than that of the kept ones; the first of equals stays. A
    kill leaves the old best, the new one, or both.
    """
    kept = [old.metrics[_METRIC] for old in _all_best(storage, metadata.identity).values()]
    if kept and metadata.metrics[_METRIC] <= max(kept):
        return False
    new = checkpoint_name(metadata.epoch, metadata.step)
    storage.commit(f"{BEST}/{new}", partial(write_checkpoint, state={"net": net}, metadata=metadata), last=METADATA)
    for other in storage.names(BEST):
        if other != new:
            storage.remove(f"{BEST}/{other}")
    return True


def list_saved(storage: RunStorage) -> list[str]:
    """The names of the run's checkpoints, newest first, then those of its best weights (`best/...`)."""
    return [*newest_first(storage.names()), *(f"{BEST}/{name}" for name in newest_first(storage.names(BEST)))]


@contextmanager
def open_best(storage: RunStorage, identity: Identity) -> Iterator[Found | None]:
    """The best complete weights of this recipe and these data, or None."""
    kept = _all_best(storage, identity)
    for name in sorted(kept, key=lambda name: kept[name].metrics[_METRIC], reverse=True):
        with ExitStack() as stack:
            try:
                found = stack.enter_context(opened(storage, name))
            except Damaged:
                continue
            yield found
            return
    yield None


def _all_best(storage: RunStorage, identity: Identity) -> dict[str, CheckpointMetadata]:
    """The metadata of the best weights in storage, without those of another run."""
    found = {f"{BEST}/{name}": read_metadata(storage, f"{BEST}/{name}") for name in newest_first(storage.names(BEST))}
    return {
        name: data for name, data in found.items() if data and data.identity.is_of(identity) and _METRIC in data.metrics
    }
