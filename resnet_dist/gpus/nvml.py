"""A node's GPUs as NVML sees them, also those that this process may not compute on. Nothing here raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

try:
    import pynvml
except ImportError:  # `bench gpu` runs without it
    pynvml = None

_MAX_NVLINKS = 36  # NVML_NVLINK_MAX_LINKS
_TEMPERATURE, _SLOWDOWN_THRESHOLD, _UNCORRECTED, _SINCE_LOADED = 0, 1, 1, 0  # NVML's enumerations
_SLOWED_BY = {  # nvidia-smi's names; not the low clock of an idle GPU, nor the ordinary limit of power
    0x08: "HW slowdown",
    0x20: "SW thermal slowdown",
    0x40: "HW thermal slowdown",
    0x80: "HW power brake",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU. None: NVML, or this GPU, does not report it."""

    name: str
    capability: tuple[int, int] | None = None
    """Compute capability: (9, 0) for an H100."""
    num_devices: int = 1
    """How many devices processes can be given: the GPU itself, or its MIG slices."""
    num_nvlinks: int | None = None
    """Active ones."""
    pcie_generation: int | None = None
    """The highest of GPU and slot together. The current one says little: an idle GPU slows its link down."""
    pcie_width: int | None = None
    """Lanes in use."""
    max_pcie_width: int | None = None
    temperature_c: int | None = None
    slowdown_c: int | None = None
    """The temperature at which the GPU lowers its clock."""
    slowed_by: tuple[str, ...] = ()
    """Why its clock is lower now than it should be."""
    uncorrected_errors: int | None = None
    """Of ECC, since the driver was loaded."""
    repair_pending: bool | None = None
    """Bad memory is replaced at the next reset: a page to be retired, a row to be remapped."""
    repair_failed: bool | None = None
    """A bad row could not be remapped."""


@dataclass(frozen=True)
class InstalledGpus:
    driver: str | None = None
    """Version of the kernel's driver, `580.65.06`; None without one."""
    gpus: tuple[Gpu, ...] = ()
    num_lost: int = 0
    """GPUs that no longer respond: "fallen off the bus" in the kernel's log."""

    @property
    def num_devices(self) -> int:
        return sum(gpu.num_devices for gpu in self.gpus)


def read_gpus() -> InstalledGpus:
    """Takes some milliseconds for each GPU."""
    handles = gpu_handles()
    num_lost = (query("nvmlDeviceGetCount") or 0) - len(handles)
    return InstalledGpus(query("nvmlSystemGetDriverVersion"), tuple(map(_read_gpu, handles)), num_lost)


def gpu_handles() -> Sequence[Any]:
    """NVML's handles of all GPUs that respond, in nvidia-smi's order; none without a driver."""
    query("nvmlInit")
    handles = (query("nvmlDeviceGetHandleByIndex", k) for k in range(query("nvmlDeviceGetCount") or 0))
    return [handle for handle in handles if handle is not None]


def query(function: str, *arguments: Any) -> Any:
    """What NVML's function returns; None if there is no NVML, no driver, or this GPU does not report it."""
    if pynvml is None:
        return None
    try:
        return getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError:
        return None


def _read_gpu(handle: Any) -> Gpu:
    def of_gpu(function: str, *arguments: Any) -> Any:
        return query(f"nvmlDeviceGet{function}", handle, *arguments)

    remapped = of_gpu("RemappedRows")  # since Ampere: how many of correctable and other errors, pending, failed
    retired = of_gpu("RetiredPagesPendingStatus")  # before Ampere
    pending = [flag for flag in (remapped[2] if remapped else None, retired) if flag is not None]
    nvlinks = [active for link in range(_MAX_NVLINKS) if (active := of_gpu("NvLinkState", link)) is not None]
    slowed_by = of_gpu("CurrentClocksThrottleReasons") or 0
    return Gpu(
        name=of_gpu("Name") or "unknown GPU",
        capability=of_gpu("CudaComputeCapability"),
        num_devices=_num_devices(handle),
        num_nvlinks=sum(nvlinks) if nvlinks else None,
        pcie_generation=of_gpu("MaxPcieLinkGeneration"),
        pcie_width=of_gpu("CurrPcieLinkWidth"),
        max_pcie_width=of_gpu("MaxPcieLinkWidth"),
        temperature_c=of_gpu("Temperature", _TEMPERATURE),
        slowdown_c=of_gpu("TemperatureThreshold", _SLOWDOWN_THRESHOLD),
        slowed_by=tuple(reason for bit, reason in _SLOWED_BY.items() if slowed_by & bit),
        uncorrected_errors=of_gpu("TotalEccErrors", _UNCORRECTED, _SINCE_LOADED),
        repair_pending=any(pending) if pending else None,
        repair_failed=bool(remapped[3]) if remapped else None,
    )


def _num_devices(handle: Any) -> int:
    mode = query("nvmlDeviceGetMigMode", handle)  # now, and after the next reset
    if not mode or not mode[0]:
        return 1
    places = range(query("nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
    return sum(query("nvmlDeviceGetMigDeviceHandleByIndex", handle, place) is not None for place in places)
