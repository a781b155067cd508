"""How many trials fit into a cluster at once. A trial holds all it needs before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from resnet_dist.config.profile import Profile
from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.launch.cluster import Node, no_gpus, remedy, worker_bundles, workers_with_room


def trials_at_once(space: Space, trial_profile: Profile, nodes: Sequence[Node]) -> int:
    """At most `resources.max_concurrent`."""
    resources = space.resources
    if resources.path == "light":
        # A hundredth of a GPU: 3 * 0.333 fit on one.
        fit = sum(
            int(min(node.cpus // resources.cpus, (node.gpus + 0.01) // resources.gpus if resources.gpus else 1e9))
            for node in nodes
        )
    else:
        fit = workers_with_room(list(nodes), trial_profile) // trial_profile.workers.min
    return min(fit, resources.max_concurrent or fit)


def trial_bundles(space: Space, trial_profile: Profile, num_trials: int) -> list[dict[str, float]]:
    """What so many trials need, `resources.max_concurrent` at most."""
    resources = space.resources
    at_once = min(num_trials, resources.max_concurrent or num_trials)
    if resources.path == "train":
        return worker_bundles(trial_profile) * at_once
    bundle = {"CPU": float(resources.cpus), "GPU": float(resources.gpus)}
    return [{name: amount for name, amount in bundle.items() if amount} for _ in range(at_once)]


def require_room(
    space: Space, trial_profile: Profile, nodes: Sequence[Node], environment: Mapping[str, str] = os.environ
) -> None:
    """UserError, with what was found, if not even one trial fits."""
    if trials_at_once(space, trial_profile, nodes) > 0:
        return
    resources, profile = space.resources, trial_profile
    found = ", ".join(f"{node.address}: {node.cpus:g} CPUs {node.gpus:g} GPUs" for node in nodes) or "no nodes"
    if resources.path == "light":
        has_gpu = any(node.gpus for node in nodes)
        raise UserError(
            f"a trial asks for {resources.cpus} CPUs and {resources.gpus:g} GPUs on one node, the cluster has {found}; "
            + (
                f"{no_gpus(environment)}set resources.gpus to 0 to train on CPUs, or add nodes with GPUs"
                if resources.gpus and not has_gpu
                else "lower resources.cpus or resources.gpus, or add nodes"
            )
        )
    raise UserError(
        f"a trial asks for {profile.workers} workers of {profile.cpus_per_worker} CPUs and {profile.gpus_per_worker} "
        f"GPUs, the cluster has {found}; {remedy(nodes, profile, environment)}"
    )
