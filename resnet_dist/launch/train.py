"""The driver of a run: checks, connects, opens the MLflow run, lets Ray Train work, hands over the model.

`train` is the one driver function; a trial of a sweep is the same call with two more overrides. It can be killed at any
moment and called again with the same arguments: what is done is not done again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from data_prep.runtime.ray_errors import explain
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import (
    HeadWatch,
    asked_for,
    await_nodes,
    cluster_of,
    ray_session,
    require_capacity,
    this_machine,
    worker_bundles,
    workers_with_room,
)
from resnet_dist.launch.control import Status, StopSignal, start_control, stop_signals
from resnet_dist.launch.doctor import RAY_SNAPSHOT
from resnet_dist.launch.execute import ControllerLost, Fit, build_trainer, wait_for_room
from resnet_dist.launch.lease import HeldLease, held
from resnet_dist.launch.preflight import Prepared, prepare, require_no_sweep, require_none_written
from resnet_dist.launch.progress import Screen, Startup
from resnet_dist.launch.publish import (
    RunResult,
    Trained,
    complete,
    read_result,
    trained_before,
    trained_run,
    write_trained,
)
from resnet_dist.launch.record import Record, begin_record
from resnet_dist.launch.reservation import NO_CLAIM, give_back, give_back_request
from resnet_dist.launch.worker import WorkerSetup, node_cache
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.connection import server_credentials
from resnet_dist.tracking.mlflow_run import EndStatus
from resnet_dist.training.checkpoint import damaged_names, newest_step, prune
from resnet_dist.training.context import WorkerResult

_SHOW_EVERY_S = 0.5
_ANSWER_LIMIT_S = 5.0


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
    startup = Startup()
    startup.passed("imports")
    prepared = prepare(recipe, profile, name)
    require_no_sweep(prepared.storage)
    startup.passed("checks")
    if (done := read_result(prepared.storage)) is not None:
        return done
    if cluster_of(profile, os.environ) is None:
        require_capacity([this_machine(profile, torch.cuda.device_count())], profile)
    if prepared.none_whole:
        require_none_written(prepared.storage, prepared.damaged)
    screen = Screen(prepared.plan)
    for warning in prepared.warnings:
        screen.say(f"warning: {warning}")
    with held(prepared.storage, profile.failure.driver_timeout_s, screen.say) as lease:
        trained = trained_before(prepared)
        if trained is None:
            ended = _train_on_cluster(recipe, profile, name, prepared, screen, startup, lease, parent_run_id)
            if isinstance(ended, Stopped):
                return ended
            trained = ended
        return complete(trained, prepared.storage, profile.tracking_uri, screen.say)


def _train_on_cluster(
    recipe: Recipe,
    profile: Profile,
    name: str,
    prepared: Prepared,
    screen: Screen,
    startup: Startup,
    lease: HeldLease,
    parent_run_id: str | None,
) -> Trained | Stopped:
    """Trains to the end or to a stop; of what is trained, MLflow has no more than the workers sent."""
    with ray_session(profile):
        with asked_for(profile, worker_bundles(profile)):
            nodes = await_nodes(
                profile, lambda nodes: workers_with_room(nodes, profile) >= profile.workers.min, screen.say
            )
        require_capacity(nodes, profile)
        startup.passed("Ray")
        with stop_signals() as stop:
            record = begin_record(recipe, profile, name, prepared, nodes, screen.say, parent_run_id=parent_run_id)
            startup.passed("MLflow")

            def observe(status: Status) -> None:
                if (line := startup.observe(status)) is not None:
                    record.events.note(line)

            status: EndStatus = "FAILED"
            reason = "an unexpected error"
            trained: Trained | None = None
            try:
                result = train_and_record(recipe, profile, record, screen, stop, lease, observe)
                if result.outcome == "stopped":
                    status, reason = "KILLED", f"stopped after step {result.step}"
                    return Stopped(stop.exit_code, result.step, prepared.storage.location)
                if result.outcome == "diverged":
                    raise Fault(
                        f"training diverged: {result.reason} ({prepared.storage.location}); lower optim.lr or lengthen "
                        "schedule.warmup, and use a new --name"
                    )
                trained = trained_run(recipe, profile, name, prepared, result)
                write_trained(prepared.storage, trained)
                return trained
            except KeyboardInterrupt:
                status, reason = "KILLED", "interrupted"
                raise
            except (UserError, Fault, OSError) as error:
                reason = f"failed: {error}"
                raise
            finally:
                if trained is None and lease.is_ours():
                    record.close(status, reason)


def train_and_record(
    recipe: Recipe,
    profile: Profile,
    record: Record,
    screen: Screen,
    stop: StopSignal,
    lease: HeldLease,
    observe: Callable[[Status], None] = lambda status: None,
) -> WorkerResult:
    """Lets the workers train to the end or to a stop, and notes what came of it; connected to Ray. `record.close` is
    the caller's.

    `observe` is called about twice a second with where the run stands, and may set `stop`.
    """
    try:
        result = _train_on_ray(recipe, profile, record, screen, stop, lease, observe)
    except (UserError, Fault) as error:
        if lease.is_ours():
            record.events.note(f"failed: {error}")
        raise
    if not lease.is_ours():
        lease.lease.require_held()
    record.events.note(f"{result.outcome} after step {result.step}")
    return result


def _train_on_ray(
    recipe: Recipe,
    profile: Profile,
    record: Record,
    screen: Screen,
    stop: StopSignal,
    lease: HeldLease,
    observe: Callable[[Status], None],
) -> WorkerResult:
    """Runs trainers until the training is at its end or the user stops it: a trainer ends early if its controller dies,
    or if a node that it uses is about to leave.
    """
    prepared, failure = record.prepared, profile.failure
    give_back_request(lease.left_request)
    control = start_control()
    setup = _worker_setup(recipe, profile, record, control, lease)
    if setup.cache is not None:
        gigabytes = (prepared.train.beton_bytes + prepared.val.beton_bytes) / 1e9
        screen.say(f"each node copies what it lacks of {gigabytes:.1f} GB to {setup.cache.folder} first")

    claim = NO_CLAIM

    def show(status: Status) -> None:
        nonlocal claim
        if status.claim not in (claim, NO_CLAIM):
            claim = status.claim
            lease.note_request(claim.request)
        screen.show(status)
        record.events.observe(status)
        observe(status)

    damaged: Collection[str] = prepared.damaged
    lost_controllers = preemptions = 0
    while True:
        _clear_bookkeeping(prepared.storage, profile.checkpoint.keep, damaged)
        fit = Fit(build_trainer(profile, prepared.storage, setup))
        result: WorkerResult | None = None
        try:
            with screen.live():
                result = _watch(fit, control, profile, record, show, stop, lease)
        except ControllerLost as lost:
            lost_controllers += 1
            if lost_controllers > failure.max_controller_failures:
                raise Fault(f"{lost} (for the {lost_controllers}. time: failure.max_controller_failures)") from None
            give_back(claim)
            event = f"{lost}; another is started, from the last checkpoint"
        else:
            if result.outcome != "stopped" or stop.number is not None:
                return result
            preemptions += 1
            if failure.max_preemptions is not None and preemptions > failure.max_preemptions:
                raise Fault(f"nodes left the run {preemptions} times (failure.max_preemptions)")
            event = f"a node leaves: the workers ended after step {result.step} with a checkpoint and start elsewhere"
        screen.say(event)
        record.events.note(event)
        wait_for_room(profile, stop)
        if stop.number is not None and result is not None:
            return result
        _begin_again(control, failure.head_timeout_s)
        damaged = ()
        with suppress(OSError, Fault):  # storage that does not answer now condemns nothing
            damaged = damaged_names(prepared.storage)


def _begin_again(control: ray.actor.ActorHandle, limit_s: float) -> None:
    """Tells the actor, which may itself be on its way back, that a new trainer begins."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            ray.get(control.begin.remote(), timeout=_ANSWER_LIMIT_S)
            return
        except RayError as error:
            if time.monotonic() > deadline:
                why = explain(error).sentence
                raise Fault(f"the driver's own actor has not answered for {limit_s:g} s: {why}") from None
            time.sleep(_SHOW_EVERY_S)


def _worker_setup(recipe: Recipe, profile: Profile, record: Record, control: Any, lease: HeldLease) -> WorkerSetup:
    prepared = record.prepared
    return WorkerSetup(
        prepared.job(recipe, profile),
        prepared.storage,
        record.handle.run_id,
        profile.tracking_uri,
        control,
        failure=profile.failure,
        save_every_s=60 * profile.checkpoint.every_minutes if profile.checkpoint.every_minutes else None,
        lease=lease.lease,
        credentials=server_credentials(os.environ),
        cache=node_cache(profile, (prepared.train_source, prepared.val_source)),
    )


def _watch(
    fit: Fit,
    control: ray.actor.ActorHandle,
    profile: Profile,
    record: Record,
    show: Callable[[Status], None],
    stop: StopSignal,
    lease: HeldLease,
) -> WorkerResult:
    """Shows where the trainer stands until it ends. Raises Fault once it is known that nothing will come of it."""
    asked_at: float | None = None
    has_begun = False
    head = HeadWatch(profile.failure.head_timeout_s)
    while fit.is_running(_SHOW_EVERY_S):
        if stop.number is not None:
            if asked_at is None:
                asked_at = time.monotonic()
                record.say("stopping: the workers save a checkpoint first (once more to stop at once)")
            control.request_stop.remote()  # again and again: the actor may have been killed and come back
        if asked_at is not None and not has_begun:
            return WorkerResult("stopped", newest_step(record.prepared.storage), {})
        if asked_at is not None and time.monotonic() - asked_at > profile.failure.stop_grace_s:
            raise Fault(f"the workers did not stop within {profile.failure.stop_grace_s:g} s (failure.stop_grace_s)")
        head.look()
        if (status := _show(control, show)) is not None:
            has_begun |= status.has_workers
        if lease.lost is not None:
            raise lease.lost
    _show(control, show)
    return fit.result(record.prepared.storage)


def _show(control: ray.actor.ActorHandle, show: Callable[[Status], None]) -> Status | None:
    """Shows where the run stands, if the actor answers.

    Raises UserError or Fault if a worker found that no restart would help.
    """
    try:
        status: Status = ray.get(control.status.remote(), timeout=_ANSWER_LIMIT_S)
    except RayError:
        return None
    show(status)
    if status.mistake is not None:
        raise UserError(status.mistake)
    if status.given_up is not None:
        raise Fault(status.given_up)
    return status


def _clear_bookkeeping(storage: RunStorage, keep: int, damaged: Collection[str]) -> None:
    """Removes what a former trainer left: Ray's snapshot, `damaged` checkpoints, others beyond the newest `keep`.

    Where to resume is decided by the whole checkpoints themselves (`checkpoint.newest_whole`). Ray's snapshot of them
    is not written atomically and refuses a run whose folders changed, so no trainer starts from another's.
    """
    storage.remove(RAY_SNAPSHOT)
    prune(storage, keep, damaged)
