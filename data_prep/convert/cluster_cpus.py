"""How many CPUs a Ray cluster has, which changes as nodes come and go."""

from __future__ import annotations

import threading
import time

import ray

ASKED_EVERY_S = 5.0


class ClusterCpus:
    """Asked by a thread of its own: Ray's question has no limit, and a head that restarts answers late or nothing."""

    def __init__(self) -> None:
        self._num_cpus = _ask()
        self._asked_s = time.monotonic()
        self._thread: threading.Thread | None = None

    def latest(self) -> int:
        """Does not wait."""
        is_asking = self._thread is not None and self._thread.is_alive()
        if not is_asking and time.monotonic() - self._asked_s > ASKED_EVERY_S:
            self._asked_s = time.monotonic()
            self._thread = threading.Thread(target=self._ask, daemon=True, name="cluster-cpus")
            self._thread.start()
        return self._num_cpus

    def _ask(self) -> None:
        self._num_cpus = _ask() or self._num_cpus


def _ask() -> int:
    return int(ray.cluster_resources().get("CPU", 0))
