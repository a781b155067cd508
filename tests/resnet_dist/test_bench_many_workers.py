"""The benchmarks for many workers run, and what they measure is bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.bench.control import bench_control
from resnet_dist.bench.spools import write_nodes, write_workers
from resnet_dist.tracking.spool import Metrics, read_events, spool_folder


@pytest.mark.system
def test_workers_ask_the_real_actor_until_they_hear_of_a_stop() -> None:
    head, _, row = bench_control(20, every_s=0.2, seconds=1.0).splitlines()
    values = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert values["workers"] == "20"
    assert 0 < float(values["calls a second"]) <= 110
    assert 0.0 <= float(values["Ctrl-C to the first worker, s"]) < 60.0


def test_what_a_thousand_workers_log_is_bounded(tmp_path: Path) -> None:
    _, num_curves, num_bytes = write_workers(tmp_path, "r", 1024)
    assert (num_curves, num_bytes < 1000) == (14, True)
    events = list(read_events(spool_folder(tmp_path, "r")))
    assert all(isinstance(event, Metrics) for event in events)
    few, _ = write_nodes(tmp_path / "few", "r", 2, 8, minutes=1.0)
    many, _ = write_nodes(tmp_path / "many", "r", 128, 8, minutes=1.0)
    assert few == 7 + 5 * 8
    assert many == 127 * (7 + 5 * 2)
    assert len(list(read_events(spool_folder(tmp_path / "few", "r", "node-1")))) == 6
    assert len(list(read_events(spool_folder(tmp_path / "many", "r", "node-127")))) == 1
