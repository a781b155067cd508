"""A node that declares GPUs, with a driver that NVML knows (fake_nvml.c) and PyTorch does not."""

from __future__ import annotations

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
