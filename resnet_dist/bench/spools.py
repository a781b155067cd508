"""`resnet-dist bench spools`: what many workers and nodes write to a run's spools, and what sending that costs."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Mapping
from io import BufferedWriter
from pathlib import Path
from statistics import median

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.bench.paired import markdown
from resnet_dist.tracking.connection import client_environment
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.spool import Metrics, Opened, encode, spool_folder
from resnet_dist.tracking.sync import MlflowTransport, sync
from resnet_dist.tracking.system_metrics import MANY_NODES, extremes, times_less_often
from resnet_dist.training.curves import RankTimes, Stragglers

_NODE_EVERY_S = 10.0
_POINTS = 30
"""Of rank 0."""
_GPU_NAMES = (
    "memory_usage_megabytes",
    "memory_usage_percentage",
    "utilization_percentage",
    "power_usage_watts",
    "power_usage_percentage",
)
_NODE_NAMES = (
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_read_mb_per_s",
    "disk_write_mb_per_s",
    "network_receive_mb_per_s",
    "network_transmit_mb_per_s",
)


def bench_spools(num_workers: int, num_nodes: int, *, minutes: float, folder: Path | None = None) -> str:
    """A Markdown table. `minutes`: of the nodes' metrics. `folder`: where the run is; else a temporary one."""
    os.environ.update(client_environment())
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        server = MlflowServer(Path(temporary))
        try:
            server.start()
            handle = open_run(server.uri, "bench", "bench", Path(temporary) / "run", {}, {})
            point_s, num_curves, rank_bytes = write_workers(handle.run_dir, handle.run_id, num_workers)
            node_curves, node_bytes = write_nodes(
                handle.run_dir, handle.run_id, num_nodes, -(-num_workers // num_nodes), minutes
            )
            sent_s, num_points = _sync(handle.run_dir, server.uri)
            nothing_s, none = _sync(handle.run_dir, server.uri)
            assert none == 0
            transport = MlflowTransport(server.uri, handle.run_id)
            began_s = time.monotonic()
            known_steps = transport.newest_steps()
            asking_s = time.monotonic() - began_s
            assert len(known_steps) == num_curves + node_curves
        finally:
            server.kill()
    rows = {
        "curves of workers": f"{num_curves:,}",
        "rank 0: ms a point": f"{1e3 * point_s:.2f}",
        "rank 0: bytes a point": f"{rank_bytes:,}",
        "curves of nodes": f"{node_curves:,}",
        "nodes: MB an hour": f"{node_bytes * 60 / minutes / 1e6:.1f}",
        "points sent": f"{num_points:,}",
        "sync, s": f"{sent_s:.1f}",
        "sync with nothing to send, s": f"{nothing_s:.1f}",
        "of it, asking the server what it has, s": f"{asking_s:.2f}",
    }
    return markdown(["workers", "nodes", *rows], [[f"{num_workers:,}", f"{num_nodes:,}", *rows.values()]])


def write_workers(run_dir: Path, run_id: str, num_workers: int) -> tuple[float, int, int]:
    """Rank 0's spool: the workers' curves at `_POINTS` points. Returns seconds a point, curves, bytes a point."""
    draws = random.Random(0)
    stragglers = Stragglers([1] * num_workers, 32)
    took_s, num_bytes, keys = [], 0, set[str]()
    with _new_file(spool_folder(run_dir, run_id)) as file:
        for step in range(_POINTS):
            waits_s = [draws.uniform(0.0, 0.1) for _ in range(num_workers)]
            times = [RankTimes(1.0, 0.01, wait_s) for wait_s in waits_s]
            began_s = time.thread_time()
            stragglers.newly_slow(times)
            values = stragglers.metrics(times)
            line = encode(Metrics(1_790_000_000_000 + step, step, values))
            took_s.append(time.thread_time() - began_s)
            num_bytes += file.write(line)
            keys |= values.keys()
    return median(took_s), len(keys), num_bytes // _POINTS


def write_nodes(run_dir: Path, run_id: str, num_nodes: int, gpus_per_node: int, minutes: float) -> tuple[int, int]:
    """The other nodes' spools. Returns the number of curves, and of bytes."""
    draws = random.Random(1)
    num_points = max(1, round(60 * minutes / (_NODE_EVERY_S * times_less_often(num_nodes))))
    num_curves = num_bytes = 0
    for node in range(1, num_nodes):
        with _new_file(spool_folder(run_dir, run_id, f"node-{node}")) as file:
            for step in range(num_points):
                of_gpus: Mapping[str, float] = {
                    f"gpu_{gpu}_{name}": draws.random() for gpu in range(gpus_per_node) for name in _GPU_NAMES
                }
                values = {name: draws.random() for name in _NODE_NAMES}
                values |= extremes(of_gpus) if num_nodes > MANY_NODES else of_gpus
                prefixed = {f"system/node-{node}/{name}": value for name, value in values.items()}
                num_bytes += file.write(encode(Metrics(1_790_000_000_000 + step, step, prefixed)))
        num_curves += len(values)
    return num_curves, num_bytes


def _new_file(folder: Path) -> BufferedWriter:
    folder.mkdir(parents=True)
    file = (folder / "00001-00001.jsonl").open("xb")
    file.write(encode(Opened(1_790_000_000_000, "bench", 1, {})))
    return file


def _sync(run_dir: Path, tracking_uri: str) -> tuple[float, int]:
    began_s = time.monotonic()
    report = sync(run_dir, tracking_uri)
    return time.monotonic() - began_s, report.num_points
