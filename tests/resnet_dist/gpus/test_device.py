"""Which device a worker gets, and the one line that says why it gets none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_dist.errors import Fault
from resnet_dist.gpus.device import (
    TorchBuild,
    architecture_problem,
    collective_backend,
    device_of,
    driver_problem,
    runs_on,
    this_build,
    why_no_gpu,
)
from resnet_dist.gpus.nvml import Gpu, InstalledGpus

BUILD = TorchBuild("2.14.1+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))
NODE = InstalledGpus("580.65.06", (Gpu("NVIDIA H100 80GB HBM3", (9, 0)),) * 8)


def test_a_worker_without_gpus_computes_on_the_cpu_whatever_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert device_of(0) == torch.device("cpu")
    assert collective_backend(0) == "gloo"


def test_a_worker_with_a_gpu_never_falls_back_to_the_cpu() -> None:
    assert collective_backend(1) == "nccl"
    if not torch.cuda.is_available():
        with pytest.raises(Fault, match=r"^gpus_per_worker is 1, but "):
            device_of(1)


@pytest.mark.parametrize(
    ("driver", "cuda", "problem"),
    [
        ("580.65.06", "13.0", ""),
        ("610.10", "13.0", ""),
        ("570.172.08", "13.0", "driver 570.172.08 is too old for CUDA 13.0 of PyTorch 2.14.1+cu130: install R580 or "),
        ("525.60.13", "12.8", ""),  # compatible within a major version
        ("470.82.01", "12.0", "driver 470.82.01 is too old for CUDA 12.0"),
        ("550.54.14", "99.0", ""),  # a CUDA that the table does not have
        (None, "13.0", "there is no NVIDIA driver: install R580 or newer"),
    ],
)
def test_the_driver_is_held_against_the_builds_cuda(driver: str | None, cuda: str, problem: str) -> None:
    found = driver_problem(driver, replace(BUILD, cuda=cuda))
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


@pytest.mark.parametrize(
    ("gpu", "capability", "runs"),
    [
        ("Tesla V100-SXM2-32GB", (7, 0), False),
        ("Tesla T4", (7, 5), True),
        ("NVIDIA A100-SXM4-80GB", (8, 0), True),
        ("NVIDIA L40S", (8, 9), True),  # sm_86's code
        ("NVIDIA H100 80GB HBM3", (9, 0), True),
        ("NVIDIA B300", (10, 3), True),
        ("NVIDIA Thor", (11, 0), False),
        ("NVIDIA GB10", (12, 1), True),
    ],
)
def test_the_gpu_is_held_against_the_builds_architectures(gpu: str, capability: tuple[int, int], runs: bool) -> None:
    found = architecture_problem(gpu, capability, BUILD)
    assert bool(found) != runs
    if not runs:
        assert f"has no code for {gpu} (sm_{capability[0]}{capability[1]}), only for sm_75, sm_80" in found


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 0), False),
        ("compute_90a", (10, 0), False),
        ("gfx942", (9, 4), False),
    ],
)
def test_which_code_runs_on_which_gpu(architecture: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(capability, [architecture]) == runs


BROKEN = "CUDA error: system not yet initialized\nCompile with TORCH_USE_CUDA_DSA"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"


@pytest.mark.parametrize(
    ("build", "node", "visible", "error", "reason"),
    [
        (replace(BUILD, version="2.14.1+cpu", cuda=None), NODE, None, "", "PyTorch 2.14.1+cpu is a build without CUDA"),
        (BUILD, InstalledGpus(), None, NO_DRIVER, "there is no NVIDIA driver"),
        (
            BUILD,
            InstalledGpus(),  # a container without NVML
            None,
            TOO_OLD,
            "PyTorch cannot use a GPU of this node: The NVIDIA driver on your system is too old (found version 12040); "
            "CUDA 13.0 needs driver R580 or newer",
        ),
        (
            replace(BUILD, cuda="14.1"),
            InstalledGpus(),
            None,
            TOO_OLD,
            "PyTorch cannot use a GPU of this node: The NVIDIA",
        ),
        (BUILD, replace(NODE, driver="550.54.14"), None, TOO_OLD, "driver 550.54.14 is too old"),
        (BUILD, InstalledGpus("580.65.06"), None, NO_DRIVER, "the driver lists no GPU"),
        (BUILD, NODE, "", BROKEN, "CUDA_VISIBLE_DEVICES='' hides all GPUs of the node"),
        (BUILD, NODE, "-1", BROKEN, "CUDA_VISIBLE_DEVICES='-1' hides all GPUs of the node"),
        (BUILD, NODE, "1", BROKEN, "PyTorch cannot use a GPU of this node: CUDA error: system not yet initialized"),
        (BUILD, NODE, None, "", "PyTorch cannot use a GPU of this node: no reason given"),
    ],
)
def test_why_there_is_no_gpu(
    build: TorchBuild, node: InstalledGpus, visible: str | None, error: str, reason: str
) -> None:
    found = why_no_gpu(build, node, visible, error)
    assert found.startswith(reason)
    assert "\n" not in found
    assert "None" not in found


def test_the_locked_build_runs_on_what_the_documentation_names() -> None:
    """README files and manifests say R580, and Turing to Blackwell."""
    build = this_build()
    if build.cuda is not None:
        assert driver_problem("580.65.06", build) == ""
        assert driver_problem("575.57.08", build) != ""
        assert not runs_on((7, 0), build.architectures)
        assert all(runs_on(capability, build.architectures) for capability in [(7, 5), (8, 0), (9, 0), (10, 0)])
