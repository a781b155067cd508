"""`execute`: trains an open run, in this process or elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.beton.stage import stage
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.lease import fenced
from resnet_dist.launch.preflight import Prepared
from resnet_dist.launch.run import Run
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.checkpoint import prune
from resnet_dist.training.context import LocalContext, Observer, WorkerResult
from resnet_dist.training.watchdog import Watchdog

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


def execute(run: Run, *, on: Callable[[Run, Observer], WorkerResult], observer: Observer | None = None) -> WorkerResult:
    """Trains the run from its newest checkpoint to its end, until it diverges, or until `observer` asks to stop.

    Args:
        on: `in_process`, or `ray_group.ray_group`. The weights do not depend on it.
        observer: is told of every evaluation, and is asked whether to stop.

    Raises UserError, Fault; both are in the run's events too.
    """
    try:
        result = on(run, observer or Observer())
    except (UserError, Fault) as error:
        run.events.note(f"failed: {error}")
        raise
    run.lease.require_ours()
    run.events.note(f"{result.outcome} after step {result.step}")
    run.ends(result)
    return result


def in_process(run: Run, observer: Observer) -> WorkerResult:
    """Trains in this process, as the only worker; for `execute`. A worker group takes some twenty seconds to start, for
    four processes import ray and torch; a small model on digits trains in two.
    """
    from resnet_dist.training.loop import run_worker  # brings ffcv and numba

    prepared, profile, storage = run.prepared, run.prepared.profile, run.storage
    clear_leftovers(storage, profile.checkpoint.keep, prepared.damaged)
    if (cache := node_cache(prepared)) is not None:
        fill(cache)
    tracker = SpoolTracker(storage, run.record.handle.run_id, profile.tracking_uri, lease=run.lease.token.number)
    watchdog = Watchdog(profile.failure.progress_timeout_s, stacks_file(storage, rank=0), storage.upload)
    has_gpu = profile.gpus_per_worker > 0 and torch.cuda.is_available()
    context = LocalContext(
        fenced(
            storage,
            run.lease.token,
            profile.failure.storage_timeout_s,
            warn=run.log,
            heartbeat=watchdog.heartbeat,  # a checkpoint is committed in the thread that trains
        ),
        device=torch.device("cuda" if has_gpu else "cpu"),
        keep=profile.checkpoint.keep,
        observer=observer,
        on_heartbeat=watchdog.heartbeat,
        storage_timeout_s=profile.failure.storage_timeout_s,
    )
    try:
        return run_worker(prepared.job(), context, tracker)
    finally:
        watchdog.close()
        tracker.close()


def clear_leftovers(storage: RunStorage, keep: int, damaged: Collection[str]) -> None:
    """Removes what an earlier training left: Ray's snapshot, `damaged` checkpoints, others beyond the newest `keep`.

    Where to resume is decided by the complete checkpoints themselves (`checkpoint.newest_complete`). Ray's snapshot of
    them is not written atomically and refuses a run whose folders changed, so no trainer starts from another's.
    """
    storage.remove(RAY_SNAPSHOT)
    prune(storage, keep, damaged)


def stacks_file(storage: RunStorage, rank: int) -> Path:
    """Where a worker that makes no progress leaves the stacks of its threads."""
    return storage.folder / "stacks" / f"rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"


@dataclass(frozen=True)
class NodeCache:
    """What to copy (paths or URLs), to which folder, and for how long the slowest node may take."""

    sources: Sequence[str]
    folder: Path
    timeout_s: float


def node_cache(prepared: Prepared) -> NodeCache | None:
    profile, sources = prepared.profile, (prepared.train_source, prepared.val_source)
    return None if profile.cache is None else NodeCache(sources, Path(profile.cache), profile.cache_timeout_s)


def fill(cache: NodeCache) -> None:
    """Copies what this node lacks, and returns when all workers' nodes have everything.

    Workers of one node share the copy: the first one copies, the others wait for it. Waiting happens in a group of its
    own, because the limits of the training's collectives are minutes and a copy of ImageNet may take an hour.
    Raises Fault when the source is damaged, the disk full or the limit passed; UserError when the source is gone.
    """
    everybody = None
    if dist.is_initialized() and dist.get_world_size() > 1:
        everybody = dist.new_group(backend="gloo", timeout=timedelta(seconds=cache.timeout_s))
    for source in cache.sources:
        stage(source, cache.folder, wait_limit_s=cache.timeout_s)
    if everybody is None:
        return
    try:
        dist.barrier(everybody)  # type: ignore[arg-type]  # new_group's stub allows for ranks outside
    except RuntimeError as error:
        raise Fault(f"another node did not copy its data into {cache.folder}: {error}") from None
    dist.destroy_process_group(everybody)
