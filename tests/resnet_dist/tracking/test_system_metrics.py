"""Use of a node: its own readings, and its GPUs' through the real nvidia-ml-py with a fake library of two GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from resnet_dist.tracking.system_metrics import NodeGpus, NodeMonitor
from resnet_dist.tracking.tracker import Tracker

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
def test_every_gpu_reports_what_it_can(tmp_path: Path) -> None:
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


class Kept(Tracker):
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(values)))


def test_a_node_is_measured_now_and_then():
    now, tracker = [0.0], Kept()
    monitor = NodeMonitor(tracker, 3, every_s=10.0, clock=lambda: now[0])
    for step, now[0] in enumerate((0.5, 2.0, 5.0, 11.9, 12.0, 30.0)):
        monitor.observe(step)
    assert [step for step, _ in tracker.points] == [1, 4, 5]
    for _, values in tracker.points:
        assert all(key.startswith("system/node-3/") for key in values)
        assert 0.0 < values["system/node-3/system_memory_usage_percentage"] <= 100.0
        assert 0.0 <= values["system/node-3/cpu_utilization_percentage"] <= 100.0
        assert min(values.values()) >= 0.0
