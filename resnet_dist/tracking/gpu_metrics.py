"""What a node's NVIDIA GPUs do, from NVML: all of the node's, also those that this process may not compute on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pynvml

_MB = 1e6


class NodeGpus:
    """Keys are MLflow's, `gpu_<i>_utilization_percentage` and so on, `<i>` as `nvidia-smi` counts. Never raises."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        with suppress(pynvml.NVMLError):  # no driver, no GPU
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(k) for k in range(pynvml.nvmlDeviceGetCount())]

    def values(self) -> dict[str, float]:
        """Now, or over the last second where NVML says so; without what a GPU does not tell (MIG, a laptop's power)."""
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
