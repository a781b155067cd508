"""What the driver waits for, and for how long: nodes with room, and a head that answers."""

from __future__ import annotations

import socket
import time

import ray

from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault
from resnet_dist.launch.cluster import alive_nodes, workers_with_room
from resnet_dist.launch.signals import StopSignal

_LOOK_EVERY_S = 1.0
_CONNECT_LIMIT_S = 3.0


def wait_for_room(profile: Profile, stop: StopSignal) -> None:
    """Until the nodes that stay have room for the fewest workers, `failure.wait_for_resources_s` at most.

    Returns too when the user wishes to stop. Raises Fault at the limit.
    """
    limit_s = profile.failure.wait_for_resources_s
    deadline = time.monotonic() + limit_s
    while (room := workers_with_room(alive_nodes(), profile)) < profile.workers.min and stop.number is None:
        if time.monotonic() > deadline:
            raise Fault(
                f"the nodes that are left have room for {room} workers of {profile.workers}, and no more came for "
                f"{limit_s:g} s (failure.wait_for_resources_s); add nodes and give the same command again"
            )
        time.sleep(_LOOK_EVERY_S)


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
