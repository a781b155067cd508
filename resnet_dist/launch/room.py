"""What the driver waits for, and for how long: nodes with room, and a head that answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault
from resnet_dist.launch.cluster import Node, alive_nodes

_LOOK_EVERY_S = 1.0
_CONNECT_LIMIT_S = 3.0


def await_nodes(profile: Profile, has_room: Callable[[Sequence[Node]], bool], say: Callable[[str], None]) -> list[Node]:
    """The cluster's nodes, as soon as `has_room` of them, or when `failure.wait_for_nodes_s` are over. Whether they do
    then is for the caller to judge."""
    limit_s = profile.failure.wait_for_nodes_s
    deadline = time.monotonic() + limit_s
    nodes = alive_nodes()
    if not has_room(nodes) and limit_s > 0:
        say(f"the cluster has no room yet: waiting up to {limit_s:g} s for nodes (failure.wait_for_nodes_s)")
    while not has_room(nodes) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        nodes = alive_nodes()
    return nodes


@contextmanager
def asked_for(profile: Profile, bundles: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """Inside, Ray's autoscaler, if there is one and the profile waits for it, is to keep nodes for all these bundles.

    Ray knows one such request for the whole cluster: that of the job which asked last.
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
    """What the fewest workers of the profile need, each on one node."""
    bundle = {"CPU": float(profile.cpus_per_worker), "GPU": float(profile.gpus_per_worker)}
    return [{name: amount for name, amount in bundle.items() if amount} for _ in range(profile.workers.min)]


class HeadWatch:
    """Knocks at the cluster's head. Without one, Ray ends this process after a minute with a page of C++ frames."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._address: str = ray.get_runtime_context().gcs_address
        self._answered_s = self._looked_s = time.monotonic()

    def look(self) -> None:
        """Call it often. Raises Fault if nobody has answered for the limit."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_LIMIT_S).close()
            self._answered_s = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._answered_s > self._limit_s:
                raise Fault(
                    f"the Ray head at {self._address} has not answered for {self._limit_s:g} s "
                    f"(failure.head_timeout_s): {error.strerror or error}; start a cluster and give the command again"
                ) from None
