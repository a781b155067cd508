"""Connecting to Ray: the cluster the profile names, the one of the job this runs in, or a local one of its own."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray

from resnet_dist.config.profile import FailureConfig, Profile
from resnet_dist.errors import Fault, UserError

NAMESPACE = "resnet-dist"
_CONNECT_LIMIT_S = 10.0
_COUNT_AGAIN_S = 30.0


@dataclass(frozen=True)
class Node:
    """What one node of the cluster offers."""

    address: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    node_id: str = ""
    """Ray's."""


def cluster_address(profile: Profile, environment: Mapping[str, str]) -> str | None:
    """The address to connect to, in order of precedence; None means a local Ray that this process starts and ends.

    1. `ray_address` of the profile. 2. RAY_ADDRESS, which Ray sets for the driver of a submitted job.
    """
    return profile.ray_address or environment.get("RAY_ADDRESS")


def start_timeout_s(failure: FailureConfig) -> float:
    """How long Ray waits for one group's CPUs and GPUs before it counts again how many workers there is room for."""
    return min(failure.wait_for_resources_s, _COUNT_AGAIN_S)


def ray_settings(profile: Profile, *, local: bool) -> dict[str, str]:
    """Environment variables that Ray Train reads in the driver."""
    settings = {
        # A checkpoint report waits for the controller's next look: 2 s by default, dear for short epochs.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(profile.failure.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_timeout_s(profile.failure)),
        # A stopped process cannot end itself: Ray, which no longer hears of it, does, in the same time.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(profile.failure.progress_timeout_s),
        # It keeps the group at work until the node is gone, and what is done after its last checkpoint is lost; here
        # the group stops at once, and goes on elsewhere (`control.RunControl.asks`).
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if local:
        settings["RAY_TRAIN_METRICS_ENABLED"] = "0"
    return settings


@contextmanager
def ray_session(profile: Profile, *, dashboard: bool = False) -> Iterator[None]:
    """Connects, and disconnects at the end; a local Ray is ended with it.

    `dashboard`: of a local Ray. Without it Ray Train cannot give back what a worker group held whose driver died.
    Raises UserError if there is no cluster, Fault if a local Ray does not start.
    """
    address = cluster_address(profile, os.environ)
    for key, value in ray_settings(profile, local=address is None).items():
        os.environ.setdefault(key, value)
    if address is None:
        _start_local(profile, dashboard)
    else:
        _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    mend = "start one, or mend ray_address or RAY_ADDRESS"
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        # Ray itself tries for minutes, and prints C++ warnings meanwhile.
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_LIMIT_S).close()
        except OSError as error:
            raise UserError(f"no Ray cluster at {address}: {error.strerror or error}; {mend}") from None
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, TimeoutError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}; {mend}") from None


def _start_local(profile: Profile, dashboard: bool) -> None:
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on all interfaces and turns token authentication on by itself. A token of this process alone
        # keeps others out, and leaves no file behind that would change how later Rays of this user start.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        ray.init(
            address="local",
            num_cpus=profile.local_cpus,
            include_dashboard=dashboard,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # Ray gives a local node 30 s to come up, and then raises just that
        raise Fault(
            f"Ray did not start on this machine: {' '.join(str(error).split())} The same command may work when the "
            "machine is less busy; or start Ray by `ray start --head` and set RAY_ADDRESS"
        ) from error


def alive_nodes() -> list[Node]:
    """The nodes of the connected cluster that are not about to leave."""
    leaving = leaving_nodes()
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node.get("Labels", {}),
            node["NodeID"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def leaving_nodes() -> frozenset[str]:
    """Ids of the nodes that announced that they leave: drained by hand, by the cluster or by the cloud. Empty if Ray
    cannot say.

    Ray Train asks the same (2.60, `train/v2/_internal/execution/preemption.py`); there is no public name for it.
    """
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except Exception:  # noqa: BLE001 - not connected, or a GCS that does not answer: asked again in a second
        return frozenset()


def workers_with_room(nodes: Sequence[Node], profile: Profile) -> int:
    """How many of the profile's workers the nodes can hold."""
    fitting = [node for node in nodes if profile.node_labels.items() <= node.labels.items()]
    return workers_that_fit(fitting, profile.cpus_per_worker, profile.gpus_per_worker)


def workers_that_fit(nodes: Sequence[Node], cpus_per_worker: int, gpus_per_worker: int) -> int:
    """How many workers the nodes can hold, each whole on one node."""
    return sum(
        int(min(node.cpus // cpus_per_worker, node.gpus // gpus_per_worker if gpus_per_worker else float("inf")))
        for node in nodes
    )


def require_capacity(nodes: list[Node], profile: Profile) -> None:
    """UserError, with what was found, if the cluster cannot hold the profile's workers."""
    wanted = profile.node_labels.items()
    fitting = [node for node in nodes if wanted <= node.labels.items()]
    fit = workers_that_fit(fitting, profile.cpus_per_worker, profile.gpus_per_worker)
    if fit < profile.workers.min:
        found = ", ".join(f"{node.address}: {node.cpus:g} CPUs {node.gpus:g} GPUs" for node in fitting) or "no nodes"
        if wanted:
            found += f" with {', '.join(f'{key}={value}' for key, value in wanted)}, of {len(nodes)} in all"
        raise UserError(
            f"the profile asks for {profile.workers} workers of {profile.cpus_per_worker} CPUs and "
            f"{profile.gpus_per_worker} GPUs, the cluster holds {fit} ({found}); set workers to {max(fit, 1)} or less, "
            "or add nodes"
        )
