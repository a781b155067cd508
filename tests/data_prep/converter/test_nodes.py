"""A cluster of several Ray nodes, of which one dies in the middle: the same bytes as an undisturbed conversion."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.beton.manifest import manifest_path
from data_prep.converter.output import work_path
from data_prep.converter.plan import UNIT_SAMPLES
from data_prep.sources.datasets.builtin import Synthetic

pytestmark = pytest.mark.slow
SOURCE = Synthetic(num_samples=12 * UNIT_SAMPLES, min_side=96, max_side=128)
COMMAND = [
    *(sys.executable, "-m", "data_prep", "convert", "--source", "synthetic", "--json", "--encode", "jpeg"),
    *("--input", SOURCE.description.location),
]
WAIT_LIMIT_S = 400.0


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs; nodes, real raylets with a CPU each, are added one after the other."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, convert_here) -> str:
    return convert_here(SOURCE, None, tmp_path_factory.mktemp("expected") / "a.beton", encode="jpeg").manifest.digest


def start(output: Path, address: str, workers: int | None = None) -> subprocess.Popen[str]:
    limit = ["--workers", str(workers)] if workers is not None else []
    return subprocess.Popen(
        [*COMMAND, "--output", str(output), *limit],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_parts(process: subprocess.Popen[str], output: Path, number: int) -> None:
    limit_s = time.monotonic() + WAIT_LIMIT_S
    while len(list(work_path(output).glob("*.part"))) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit_s, "the parts do not come"
        time.sleep(0.02)


def ended_well(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    stdout, stderr = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1]), stderr


def test_a_node_that_dies_costs_its_units_and_no_byte(cluster: Any, tmp_path: Path, expected: str) -> None:
    output = tmp_path / "a.beton"
    cluster.add_node(num_cpus=1)
    victim = cluster.add_node(num_cpus=1)
    process = start(output, cluster.address, 2)
    wait_for_parts(process, output, 3)
    cluster.remove_node(victim, allow_graceful=False)
    told, stderr = ended_well(process)
    assert told["digest"] == expected
    assert "were lost and are done again" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.beton",
        "a.manifest.json",
        "a.paths.txt.gz",
        "a.samples.bin",
    ]


def test_a_cluster_without_cpus_is_waited_for_and_grows(cluster: Any, tmp_path: Path, expected: str) -> None:
    output = tmp_path / "a.beton"
    process = start(output, cluster.address)
    assert process.stderr is not None
    assert "connecting to Ray" in process.stderr.readline()
    assert "has no CPUs yet: waiting for a node, 900 s at most" in process.stderr.readline()
    cluster.add_node(num_cpus=1)
    wait_for_parts(process, output, 1)
    cluster.add_node(num_cpus=1)
    told, _ = ended_well(process)
    assert told["digest"] == expected


def test_nodes_and_drivers_that_die_at_random_change_no_byte(cluster: Any, tmp_path: Path, expected: str) -> None:
    """Every round another number of workers, a node that goes and one that comes, and a driver that is killed."""
    output = tmp_path / "a.beton"
    draw = random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    for workers in (4, 1, 2):
        process = start(output, cluster.address, workers)
        have = len(list(work_path(output).glob("*.part")))
        wait_for_parts(process, output, min(have + draw.randrange(1, 4), 11))
        time.sleep(draw.random())
        cluster.remove_node(nodes.pop(draw.randrange(2)), allow_graceful=False)
        time.sleep(3 * draw.random())
        process.kill()
        process.wait(WAIT_LIMIT_S)
        assert not manifest_path(output).exists() or output.exists()
        nodes.append(cluster.add_node(num_cpus=2))
    told, _ = ended_well(start(output, cluster.address, 4))
    assert told["digest"] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.beton",
        "a.manifest.json",
        "a.paths.txt.gz",
        "a.samples.bin",
    ]
