"""Everything that uses Ray's private names. They are those of ray 2.60; with another version, which they may not fit,
nothing here touches them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from data_prep.runtime.ray_errors import explain, is_lost_process
from resnet_dist.errors import Fault

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.train.torch import TorchTrainer
    from ray.tune.experiment import Trial

_log = logging.getLogger(__name__)
_KNOWN_RAY = "2.60"
_COORDINATOR = "AutoscalingCoordinator"
"""Ray's detached actor of this name, in a namespace of this name: it distributes the nodes to elastic trainings."""
_ANSWER_LIMIT_S = 10.0


def _is_known() -> bool:
    return ray.__version__.startswith(f"{_KNOWN_RAY}.")


# What a worker group has reserved. A controller that dies leaves a placement group, which stays as long as the driver
# lives, and a request at the autoscaler's coordinator, which stays for 3 minutes; its successor has to release both.
# With another version of Ray the ids are unknown, and only Ray's own clean-up happens.


@dataclass(frozen=True)
class Reservation:
    """Ids, as Ray knows them; empty: none."""

    placement_group: str = ""
    """Hexadecimal. A driver's reservations last as long as the driver lives."""
    request: str = ""
    """The controller's request at the coordinator. It outlives a sudden death by 3 minutes, in which the next elastic
    training gets none of those nodes."""


NO_RESERVATION = Reservation()


def current_reservation() -> Reservation:
    """The reservation of the worker group that this worker is in."""
    if not _is_known():
        return NO_RESERVATION
    from ray.train.v2._internal.execution.context import get_train_context

    group = ray.util.get_current_placement_group()
    run_id = get_train_context().train_run_context.run_id
    return Reservation("" if group is None else group.id.hex(), f"train-{run_id}")


def release(reservation: Reservation) -> None:
    """Does what a controller that died would have done. Ray Train has a process for placement groups too, but that asks
    the dashboard, which a cluster need not have.
    """
    if reservation.placement_group:
        from ray._raylet import PlacementGroupID

        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(reservation.placement_group))))
    release_request(reservation.request)


def make_cleanup_ask_own_cluster(trainer: TorchTrainer) -> None:
    """Ray Train's clean-up of placement groups asks whether the controller lives; from now on, in its own cluster.

    Ray 2.60 asks the cluster that `ray start` began last on this machine. With two clusters on one machine it misses
    the controller, and takes the placement group from under running workers.
    """
    if not _is_known():
        return
    from ray.train.v2._internal.callbacks import placement_group_callback as rays

    class Cleaner(rays.PlacementGroupCleaner):
        def __init__(self, **arguments: Any) -> None:
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # of this process, which does only this
            super().__init__(**arguments)

    class Callback(rays.PlacementGroupCleanerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            rays.PlacementGroupCleaner = Cleaner  # in the controller's process
            super().after_controller_start(train_run_context)

    default = trainer._create_default_callbacks

    def callbacks() -> list[Any]:
        return [Callback() if isinstance(c, rays.PlacementGroupCleanerCallback) else c for c in default()]

    trainer._create_default_callbacks = callbacks


def release_request(request: str) -> None:
    """Never raises: at worst the request expires after 3 minutes."""
    if not request:
        return
    try:
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
        ray.get(coordinator.cancel_request.remote(request), timeout=_ANSWER_LIMIT_S)
    except RayError as error:
        why = explain(error).sentence
        _log.warning("%s was not released (%s); it expires within 3 minutes", request, why)
    except ValueError:
        return  # no elastic training has run on this cluster


# Nodes that leave.


def leaving_nodes() -> frozenset[str]:
    """Ids of the nodes that announced their departure: drained by hand, by the cluster or by the cloud. Empty if Ray
    cannot say.

    Ray Train asks the same (Ray Train's preemption watcher).
    """
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except Exception:  # noqa: BLE001 - not connected, or a GCS that does not respond: asked again in a second
        return frozenset()


# What `submit` uploads.


def uploaded_files(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Path relative to `folder` -> bytes, of what Ray sends as a job's `working_dir`. Raises Fault with another Ray.

    Args:
        excludes: patterns in the syntax of .gitignore, besides Ray's own and those of .gitignore and .rayignore.
    """
    if not _is_known():
        raise Fault(f"`submit` needs Ray {_KNOWN_RAY}, this is {ray.__version__}; pip install 'ray=={_KNOWN_RAY}.*'")
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    folder = folder.absolute()
    found: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.stat().st_size

    excluded = _get_excludes(folder, [*ray_constants.get_runtime_env_default_excludes(), *excludes])
    with_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    # Ray's own logger has a line for every file that is left out.
    _dir_travel(folder, [excluded], add, include_gitignore=with_gitignore, logger=_log)
    return found


def most_upload_bytes() -> int:
    """The limit of Ray's dashboard for one upload."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    return int(DASHBOARD_CLIENT_MAX_SIZE)


def cluster_version(client: JobSubmissionClient) -> str | None:
    """The version of Ray on the head; None if it does not say."""
    version: str | None = getattr(client, "_server_ray_version", None)
    return version


# How Ray Tune sees its actors.


def trial_actor(trial: Trial) -> Any:
    """The actor in which Tune runs the trial; None before its first step and after its last one."""
    return trial.temporary_state.ray_actor


@contextmanager
def every_lost_actor_is_a_dead_one() -> Iterator[None]:
    """Within the context, Tune counts every loss of an actor as its death.

    By itself Tune knows only RayActorError, and ends the sweep if an actor runs out of memory or is lost with its node.
    With another version of Ray nothing is changed: there the same command has to resume such a sweep.
    """
    if not _is_known():
        yield
        return
    from ray.air.execution._internal import RayActorManager

    of_task, of_start = RayActorManager._actor_task_failed, RayActorManager._actor_start_failed

    def task_failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        of_task(self, tracked_actor_task, as_actor_error(exception))

    def start_failed(self: RayActorManager, tracked_actor: Any, exception: Exception) -> None:
        of_start(self, tracked_actor, as_actor_error(exception))

    RayActorManager._actor_task_failed, RayActorManager._actor_start_failed = task_failed, start_failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed, RayActorManager._actor_start_failed = of_task, of_start


def as_actor_error(error: Exception) -> Exception:
    """The loss of a process as RayActorError; any other error as it is."""
    if not is_lost_process(error) or isinstance(error, RayActorError):
        return error
    return RayActorError(None, str(error))
