"""Use of a node: its own readings, and its GPUs' through the real nvidia-ml-py with a fake library of two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from resnet_dist.tracking.system_metrics import MANY_NODES, NodeGpus, NodeMonitor
from resnet_dist.tracking.tracker import Tracker

READ = "import json; from resnet_dist.tracking.system_metrics import NodeGpus; print(json.dumps(NodeGpus().values()))"


def run_with_fake_nvml(folder: Path, code: str, **environment: str) -> str:
    """Runs Python code in a process that finds the fake NVML in `folder`."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_no_gpu_is_no_error() -> None:
    if not Path("/dev/nvidiactl").exists():
        assert NodeGpus().values() == {}


def test_every_gpu_reports_what_it_can(nvml_folder: Path) -> None:
    assert json.loads(run_with_fake_nvml(nvml_folder, READ)) == {
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

    def wait(self, num_points: int) -> None:
        deadline = time.monotonic() + 30.0
        while len(self.points) < num_points:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def fake_gpus(*watts: float) -> NodeGpus:
    values = {f"gpu_{k}_power_usage_watts": value for k, value in enumerate(watts)}
    return cast(NodeGpus, SimpleNamespace(values=lambda: values))


def test_a_node_is_measured_at_intervals_once_a_step() -> None:
    tracker = Kept()
    monitor = NodeMonitor(tracker, 3, every_s=0.1, first_after_s=0.01, gpus=lambda: fake_gpus(300.0, 200.0))
    monitor.observe(7)
    tracker.wait(1)
    time.sleep(0.25)
    monitor.observe(9)
    tracker.wait(2)
    monitor.close()
    assert [step for step, _ in tracker.points] == [7, 9]
    for _, values in tracker.points:
        assert all(key.startswith("system/node-3/") for key in values)
        assert 0.0 < values["system/node-3/system_memory_usage_percentage"] <= 100.0
        assert 0.0 <= values["system/node-3/cpu_utilization_percentage"] <= 100.0
        assert min(values.values()) >= 0.0
        assert values["system/node-3/gpu_1_power_usage_watts"] == 200.0


def test_each_of_many_nodes_logs_only_the_extremes_of_its_gpus() -> None:
    tracker = Kept()
    monitor = NodeMonitor(
        tracker, 0, num_nodes=MANY_NODES + 1, first_after_s=0.01, gpus=lambda: fake_gpus(*range(100, 108))
    )
    monitor.observe(0)
    tracker.wait(1)
    monitor.close()
    ((_, values),) = tracker.points
    of_gpus = {key: value for key, value in values.items() if "gpu" in key}
    assert of_gpus == {
        "system/node-0/gpu_min_power_usage_watts": 100.0,
        "system/node-0/gpu_max_power_usage_watts": 107.0,
    }


HANGING = """
import time
from resnet_dist.tracking.system_metrics import NodeMonitor
from resnet_dist.tracking.tracker import Tracker
began_s = time.monotonic()
monitor = NodeMonitor(Tracker(), 0, first_after_s=0.0)
monitor.observe(0)
time.sleep(0.5)  # for the thread to call NVML
print(time.monotonic() - began_s < 5.0)
closing_s = time.monotonic()
monitor.observe(1)
monitor.close()
print(time.monotonic() - closing_s < 5.0)
"""


@pytest.mark.parametrize("call", ["nvmlInitWithFlags", "nvmlDeviceGetUtilizationRates"])
def test_an_nvml_that_hangs_delays_neither_training_nor_the_end_of_the_process(nvml_folder: Path, call: str) -> None:
    assert run_with_fake_nvml(nvml_folder, HANGING, FAKE_HANGING=call).split() == ["True", "True"]
