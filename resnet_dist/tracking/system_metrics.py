"""Use of the machine during training, measured at intervals by one worker of each node and logged like a curve.

Not MLflow's own monitor, which stops for good at its first failed request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from resnet_dist.gpus.nvml import gpu_handles, query
from resnet_dist.tracking.tracker import Tracker

_MB = 1e6
MANY_NODES = 16
"""On more nodes than this, each logs less, and less often."""


class NodeMonitor:
    """Measures this node in a thread of its own. `observe` and `close` never wait: an NVML that hangs holds up neither
    training nor the end of the process.

    Keys are MLflow's: `system/node-<i>/cpu_utilization_percentage` and so on, `<i>` counting the run's nodes. Rates are
    means since the last point.

    Args:
        tracker: gets the points, from the thread.
        num_nodes: of the run. The nodes together log as many points a second as MANY_NODES do, and on more nodes a
            point has only the least and the greatest value of the node's GPUs.
        every_s: time between two points of each of a few nodes.
        gpus: makes the reader of the GPUs, in the thread.
    """

    def __init__(
        self,
        tracker: Tracker,
        node: int,
        *,
        num_nodes: int = 1,
        every_s: float = 10.0,
        first_after_s: float = 1.0,
        gpus: Callable[[], NodeGpus] | None = None,
    ) -> None:
        self._tracker = tracker
        self._prefix = f"system/node-{node}/"
        self._has_many_nodes = num_nodes > MANY_NODES
        self._every_s = every_s * times_less_often(num_nodes)
        self._first_after_s = first_after_s  # soon, so that a short run has a point too
        self._open_gpus = gpus or NodeGpus
        self._step: int | None = None
        self._closing = threading.Event()
        self._logging = threading.Lock()
        threading.Thread(target=self._measure_until_closed, name="node-monitor", daemon=True).start()

    def observe(self, step: int) -> None:
        """The next point is at this step."""
        self._step = step

    def close(self) -> None:
        """After this, the tracker gets no more points."""
        self._closing.set()
        with self._logging:  # held only while a point is put in memory
            pass

    def _measure_until_closed(self) -> None:
        gpus = self._open_gpus()
        psutil.cpu_percent()  # the first call only starts the count
        last_s, last, logged_step = time.monotonic(), _counters(), None
        wait_s = self._first_after_s
        while not self._closing.wait(wait_s):
            step = self._step
            if step == logged_step:  # a metric has one point a step
                continue
            assert step is not None
            now_s, counters, memory = time.monotonic(), _counters(), psutil.virtual_memory()
            of_gpus = gpus.values()
            values = {
                "cpu_utilization_percentage": psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / _MB,
                "system_memory_usage_percentage": memory.percent,
                **{key: (value - last.get(key, value)) / (now_s - last_s) for key, value in counters.items()},
                **(extremes(of_gpus) if self._has_many_nodes else of_gpus),
            }
            with self._logging:
                if self._closing.is_set():
                    return
                self._tracker.metrics({self._prefix + key: value for key, value in values.items()}, step)
            last_s, last, logged_step, wait_s = now_s, counters, step, self._every_s


def times_less_often(num_nodes: int) -> float:
    """Keeps the points that all nodes log in a second at those of MANY_NODES."""
    return max(1.0, num_nodes / MANY_NODES)


def extremes(of_gpus: Mapping[str, float]) -> dict[str, float]:
    """`gpu_0_power_usage_watts`, `gpu_1_power_usage_watts` ... -> `gpu_min_power_usage_watts`, `gpu_max_...`."""
    by_name: dict[str, list[float]] = {}
    for key, value in of_gpus.items():
        by_name.setdefault(key.split("_", 2)[2], []).append(value)
    return {f"gpu_{of.__name__}_{name}": of(values) for name, values in by_name.items() for of in (min, max)}


def process_began_s() -> float:
    """When this process was started, Unix time in seconds; the current time if that is not known."""
    try:
        return float(psutil.Process().create_time())
    except (OSError, psutil.Error):
        return time.time()


def _counters() -> dict[str, float]:
    """Megabytes since the machine started; without what this machine does not report."""
    try:
        disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
    except (OSError, RuntimeError, psutil.Error):  # a container that hides /proc
        return {}
    totals: dict[str, float] = {}
    if disk:
        totals |= {"disk_read_mb_per_s": disk.read_bytes / _MB, "disk_write_mb_per_s": disk.write_bytes / _MB}
    if network:
        totals |= {"network_receive_mb_per_s": network.bytes_recv / _MB}
        totals |= {"network_transmit_mb_per_s": network.bytes_sent / _MB}
    return totals


class NodeGpus:
    """All NVIDIA GPUs of the node, also those that this process may not compute on, from NVML. Never raises.

    Keys are MLflow's, `gpu_<i>_utilization_percentage` and so on, `<i>` as `nvidia-smi` counts.
    """

    def __init__(self) -> None:
        self._handles = gpu_handles()

    def values(self) -> dict[str, float]:
        """Now, or over the last second where NVML does so; a GPU may not report everything (MIG, power of a laptop)."""
        found: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            found |= {f"gpu_{index}_{key}": value for key, value in _gpu_use(handle).items()}
        return found


def _gpu_use(handle: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    if memory := query("nvmlDeviceGetMemoryInfo", handle):
        found["memory_usage_megabytes"] = memory.used / _MB
        found["memory_usage_percentage"] = 100.0 * memory.used / memory.total
    if rates := query("nvmlDeviceGetUtilizationRates", handle):
        found["utilization_percentage"] = float(rates.gpu)
    power_mw, limit_mw = query("nvmlDeviceGetPowerUsage", handle), query("nvmlDeviceGetEnforcedPowerLimit", handle)
    if power_mw is not None and limit_mw:
        found |= {"power_usage_watts": power_mw / 1000, "power_usage_percentage": 100.0 * power_mw / limit_mw}
    return found
