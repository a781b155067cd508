"""Use of the machine during training, measured now and then by one worker of each node and logged like a curve.

Not MLflow's own monitor, which stops for good at its first failed request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psutil
import pynvml

from resnet_dist.tracking.tracker import Tracker

_MB = 1e6
_FIRST_AFTER_S = 1.0  # so that a short run has a point too


class NodeMonitor:
    """Call `observe` with every point of the training curves; it measures at most every `every_s` seconds.

    Keys are MLflow's: `system/node-<i>/cpu_utilization_percentage` and so on, `<i>` counting the run's nodes. Rates are
    means since the last point. Costs under a millisecond per point on a CPU; never raises.
    """

    def __init__(
        self, tracker: Tracker, node: int, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tracker = tracker
        self._prefix = f"system/node-{node}/"
        self._every_s = every_s
        self._clock = clock
        self._last_s = clock()
        self._last = _counters()
        self._due_s = _FIRST_AFTER_S
        self._gpus = NodeGpus()
        psutil.cpu_percent()  # the first call only starts the count

    def observe(self, step: int) -> None:
        now_s = self._clock()
        elapsed_s = now_s - self._last_s
        if elapsed_s < self._due_s:
            return
        self._due_s = self._every_s
        counters = _counters()
        rates = {key: (value - self._last.get(key, value)) / elapsed_s for key, value in counters.items()}
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
            **rates,
            **self._gpus.values(),
        }
        self._last_s, self._last = now_s, counters
        self._tracker.metrics({self._prefix + key: value for key, value in values.items()}, step)


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
        self._handles: list[Any] = []
        with suppress(pynvml.NVMLError):  # no driver, no GPU
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(k) for k in range(pynvml.nvmlDeviceGetCount())]

    def values(self) -> dict[str, float]:
        """Now, or over the last second where NVML does so; a GPU may not report everything (MIG, power of a laptop)."""
        found: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            for read in _READERS:
                with suppress(pynvml.NVMLError):
                    found |= {f"gpu_{index}_{key}": value for key, value in read(handle).items()}
        return found


def _memory(handle: Any) -> Mapping[str, float]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "memory_usage_megabytes": memory.used / _MB,
        "memory_usage_percentage": 100.0 * memory.used / memory.total,
    }


def _utilisation(handle: Any) -> Mapping[str, float]:
    return {"utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)}


def _power(handle: Any) -> Mapping[str, float]:
    watts, limit = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    return {"power_usage_watts": watts, "power_usage_percentage": 100.0 * watts / limit}


_READERS: tuple[Callable[[Any], Mapping[str, float]], ...] = (_memory, _utilisation, _power)
