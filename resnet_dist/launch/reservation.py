"""What a worker group has of the cluster, and how it is given back when nobody is left to do so."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from data_prep.runtime.ray_errors import explain

_log = logging.getLogger(__name__)
_COORDINATOR = "AutoscalingCoordinator"
"""Ray's detached actor of this name, in a namespace of this name: it shares the nodes out among elastic trainings."""
_ANSWER_LIMIT_S = 10.0


@dataclass(frozen=True)
class Claim:
    """Ids, as Ray knows them; empty: none."""

    placement_group: str = ""
    """Hexadecimal. What is reserved in the name of a driver stays so while the driver lives."""
    request: str = ""
    """Of the controller, at the coordinator: after a sudden death it stands for 3 minutes (ray 2.60), in which an
    elastic training that follows gets none of those nodes."""


NO_CLAIM = Claim()


def current_claim() -> Claim:
    """Of the worker group that this worker is in."""
    from ray.train.v2._internal.execution.context import get_train_context  # no public name for the id

    group = ray.util.get_current_placement_group()
    run_id = get_train_context().train_run_context.run_id
    return Claim("" if group is None else group.id.hex(), f"train-{run_id}")


def give_back(claim: Claim) -> None:
    """In the place of a controller that died.

    Ray Train has a process for placement groups too, but it asks the dashboard, which a cluster need not have.
    """
    if claim.placement_group:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(claim.placement_group))))
    give_back_request(claim.request)


def give_back_request(request: str) -> None:
    """Never raises: at worst the request ends by itself, after 3 minutes."""
    if not request:
        return
    try:
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
        ray.get(coordinator.cancel_request.remote(request), timeout=_ANSWER_LIMIT_S)
    except RayError as error:
        why = explain(error).sentence
        _log.warning("%s was not given back (%s); it ends by itself within 3 minutes", request, why)
    except ValueError:
        return  # no elastic training has run on this cluster
