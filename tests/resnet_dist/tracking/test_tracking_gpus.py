"""GPU readings through the real nvidia-ml-py: without a driver, and with a library that has two GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.tracking.system_metrics import NodeGpus

READ = "import json; from resnet_dist.tracking.system_metrics import NodeGpus; print(json.dumps(NodeGpus().values()))"


def read_with(library_folder: Path) -> dict[str, float]:
    """In a process that finds this folder's NVML, or none."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(library_folder)}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_no_gpu_is_no_error() -> None:
    if not Path("/dev/nvidiactl").exists():
        assert NodeGpus().values() == {}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_every_gpu_tells_what_it_can(tmp_path: Path) -> None:
    library, source = tmp_path / "libnvidia-ml.so.1", Path(__file__).with_name("fake_nvml.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    assert read_with(tmp_path) == {
        "gpu_0_memory_usage_megabytes": 20000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_power_usage_watts": 350.0,
        "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 20000.0,
        "gpu_1_memory_usage_percentage": 25.0,
        "gpu_1_utilization_percentage": 3.0,
    }
