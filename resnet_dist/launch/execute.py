"""`execute`: trains an open run, in this process or elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from resnet_dist.errors import Fault, UserError
from resnet_dist.gpus.device import device_of
from resnet_dist.launch.cluster import this_machine
from resnet_dist.launch.lease import FencedStorage
from resnet_dist.launch.run import Run
from resnet_dist.storage.base import RAY_SNAPSHOT, RunStorage
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.checkpoint_manager import START, prune
from resnet_dist.training.context import LocalContext, Observer, WorkerResult
from resnet_dist.training.watchdog import Watchdog


def execute(run: Run, *, on: Callable[[Run, Observer], WorkerResult], observer: Observer | None = None) -> WorkerResult:
    """Trains the run from its newest checkpoint to the end, until it diverges, or until `observer` asks to stop.

    Args:
        on: `in_process`, or `ray_group.ray_group`. The weights do not depend on it.
        observer: sees every evaluation, and may ask to stop.

    Raises UserError, Fault; both are in the run's events too.
    """
    try:
        result = on(run, observer or Observer())
    except (UserError, Fault) as error:
        run.events.note(f"failed: {error}")
        raise
    run.lease.require_ours()
    if result.outcome == "finished":
        run.storage.remove(START)  # there is a checkpoint
    run.events.note(f"{result.outcome} after step {result.step}: {result.reason}".removesuffix(": "))
    run.ends(result)
    return result


def in_process(run: Run, observer: Observer) -> WorkerResult:
    """Trains in this process, as the only worker; for `execute`. A worker group takes some twenty seconds to start,
    since four processes import ray and torch; a small model on digits trains in two.
    """
    from resnet_dist.training.loop import run_worker  # brings ffcv and numba

    prepared, profile, storage = run.prepared, run.prepared.profile, run.storage
    device = device_of(profile.gpus_per_worker)
    run.starts_on([this_machine(profile, num_gpus=profile.gpus_per_worker)])
    clear_leftovers(storage, profile.checkpoint.keep, prepared.damaged)
    if prepared.node_cache is not None:
        prepared.node_cache.fill()
    tracker = SpoolTracker(storage, run.record.handle.run_id, profile.tracking_uri, lease=run.lease.token.number)
    watchdog = Watchdog(profile.failure.progress_timeout_s, stacks_file(storage, rank=0), storage.upload)
    fenced = FencedStorage(
        storage,
        run.lease.token,
        profile.failure.storage_timeout_s,
        warn=run.log,
        heartbeat=watchdog.heartbeat,  # a checkpoint is committed in the thread that trains
    )
    context = LocalContext(
        fenced,
        device=device,
        keep=profile.checkpoint.keep,
        observer=observer,
        on_heartbeat=watchdog.heartbeat,
        on_line=run.log,
        storage_timeout_s=profile.failure.storage_timeout_s,
    )
    try:
        return run_worker(prepared.job(), context, tracker)
    finally:
        watchdog.close()
        tracker.close()


def clear_leftovers(storage: RunStorage, keep: int, damaged: Collection[str]) -> None:
    """Removes what an earlier training left: Ray's snapshot, `damaged` checkpoints, others beyond the newest `keep`.

    A run resumes from the complete checkpoints themselves (`newest_complete`). Ray's snapshot of them is not written
    atomically and rejects a run whose folders changed, so no Ray trainer starts from another's snapshot.
    """
    storage.remove(RAY_SNAPSHOT)
    prune(storage, keep, damaged)


def stacks_file(storage: RunStorage, rank: int) -> Path:
    """Where a worker that makes no progress leaves the stacks of its threads."""
    return storage.folder / "stacks" / f"rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
