"""Which device a worker computes on, and whether this PyTorch build runs on this node's GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resnet_dist.errors import Fault, UserError
from resnet_dist.gpus.nvml import InstalledGpus, read_gpus

MIN_DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA's major version -> the oldest driver branch that runs it (NVIDIA's "CUDA Compatibility", minor version
compatibility, table 1). Data center GPUs run a newer CUDA on an older driver with NVIDIA's cuda-compat package."""


@dataclass(frozen=True)
class TorchBuild:
    version: str
    cuda: str | None
    """`13.0`; None for a CPU build."""
    architectures: tuple[str, ...]
    """`sm_90` for machine code, `compute_90` for PTX, which newer GPUs compile themselves."""


def this_build() -> TorchBuild:
    return TorchBuild(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()))


def device_of(gpus_per_worker: int, index: int = 0) -> torch.device:
    """The device of a worker, from what the profile says and not from what happens to be visible.

    Args:
        index: of the GPU, among those that this process sees.

    Raises Fault if the worker is to have a GPU and this process cannot use it; UserError if there are too few.
    """
    if not gpus_per_worker:
        return torch.device("cpu")
    if problem := gpu_problem():
        raise Fault(f"gpus_per_worker is {gpus_per_worker}, but {problem}")
    if index >= (found := torch.cuda.device_count()):
        raise UserError(f"worker {index} has no GPU: this process sees {found}; set fewer workers")
    return torch.device("cuda", index)


def collective_backend(gpus_per_worker: int) -> str:
    """PyTorch's backend for the collectives of such workers. With GPUs there is no gloo beside NCCL: its connections
    between CPUs grow with the square of the number of workers (`training.collectives`)."""
    return "nccl" if gpus_per_worker else "gloo"


def hide_gpus() -> None:
    """Before this process uses CUDA: it sees no GPU. Ray leaves all of a node's visible to a worker that asked for
    none, and Ray Train then makes a CUDA context on the first, which takes half a gigabyte of it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gpu_problem() -> str:
    """Why this process cannot compute on the GPUs that it was given, in one line that says how to fix it; "" if it can.

    Starts CUDA in this process.
    """
    build = this_build()
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return why_no_gpu(build, read_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"), str(error))
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        if problem := architecture_problem(name, capability, build):
            return problem
    return ""


# --- pure -------------------------------------------------------------------------------------------------------------


def why_no_gpu(build: TorchBuild, node: InstalledGpus, visible: str | None, error: str) -> str:
    """Why PyTorch sees no GPU.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None: not set.
        error: PyTorch's own, for what nothing else explains.
    """
    if build.cuda is None:
        return f"PyTorch {build.version} is a build without CUDA: install that of requirements.lock (cluster/setup.sh)"
    first_sentence = error.strip().partition("\n")[0].partition(". ")[0]
    unexplained = f"PyTorch cannot use a GPU of this node: {first_sentence or 'no reason given'}"
    if node.driver is None and "no nvidia driver" not in error.lower():  # a container without NVML
        needed = min_driver(build)
        return f"{unexplained}; CUDA {build.cuda} needs driver R{needed} or newer" if needed else unexplained
    if problem := driver_problem(node.driver, build):
        return problem
    if not node.gpus:
        return "the driver lists no GPU: `nvidia-smi` on the node says why; a container needs NVIDIA's runtime"
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES='{visible}' hides all GPUs of the node: unset it"
    return unexplained


def min_driver(build: TorchBuild) -> int | None:
    """The oldest driver branch for the build; None for a CPU build and for a CUDA that is not in the table."""
    return None if build.cuda is None else MIN_DRIVERS.get(int(build.cuda.partition(".")[0]))


def driver_problem(driver: str | None, build: TorchBuild) -> str:
    """Why the build does not run on this driver; "" if it does."""
    needed = min_driver(build)
    oldest = f"R{needed} or newer" if needed else "NVIDIA's driver"
    if driver is None:
        return f"there is no NVIDIA driver: install {oldest}; a container needs NVIDIA's runtime"
    if needed is not None and int(driver.partition(".")[0]) < needed:
        return (
            f"driver {driver} is too old for CUDA {build.cuda} of PyTorch {build.version}: "
            f"install {oldest} on the node, or NVIDIA's cuda-compat package"
        )
    return ""


def architecture_problem(name: str, capability: tuple[int, int], build: TorchBuild) -> str:
    """Why the build has no code for this GPU; "" if it has."""
    if not build.architectures or runs_on(capability, build.architectures):
        return ""
    return (
        f"PyTorch {build.version} has no code for {name} (sm_{capability[0]}{capability[1]}), "
        f"only for {', '.join(build.architectures)}: use other GPUs, or build PyTorch for this one"
    )


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code runs on GPUs of the same major version and the same or a higher minor one, with suffix `a` only on
    its own; PTX on all newer GPUs (NVIDIA's CUDA Programming Guide, "Compute Capabilities").

    >>> runs_on((8, 9), ["sm_80", "sm_90"]), runs_on((7, 0), ["sm_75"]), runs_on((12, 1), ["compute_90"])
    (True, False, True)
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if match[4] == "a":
            fits = built == capability
        elif match[1] == "sm" or match[4] == "f":
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False
