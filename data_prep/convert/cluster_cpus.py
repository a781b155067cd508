"""How many CPUs a Ray cluster has, which changes as nodes come and go."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import ray

ASKED_EVERY_S = 5.0
FIRST_ANSWER_LIMIT_S = 30.0


class ClusterCpus:
    """Asked by a thread: Ray's question has no limit of its own, and a head that restarts answers late, or nothing."""

    def __init__(self) -> None:
        """Waits for the first answer, but not for ever."""
        self._num_cpus = 0
        self._start_asking().join(FIRST_ANSWER_LIMIT_S)

    def latest(self) -> int:
        """The last answer with any CPUs; 0: there was none. Does not wait."""
        if not self._thread.is_alive() and time.monotonic() - self._asked_s > ASKED_EVERY_S:
            self._start_asking()
        return self._num_cpus

    def _start_asking(self) -> threading.Thread:
        self._asked_s = time.monotonic()
        self._thread = threading.Thread(target=self._ask, daemon=True, name="cluster-cpus")
        self._thread.start()
        return self._thread

    def _ask(self) -> None:
        with suppress(Exception):  # of many kinds, when the head is gone: the next answer tells
            self._num_cpus = int(ray.cluster_resources().get("CPU", 0)) or self._num_cpus
