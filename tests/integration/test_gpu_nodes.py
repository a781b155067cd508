"""A node that declares GPUs, with a driver that NVML knows (fake_nvml.c) and PyTorch does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GPU_NODE = "127.0.0.3"


@pytest.fixture(scope="module")
def gpu_node(head: Any, nvml_folder: Path) -> Iterator[Any]:
    with head.another_node(GPU_NODE, num_cpus=2, num_gpus=2, LD_LIBRARY_PATH=str(nvml_folder)):
        yield head


def settings(**changes: object) -> list[str]:
    """Of a profile for two workers with a GPU each; the node may still be about to join."""
    profile = {"gpus_per_worker": 1, "failure.wait_for_nodes_s": 60, **changes}
    return [part for key, value in profile.items() for part in ("--profile-set", f"{key}={value}")]


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ("{FAKE_DRIVER: 550.54.14}", "driver 550.54.14 is too old for CUDA 13.0 of PyTorch"),
        ("{FAKE_GPUS: '0'}", "the driver lists no GPU"),
    ],
)
def test_an_unusable_gpu_ends_the_run_in_one_line(cli: Any, gpu_node: Any, env: str, reason: str) -> None:
    done = cli.run(cli.train_command(*settings(env=env)), RAY_ADDRESS=gpu_node.address)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"resnet-dist: node {GPU_NODE}: {reason}")
    assert "Traceback" not in done.stderr


def test_the_doctor_counts_gpus_with_nvml_and_names_the_ill_one(cli: Any, gpu_node: Any) -> None:
    profile = {"data_root": cli.data_root, "storage": cli.folder / "runs", "ray_address": gpu_node.address}
    tracking = {"tracking_uri": f"sqlite:///{cli.folder}/mlflow.db"}
    command = [sys.executable, "-m", "resnet_dist", "doctor", "--on", "cluster/profiles/laptop.yaml"]
    done = cli.run([*command, *settings(**profile, **tracking)])
    lines = [line.split(None, 2) for line in done.stdout.splitlines()]
    found = {what: state for state, where, what in lines if where == GPU_NODE}
    assert found["GPUs: 2 x NVIDIA H100 80GB HBM3, as Ray declares"] == "ok"
    assert found["GPU 1: PCIe with 8 of 16 lanes: reseat it, or check the riser"] == "warning"
    (bad,) = [what for what, state in found.items() if state == "bad"]
    assert bad.startswith("PyTorch cannot use a GPU of this node: Found no NVIDIA driver on your system")
    assert done.returncode == 1


MEASURE = """
import sys
from resnet_dist.config.profile import Profile, Workers
from resnet_dist.doctor import cluster
from resnet_dist.doctor.verdicts import Answer, NodeFacts
from resnet_dist.gpus.nvml import Gpu, InstalledGpus
from resnet_dist.launch.cluster import alive_nodes, ray_session
from resnet_dist.storage.locations import open_storage

address, folder = sys.argv[1:]
profile = Profile(
    workers=Workers(min=1, max=1), cpus_per_worker=1, gpus_per_worker=1, data_root=folder, storage=folder,
    tracking_uri=f"sqlite:///{folder}/mlflow.db", ray_address=address,
)
facts = NodeFacts("", {}, "", "", gpus=InstalledGpus("580.65.06", (Gpu("NVIDIA H100 80GB HBM3", num_nvlinks=18),) * 2))
with ray_session(profile):
    answers = [Answer(node, facts) for node in alive_nodes() if node.gpus]
    storage = open_storage(folder)
    examiners = {a.node.node_id: cluster._examiner(a.node, profile, storage, "token") for a in answers}
    for check in cluster._measure_gpus(answers, examiners, profile, storage, "token", backend="gloo"):
        print(check.state, check.where, check.what)
"""


def test_a_process_on_each_gpu_of_a_node_is_measured(cli: Any, gpu_node: Any) -> None:
    done = cli.run([sys.executable, "-c", MEASURE, gpu_node.address, str(cli.folder)])
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"warning {GPU_NODE} NCCL over 2 GPUs of the node: ")
    assert line.endswith("slow: NVLink should give about 360 GB/s")
