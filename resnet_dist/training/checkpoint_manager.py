"""The checkpoints of a run: which are in storage, which is resumed, which are kept; and one worker's manager of them.

epoch=007-step=00012345/        a checkpoint: to resume from; only the newest few are kept
best/epoch=004-step=00008000/   the best weights so far: the net alone, half the size of a checkpoint
start/                          what the run starts from, if that is not random: weights, or another run's checkpoint
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_prep.beton.digest import digest_stream, parse_digest
from data_prep.beton.files import Unfit
from resnet_dist.config.recipe import BestBy, Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import TEMPORARY, RunStorage
from resnet_dist.training.checkpoint import (
    METADATA,
    STATE,
    CheckpointMetadata,
    Damaged,
    Identity,
    checkpoint_name,
    open_state,
    parse_metadata,
    read_state,
    require_same,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from resnet_dist.training.collectives import broadcast_file, broadcast_object, share_state, sum_over_workers
from resnet_dist.training.context import RunContext, TrainingJob
from resnet_dist.training.state import HostCopies, TrainState

BEST = "best"
START = "start"
_MAX_REASON = 200
_HEARTBEAT_EVERY_S = 1.0


class CheckpointManager:
    """Writes, finds and restores checkpoints. Every worker has one; all call `save` and `restore` together.

    When to save is decided in `loop.Trainer`: by the plan (`RunPlan.checkpoint_due`), by rank 0's clock
    (`due_by_clock`), and before a stop. The context decides in which thread a checkpoint is written: the one that
    trains (`LocalContext`), or Ray Train's upload thread during the next steps (`launch.worker.RayContext`). Storage is
    fenced by the run's lease in both.

    Who removes which checkpoints, and when:

        launch.execute.clear_leftovers   before workers start: damaged ones, and all but the newest `keep`
        _commit, by prune                without Ray, after each checkpoint: all but the newest `keep`
        Ray Train, by num_to_keep        with Ray, after each checkpoint: all but the newest `keep` of this trainer
        keep_if_best                     after better weights were written: the best ones before
        sweeps.runner                    after a trial: all but the newest of a finished one, all of any other
    """

    def __init__(self, job: TrainingJob, ctx: RunContext, state: TrainState) -> None:
        self._job, self._ctx, self._state = job, ctx, state
        self._best_value = -math.inf
        self._best_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="best-weights")
        self._best_write: Future[bool] | None = None
        self._best_copies = HostCopies()
        self._saved_at_s = time.monotonic()
        self.saved_step = -1
        """The step of the newest checkpoint."""

    def save(self, metrics: Mapping[str, float]) -> None:
        """Saves the state as it is now, unless it is saved already."""
        state, ctx = self._state, self._ctx
        if self.saved_step >= state.step:
            return
        if state.gradient_memory is not None:
            state.gradient_memory.gather()
        metadata = self._metadata(metrics)
        name, commit = checkpoint_name(metadata.epoch, metadata.step), None
        if ctx.rank == 0:  # the state is equal on all workers
            # A snapshot, because the next steps change the state while it is written.
            commit = partial(self._commit, name, state.snapshot(), metadata)
        ctx.save_checkpoint(name, commit, metrics)
        self.saved_step, self._saved_at_s = state.step, time.monotonic()

    def due_by_clock(self) -> bool:
        """Whether the last checkpoint is `TrainingJob.save_every_s` old, by rank 0's clock; False on other ranks.

        A request for the vote, because all workers must save after the same step.
        """
        every_s = self._job.save_every_s
        return self._ctx.rank == 0 and every_s is not None and time.monotonic() - self._saved_at_s >= every_s

    def _commit(self, name: str, snapshot: Mapping[str, Any], metadata: CheckpointMetadata) -> None:
        """Writes a checkpoint, then removes what is no longer kept. A kill leaves all of the new one or none of it."""
        storage, keep = self._ctx.storage, self._ctx.keep
        storage.commit(name, partial(write_checkpoint, state=snapshot, metadata=metadata), last=METADATA)
        if keep is not None:
            prune(storage, keep)

    def save_if_best(self, metrics: Mapping[str, float]) -> None:
        """Keeps the evaluated net if it is the best so far, by `eval.best_by`. Only rank 0 does anything."""
        value = score(metrics, self._job.recipe.eval.best_by)
        if self._ctx.rank != 0 or value <= self._best_value:
            return
        self._best_value = value
        net, metadata = self._best_copies.take(self._state.evaluated_net.state_dict()), self._metadata(metrics)
        self._wait_for_best()  # at most one copy of the net waits in memory
        self._best_write = self._best_writer.submit(keep_if_best, self._ctx.storage, net, metadata)

    def restore(self) -> Mapping[str, float]:
        """Loads the newest complete checkpoint, or else what the run starts from. Returns its metrics; {} if the run
        starts from random weights.

        Raises:
            UserError: the checkpoint is of another recipe or of other data.
            Fault: storage cannot be reached, is not shared by all workers, or a worker received other bytes.
        """
        ctx, state = self._ctx, self._state
        ctx.wait_for_checkpoints()
        sum_over_workers(torch.zeros(1))  # a barrier: nobody looks before all have written
        with self._newest_of_rank_0() as found:
            if found is None:
                # A seed gives the same weights on equal processors; on others the last bits may differ.
                for net in dict.fromkeys((state.net, state.evaluated_net)):  # in the same order everywhere
                    share_state(net)
                return {}
            name, metadata, file = found
            where = f"{ctx.storage.location}/{name}"
            saved = read_state(file, f"{where}/{STATE}", ctx.device, state.net)
        fork = self._job.recipe.fork
        try:
            if name == START:
                state.start_from(saved, new_schedule=fork is not None and fork.schedule == "rest")
            else:
                state.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise Fault(
                f"{where}: its state is not one of this run ({why[:_MAX_REASON]}); remove that checkpoint"
            ) from None
        self.saved_step = -1 if name == START else state.step
        return dict(metadata.metrics)

    @contextmanager
    def _newest_of_rank_0(self) -> Iterator[tuple[str, CheckpointMetadata, BinaryIO] | None]:
        """Name, metadata and state of the newest complete checkpoint, or of what the run starts from.

        Rank 0 alone reads it, and sends it to the others: 1,000 workers that read it would load storage with as many
        copies. Every worker verifies what it received, so it loads what was once written or nothing. What one of them
        finds wrong is raised by all, so that none waits for the others.
        """
        ctx = self._ctx
        with ExitStack() as stack:
            file, opened, problem = None, None, None
            if ctx.rank == 0:
                try:
                    found = stack.enter_context(newest_complete(ctx.storage))
                    if found is None and has_start(self._job.recipe):
                        found = stack.enter_context(open_checkpoint(ctx.storage, START))
                    if found is not None:
                        require_same(found.metadata, self._job.identity, self._job.recipe, ctx.storage.location)
                        file = stack.enter_context(open_state(found.directory / STATE))
                        opened = (found.name, found.metadata, os.fstat(file.fileno()).st_size)
                except (UserError, Fault) as error:
                    problem = error
            opened, problem = broadcast_object((opened, problem))
            if problem is not None:
                raise problem
            newest = self._of_all_workers(newest_step(ctx.storage))
            for rank, step in enumerate(newest):
                if step != newest[0]:
                    raise Fault(
                        f"{ctx.storage.location}: rank {rank} sees step {step} as the newest there, rank 0 step "
                        f"{newest[0]}: is storage shared by all nodes?"
                    )
            if opened is None:
                yield None
                return
            name, metadata, num_bytes = opened
            if ctx.world_size > 1:
                file = broadcast_file(file, num_bytes)
                expected = metadata.files[STATE]
                differs = digest_stream(file, parse_digest(expected).algorithm) != expected
                if any(damaged := self._of_all_workers(differs)):
                    raise Fault(
                        f"{ctx.storage.location}/{name}: rank {damaged.index(1)} did not receive what rank 0 verified: "
                        "check the memory and the network of its node"
                    )
            assert file is not None
            yield name, metadata, file

    def _of_all_workers(self, value: int) -> list[int]:
        """Every rank's `value`."""
        values = torch.zeros(self._ctx.world_size, dtype=torch.int64)
        values[self._ctx.rank] = value
        return sum_over_workers(values).tolist()

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


def has_start(recipe: Recipe) -> bool:
    """Whether a run of this recipe starts from weights or a checkpoint that its driver puts into storage."""
    return recipe.model.init is not None or recipe.fork is not None


# Which checkpoints are in storage. Whether one is complete is decided by its own files alone (`verify_checkpoint`): no
# list of checkpoints is kept beside them that could differ from them after a kill.


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint."""

    name: str
    metadata: CheckpointMetadata
    directory: Path
    """Folder of its files on this machine, while it is open."""
    warnings: tuple[str, ...] = ()
    """A warning for every damaged newer checkpoint."""
    damaged: tuple[str, ...] = ()
    """Names of the damaged newer checkpoints."""


@contextmanager
def open_checkpoint(storage: RunStorage, name: str) -> Iterator[StoredCheckpoint]:
    """The checkpoint `name`, verified. Raises Damaged, and Fault if storage cannot be reached."""
    with storage.fetched(name) as directory:
        yield StoredCheckpoint(name, verify_checkpoint(directory, f"{storage.location}/{name}"), directory)


@contextmanager
def newest_complete(storage: RunStorage) -> Iterator[StoredCheckpoint | None]:
    """The newest complete checkpoint, or None. Raises Fault if storage cannot be reached."""
    warnings: dict[str, str] = {}
    for name in newest_first(storage.names()):
        with ExitStack() as stack:
            try:
                found = stack.enter_context(open_checkpoint(storage, name))
            except Damaged as damaged:
                warnings[name] = str(damaged)
                continue
            yield replace(found, warnings=tuple(warnings.values()), damaged=tuple(warnings))
            return
    yield None


def damaged_names(storage: RunStorage) -> tuple[str, ...]:
    """The damaged checkpoints newer than the newest complete one. None of them if no checkpoint is complete: the user
    decides then."""
    with newest_complete(storage) as found:
        return found.damaged if found is not None else ()


def was_complete(storage: RunStorage, name: str) -> bool:
    """Whether a checkpoint was completely written once, damaged or not: its metadata is written last."""
    return storage.read(f"{name}/{METADATA}") is not None


def read_metadata(storage: RunStorage, name: str) -> CheckpointMetadata | None:
    """The metadata of the checkpoint `name`, without reading its state; None if there is no valid one."""
    try:
        content = storage.read(f"{name}/{METADATA}")
        return None if content is None else parse_metadata(content)
    except (ValueError, Unfit):
        return None


def newest_step(storage: RunStorage) -> int:
    """The newest step of all checkpoints, by their names; 0 if there are none."""
    return max((step for name in storage.names() if (step := step_of(name)) is not None), default=0)


def newest_first(names: Iterable[str]) -> list[str]:
    """The checkpoints among `names`, newest first."""
    steps = [(step, name) for name in names if (step := step_of(name)) is not None]
    return [name for _, name in sorted(steps, reverse=True)]


def list_saved(storage: RunStorage) -> list[str]:
    """The names of the run's checkpoints, complete or not, newest first; then of its best weights (`best/...`)."""
    return [*newest_first(storage.names()), *(f"{BEST}/{name}" for name in newest_first(storage.names(BEST)))]


def prune(storage: RunStorage, keep: int, damaged: Collection[str] = ()) -> None:
    """Removes all checkpoints but the newest `keep`, those in `damaged`, and what interrupted writes left behind.

    Best weights are not counted and stay.
    """
    names = storage.names()
    unfinished = [name for name in names if name.startswith(".") and name.endswith(TEMPORARY)]
    for name in [*unfinished, *damaged, *newest_first(set(names).difference(damaged))[keep:]]:
        storage.remove(name)


# The best weights


def score(metrics: Mapping[str, float], best_by: BestBy) -> float:
    """How good evaluated weights are, by the recipe's `eval.best_by`; larger is better."""
    return -metrics["val/loss"] if best_by == "loss" else metrics[f"val/{best_by}"]


def _score(metadata: CheckpointMetadata) -> float:
    return score(metadata.metrics, metadata.recipe.get("eval", {}).get("best_by", "top1"))


def keep_if_best(storage: RunStorage, net: Mapping[str, Any], metadata: CheckpointMetadata) -> bool:
    """Keeps the net's state dict if it is better than the kept ones; the first of equals stays."""
    kept = [_score(old) for old in _all_best(storage, metadata.identity).values()]
    if kept and _score(metadata) <= max(kept):
        return False
    new = checkpoint_name(metadata.epoch, metadata.step)
    storage.commit(f"{BEST}/{new}", partial(write_checkpoint, state={"net": net}, metadata=metadata), last=METADATA)
    # A kill here leaves both, and `open_best` takes the better one.
    for other in storage.names(BEST):
        if other != new:
            storage.remove(f"{BEST}/{other}")
    return True


@contextmanager
def open_best(storage: RunStorage, identity: Identity) -> Iterator[StoredCheckpoint | None]:
    """The best complete weights of this recipe and these data, or None."""
    kept = _all_best(storage, identity)
    for name in sorted(kept, key=lambda name: _score(kept[name]), reverse=True):
        with ExitStack() as stack:
            try:
                found = stack.enter_context(open_checkpoint(storage, name))
            except Damaged:
                continue
            yield found
            return
    yield None


def _all_best(storage: RunStorage, identity: Identity) -> dict[str, CheckpointMetadata]:
    """The metadata of the best weights in storage, without those of another run."""
    found = {f"{BEST}/{name}": read_metadata(storage, f"{BEST}/{name}") for name in newest_first(storage.names(BEST))}
    return {name: m for name, m in found.items() if m and m.identity.matches(identity) and "val/top1" in m.metrics}
