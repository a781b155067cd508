"""What NVML tells about a node's GPUs, through the real nvidia-ml-py with a fake library of two H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from resnet_dist.gpus.nvml import Gpu, InstalledGpus, read_gpus

READ = """
import json
from dataclasses import asdict
from resnet_dist.gpus.nvml import read_gpus
print(json.dumps(asdict(read_gpus())))
"""


def test_a_machine_without_a_driver_has_no_gpus() -> None:
    if not Path("/dev/nvidiactl").exists():
        assert read_gpus() == InstalledGpus()


def test_a_sound_and_an_ill_gpu_are_read(nvml_folder: Path) -> None:
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_folder)}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    found = json.loads(done.stdout)
    assert (found["driver"], found["num_lost"]) == ("580.65.06", 0)
    sound, ill = (Gpu(**gpu) for gpu in found["gpus"])
    assert sound == Gpu(
        name="NVIDIA H100 80GB HBM3",
        capability=[9, 0],  # type: ignore[arg-type]  # JSON has no tuples
        num_nvlinks=18,
        pcie_generation=5,
        pcie_width=16,
        max_pcie_width=16,
        temperature_c=40,
        slowdown_c=90,
        slowed_by=[],  # type: ignore[arg-type]
        uncorrected_errors=0,
        repair_pending=False,
        repair_failed=False,
    )
    assert (ill.num_nvlinks, ill.pcie_width, ill.uncorrected_errors, ill.repair_pending) == (16, 8, 3, True)
    assert list(ill.slowed_by) == ["HW slowdown", "HW thermal slowdown"]
