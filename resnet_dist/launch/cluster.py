"""Connecting to Ray: the cluster that the profile names, the cluster of the current job, or a local Ray."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import ray
import torch
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from data_prep.runtime.environment import cluster_address, given_address, without_proxy
from data_prep.runtime.ray_connection import connect, start_local
from resnet_dist.config.profile import FailureConfig, Profile
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.ray_internals import leaving_nodes
from resnet_dist.tracking.connection import client_environment

NAMESPACE = "resnet-dist"
_COUNT_AGAIN_S = 30.0
_LOOK_EVERY_S = 1.0
_CONNECT_LIMIT_S = 3.0
_MOST_LISTED = 4
_MOST_CHECKS_PER_S = 500


@dataclass(frozen=True)
class ClusterNode:
    """What one node of the cluster offers."""

    address: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    node_id: str = ""
    """Ray's."""


def cluster_of(profile: Profile, environment: Mapping[str, str]) -> str | None:
    """The address to connect to, in order of precedence; None means a local Ray that this process starts and ends.

    1. `ray_address` of the profile. 2. RAY_ADDRESS, which Ray sets for the driver of a submitted job. Raises UserError.
    """
    return cluster_address(*given_address(profile.ray_address, environment))


def start_timeout_s(failure: FailureConfig) -> float:
    """How long Ray waits for one group's CPUs and GPUs before it counts again how many workers fit."""
    return min(failure.wait_for_resources_s, _COUNT_AGAIN_S)


def ray_settings(profile: Profile, *, local: bool) -> dict[str, str]:
    """Environment variables that Ray Train reads in the driver."""
    settings = {
        # A checkpoint report waits for the controller's next look: 2 s by default, expensive for short epochs. It is a
        # call to every worker, so a thousand workers have Ray's 2 s.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{max(0.5, profile.workers.max / _MOST_CHECKS_PER_S):g}",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(profile.failure.collective_timeout_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_timeout_s(profile.failure)),
        # A stopped process cannot end itself: Ray, which gets no more heartbeats, ends it within the same time.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(profile.failure.progress_timeout_s),
        # It keeps the group running until the node is gone, and loses the steps since the last checkpoint; here the
        # group stops at once and resumes elsewhere (`control.RunControl.should_stop`).
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if local:
        settings["RAY_TRAIN_METRICS_ENABLED"] = "0"
    return settings


def worker_environment(profile: Profile) -> dict[str, dict[str, str]] | None:
    """The profile's variables, and short MLflow requests for workers that talk to a server.

    None if there are neither: then Ray can reuse idle worker processes.
    """
    client = client_environment() if profile.tracking_uri.startswith("http") else {}
    merged = {**client, **profile.env}
    return {"env_vars": merged} if merged else None


@contextmanager
def ray_session(profile: Profile, *, dashboard: bool = False) -> Iterator[None]:
    """Connects, and disconnects at the end; a local Ray is ended with it.

    `dashboard`: of a local Ray. Without it Ray Train cannot release the resources of a worker group whose driver died.
    Raises UserError if there is no cluster, or one of another version of Ray; Fault if a local Ray does not start.
    """
    given, source = given_address(profile.ray_address, os.environ)
    address = cluster_address(given, source)
    for key, value in ray_settings(profile, local=address is None).items():
        os.environ.setdefault(key, value)
    if address is None:
        start_local(num_cpus=profile.local_cpus, dashboard=dashboard, namespace=NAMESPACE)
    else:
        os.environ.update(without_proxy(os.environ, [address.rpartition("://")[2].rpartition(":")[0]]))
        connect(address, source=source, namespace=NAMESPACE)
    try:
        yield
    finally:
        ray.shutdown()


def alive_nodes() -> list[ClusterNode]:
    """The nodes of the connected cluster that are not about to leave."""
    leaving = leaving_nodes()
    return [
        ClusterNode(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node.get("Labels", {}),
            node["NodeID"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def worker_capacity(nodes: Sequence[ClusterNode], profile: Profile) -> int:
    """How many of the profile's workers the nodes can hold."""
    fitting = [node for node in nodes if profile.node_labels.items() <= node.labels.items()]
    return workers_that_fit(fitting, profile.cpus_per_worker, profile.gpus_per_worker)


def workers_that_fit(nodes: Sequence[ClusterNode], cpus_per_worker: int, gpus_per_worker: int) -> int:
    """How many workers the nodes can hold, each on a single node."""
    return sum(
        int(min(node.cpus // cpus_per_worker, node.gpus // gpus_per_worker if gpus_per_worker else float("inf")))
        for node in nodes
    )


def require_capacity(
    nodes: Sequence[ClusterNode], profile: Profile, environment: Mapping[str, str] = os.environ
) -> None:
    """UserError, with what was found and what would help, if the nodes cannot hold the profile's workers."""
    wanted = profile.node_labels.items()
    fitting = [node for node in nodes if wanted <= node.labels.items()]
    fit = workers_that_fit(fitting, profile.cpus_per_worker, profile.gpus_per_worker)
    if fit >= profile.workers.min:
        return
    found = listed(fitting)
    if wanted:
        found += f" with {', '.join(f'{key}={value}' for key, value in wanted)}, of {len(nodes)} in all"
    raise UserError(
        f"the profile asks for {profile.workers} workers of {profile.cpus_per_worker} CPUs and "
        f"{profile.gpus_per_worker} GPUs, the cluster holds {fit} ({found}); {remedy(fitting, profile, environment)}"
    )


def by_kind(nodes: Sequence[ClusterNode]) -> dict[str, list[ClusterNode]]:
    """What a node offers, in words -> the nodes that offer it, the largest group first."""
    kinds: dict[str, list[ClusterNode]] = {}
    for node in nodes:
        accelerator = node.labels.get("ray.io/accelerator-type")
        offer = f"{node.cpus:g} CPUs {node.gpus:g} GPUs" + (f" ({accelerator})" if accelerator else "")
        kinds.setdefault(offer, []).append(node)
    return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))


def listed(nodes: Sequence[ClusterNode]) -> str:
    """What each node offers, in words; of more than a few, how many offer what."""
    if len(nodes) > _MOST_LISTED:
        return ", ".join(f"{len(alike)} x {offer}" for offer, alike in by_kind(nodes).items())
    return ", ".join(f"{node.address}: {node.cpus:g} CPUs {node.gpus:g} GPUs" for node in nodes) or "no nodes"


def remedy(nodes: Sequence[ClusterNode], profile: Profile, environment: Mapping[str, str]) -> str:
    """What would let the workers fit into nodes that lack room for them. Pure."""
    cpus, gpus = profile.cpus_per_worker, profile.gpus_per_worker
    if not nodes:
        return "add such nodes, or correct node_labels" if profile.node_labels else "add nodes"
    if fit := workers_that_fit(nodes, cpus, gpus):
        return f"set workers to {fit} or less, or add nodes"
    if gpus and workers_that_fit(nodes, cpus, 0) and not any(node.gpus for node in nodes):
        return f"{no_gpus(environment)}set gpus_per_worker to 0 to train on CPUs, or add nodes with GPUs"
    if workers_that_fit(nodes, 1, gpus):
        return f"set cpus_per_worker to {max(int(node.cpus) for node in nodes)} or less, or add larger nodes"
    if gpus:
        lacking = "both" if any(node.gpus for node in nodes) else "a GPU"
        return f"{no_gpus(environment)}no node has {lacking}; use another profile, or add nodes with GPUs"
    return "add nodes with CPUs"


def no_gpus(environment: Mapping[str, str]) -> str:
    """Why Ray may not see existing GPUs; "" if nothing suggests so."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ""
    return f"CUDA_VISIBLE_DEVICES={visible} says which GPUs of this machine are seen; unset it, "


def this_machine(profile: Profile, num_gpus: int) -> ClusterNode:
    """The one node of the local Ray that would be started."""
    return ClusterNode("this machine", float(profile.local_cpus or os.cpu_count() or 1), float(num_gpus))


def require_capacity_here(profile: Profile) -> None:
    """UserError if the local Ray that would be started cannot hold the profile's workers; of a cluster nothing is known
    before it is connected.
    """
    if cluster_of(profile, os.environ) is None:
        require_capacity([this_machine(profile, torch.cuda.device_count())], profile)


def wait_for_capacity(profile: Profile, log: Callable[[str], None]) -> None:
    """Waits until the connected cluster can hold the profile's workers, `failure.wait_for_nodes_s` at most.

    Raises UserError if it cannot then.
    """
    with nodes_requested(profile, worker_bundles(profile)):
        nodes = wait_for_nodes(profile, lambda nodes: worker_capacity(nodes, profile) >= profile.workers.min, log)
    require_capacity(nodes, profile)


def wait_for_nodes(
    profile: Profile, is_enough: Callable[[Sequence[ClusterNode]], bool], log: Callable[[str], None]
) -> list[ClusterNode]:
    """The cluster's nodes, as soon as they are enough, or when `failure.wait_for_nodes_s` are over; the caller checks
    which."""
    limit_s = profile.failure.wait_for_nodes_s
    deadline = time.monotonic() + limit_s
    nodes = alive_nodes()
    if not is_enough(nodes) and limit_s > 0:
        log(f"the cluster has no room yet: waiting up to {limit_s:g} s for nodes (failure.wait_for_nodes_s)")
    while not is_enough(nodes) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        nodes = alive_nodes()
    return nodes


@contextmanager
def nodes_requested(profile: Profile, bundles: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """Within the context, Ray's autoscaler, if there is one and the profile waits for it, keeps nodes for all these
    bundles.

    Ray keeps one such request for the entire cluster: that of the job that asked last.
    """
    if profile.failure.wait_for_nodes_s == 0:
        yield
        return
    labels = [dict(profile.node_labels) for _ in bundles] if profile.node_labels else None
    request_resources(bundles=[dict(bundle) for bundle in bundles], bundle_label_selectors=labels)
    try:
        yield
    finally:
        with suppress(RayError, RuntimeError):  # a head that is gone keeps no request
            request_resources(bundles=[])


def worker_bundles(profile: Profile) -> list[dict[str, float]]:
    """The resources of the profile's smallest number of workers, each on one node."""
    bundle = {"CPU": float(profile.cpus_per_worker), "GPU": float(profile.gpus_per_worker)}
    return [{name: amount for name, amount in bundle.items() if amount} for _ in range(profile.workers.min)]


class HeadWatch:
    """Checks that the cluster's head is reachable. If it is not, Ray ends this process after a minute with a page of
    C++ frames."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._address: str = ray.get_runtime_context().gcs_address
        self._answered_s = self._checked_s = time.monotonic()

    def check(self) -> None:
        """Call it often. Raises Fault if there was no response for the limit."""
        now_s = time.monotonic()
        if now_s - self._checked_s < _LOOK_EVERY_S:
            return
        self._checked_s = now_s
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_LIMIT_S).close()
            self._answered_s = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._answered_s > self._limit_s:
                raise Fault(
                    f"the Ray head at {self._address} has not responded for {self._limit_s:g} s "
                    f"(failure.head_timeout_s): {error.strerror or error}; start a cluster and run the command again"
                ) from None
