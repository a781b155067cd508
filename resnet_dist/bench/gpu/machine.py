"""Checks of the machine: driver, architecture, libraries; snapshots and the GPU's counters."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from ctypes import byref
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from data_prep.native import open_decode_library
from resnet_dist.bench.gpu.result import Result, Skipped
from resnet_dist.bench.step import Settings, recipe
from resnet_dist.errors import UserError
from resnet_dist.gpus.device import architecture_problem, driver_problem, this_build, why_no_gpu
from resnet_dist.gpus.nvml import Gpu, InstalledGpus, read_gpus
from resnet_dist.training.device import peak_flops
from resnet_dist.training.model import build_classifier, build_optimizer
from resnet_dist.training.state import TrainState

_MOST_SNAPSHOT_S, _MOST_POLL_S = 0.5, 0.020


def installed_gpus() -> InstalledGpus:
    """As `read_gpus`; without nvidia-ml-py only the driver's version and how many GPUs there are."""
    node = read_gpus()
    if node.driver is not None:
        return node
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return node
    driver, count = ctypes.create_string_buffer(96), ctypes.c_uint()
    if (
        nvml.nvmlInitWithFlags(0)
        or nvml.nvmlSystemGetDriverVersion(driver, 96)
        or nvml.nvmlDeviceGetCount_v2(byref(count))
    ):
        return node
    return InstalledGpus(driver.value.decode(errors="replace"), (Gpu("not known"),) * count.value)


def cuda_problem() -> str:
    """Why `torch.cuda.is_available()` says no."""
    reason = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    return why_no_gpu(this_build(), installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"), reason)


def environment(device: torch.device, small: bool) -> Result:
    """Versions and the device; on a GPU, that the driver is new enough and PyTorch has kernels for it."""
    missing = [name for name in ("timm", "torchvision", "psutil", "pynvml") if find_spec(name) is None]
    measured: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": _kernel_problem() or "built",
        "missing": missing,
    }
    line = f"{measured['cores']} cores, decode kernel {measured['kernel']}"
    if missing:
        line += f", without {', '.join(missing)}"
    if device.type == "cpu":
        return Result(measured, None, line)
    properties, driver, build = torch.cuda.get_device_properties(device), installed_gpus().driver, this_build()
    capability = torch.cuda.get_device_capability(device)
    peak = peak_flops(properties.name, "bf16")
    measured |= {
        "device": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(capability),
        "built_for": build.architectures,
        "driver": driver,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()) if torch.distributed.is_nccl_available() else None,
        "peak_bf16_flops": peak,
    }
    problems = [
        driver_problem(driver, build) if driver else "",
        architecture_problem(properties.name, capability, build),
    ]
    line = "; ".join(
        [
            *filter(None, problems),
            f"driver {driver or 'not known'}, CUDA {build.cuda} for {' '.join(build.architectures)}, "
            f"sm_{capability[0]}{capability[1]}, cuDNN {measured['cudnn']}",
            f"peak {'not known' if peak is None else f'{peak / 1e12:.0f} TFLOP/s'} in bf16",
            line,
        ]
    )
    return Result(measured, not any(problems), line)


def _kernel_problem() -> str | None:
    try:
        open_decode_library("the loader")
    except (UserError, OSError) as error:
        return f"not usable ({error})"
    return None


def snapshot(device: torch.device, small: bool) -> Result:
    """Seconds that a copy of the state of ResNet-152 and SGD to the host's memory takes, and a poll of the GPU's
    counters."""
    config = recipe(Settings("resnet8" if small else "resnet152", 32 if small else 224, 1, 1, 1, 1))
    model = build_classifier(config).to(device)
    state = TrainState(model.net, build_optimizer(model.net, config.optim))
    for parameter in state.parameters:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    times = []
    for _ in range(4):
        synchronize(device)
        began_s = time.perf_counter()
        copy = state.snapshot()
        times.append(time.perf_counter() - began_s)
    num_bytes = sum(t.numel() * t.element_size() for t in _tensors(copy))
    first_s, again_s = times[0], median(times[1:])
    measured = {"first_s": first_s, "again_s": again_s, "bytes": num_bytes, "gb_per_s": num_bytes / again_s / 1e9}
    line = f"{num_bytes / 1e6:.0f} MB in {first_s:.3f} s the first time, then {again_s:.3f} s "
    line += f"({measured['gb_per_s']:.1f} GB/s)"
    if device.type == "cpu":
        return Result(measured, None, line)
    passed = max(first_s, again_s) < _MOST_SNAPSHOT_S
    try:
        poll_s = measured["poll_s"] = _poll_s()
    except Skipped as reason:
        return Result(measured, passed, f"{line}; limit {_MOST_SNAPSHOT_S} s; no poll: {reason}")
    line += f"; a poll of the counters {1e3 * poll_s:.1f} ms; limits {_MOST_SNAPSHOT_S} s, {1e3 * _MOST_POLL_S:.0f} ms"
    return Result(measured, passed and poll_s < _MOST_POLL_S, line)


def _poll_s() -> float:
    try:
        from resnet_dist.tracking.system_metrics import NodeGpus
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed") from None
    gpus = NodeGpus()
    if not gpus.values():
        raise Skipped("NVML reports nothing")
    times = []
    for _ in range(10):
        began_s = time.perf_counter()
        gpus.values()
        times.append(time.perf_counter() - began_s)
    return median(times)


def fitting_batch(device: torch.device) -> int:
    """Images of a step of ResNet-152 that certainly fit: 128 take some 16 GB."""
    return 128 if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 30e9 else 32


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in items for tensor in _tensors(item)]
