"""`resnet-dist bench tracking`: what metrics cost a training step, with the server up, killed and frozen.

One process does steps of equal work and logs a full set of metrics after each, as rank 0 does, block after block: with
no tracker, then with the real one while the server is in each of its states. The cost of a step is the time of the
call, plus at most the CPU time of the background threads where no core is free. Wall-clock times also contain the
machine's other load; the row "no tracker" shows how much, and the CPU columns exclude it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.bench.paired import markdown, rotated
from resnet_dist.errors import Fault
from resnet_dist.tracking.connection import client_environment
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.tracker import SpoolTracker, Tracker

State = Literal["no tracker", "up", "killed", "frozen"]
STATES: tuple[State, ...] = ("no tracker", "up", "killed", "frozen")
NUM_METRICS = 20
"""More than a training of three workers logs at a point."""
_ARRIVAL_LIMIT_S = 120.0


@dataclass(frozen=True)
class Block:
    """Consecutive steps, in ms."""

    calls_ms: tuple[float, ...]
    """By the clock."""
    calls_cpu_ms: tuple[float, ...]
    steps_ms: tuple[float, ...]
    """By the clock, with the call."""
    behind_cpu_ms: float
    """CPU time of all other threads of the process, per step."""


def bench_tracking(*, num_steps: int, rounds: int, folder: Path | None = None) -> str:
    """A Markdown table. `folder`: where the spool is, for example on the cluster's shared disk; else a temporary one.

    Raises Fault if the server does not come up, or if a point did not arrive exactly once in the end.
    """
    blocks: dict[State, list[Block]] = {state: [] for state in STATES}
    os.environ.update(client_environment())
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        server = MlflowServer(Path(temporary))
        try:
            server.start()
            handle = open_run(server.uri, "bench", "bench", Path(temporary) / "run", {}, {})
            with closing(SpoolTracker(handle.run_dir, handle.run_id, server.uri)) as spool:
                step = 0
                for number in range(rounds):
                    for state in rotated(STATES, number):
                        _bring_into(server, state)
                        tracker: Tracker = Tracker() if state == "no tracker" else spool
                        blocks[state].append(_block(tracker, step, num_steps))
                        step += num_steps
                _bring_into(server, "up")
                if not spool.flush(_ARRIVAL_LIMIT_S):
                    raise Fault(f"not all points arrived within {_ARRIVAL_LIMIT_S:.0f} s")
            sent = num_steps * rounds * (len(STATES) - 1) * NUM_METRICS
            arrived = _num_points(server.database, handle.run_id)
        finally:
            server.kill()
    if arrived != sent:
        raise Fault(f"{sent} points were logged, the database holds {arrived}")
    return f"{table(blocks)}\n\n{arrived:,} points logged, each once in the server's database at the end."


def table(blocks: dict[State, list[Block]]) -> str:
    head = ["server", "call, CPU ms: median", "99 %", "by the clock: median", "99 %", "longest"]
    rows = []
    for state in STATES:
        clock = sorted(ms for block in blocks[state] for ms in block.calls_ms)
        cpu = sorted(ms for block in blocks[state] for ms in block.calls_cpu_ms)
        cells = [f"{ms:.3f}" for ms in (median(cpu), _rare(cpu), median(clock), _rare(clock), clock[-1])]
        cells.append(f"{median(block.behind_cpu_ms for block in blocks[state]):.3f}")
        cells.append(f"{median(ms for block in blocks[state] for ms in block.steps_ms):.2f}")
        rows.append([state, *cells])
    return markdown([*head, "threads behind, CPU ms a step", "whole step, median ms"], rows)


def _rare(ascending: list[float]) -> float:
    """99 of 100 values are below."""
    return ascending[int(0.99 * len(ascending))]


def _block(tracker: Tracker, first_step: int, num_steps: int) -> Block:
    work = _work()
    calls_ms, calls_cpu_ms, steps_ms = [], [], []
    work()
    behind_began_s = time.process_time() - time.thread_time()
    for step in range(first_step, first_step + num_steps):
        began_s = time.perf_counter()
        loss = work()
        values = {f"group/metric_{k}": loss + k for k in range(NUM_METRICS)}
        called_s, called_cpu_s = time.perf_counter(), time.thread_time()
        tracker.metrics(values, step)
        ended_cpu_s, ended_s = time.thread_time(), time.perf_counter()
        calls_ms.append(1000 * (ended_s - called_s))
        calls_cpu_ms.append(1000 * (ended_cpu_s - called_cpu_s))
        steps_ms.append(1000 * (ended_s - began_s))
    behind_s = time.process_time() - time.thread_time() - behind_began_s
    return Block(tuple(calls_ms), tuple(calls_cpu_ms), tuple(steps_ms), 1000 * behind_s / num_steps)


def _work() -> Callable[[], float]:
    """About 5 ms of work like a small step: many short kernels launched by Python, which is where threads interfere."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # else the step waits for a core, not for one of our threads
    images, weights = torch.randn(16, 16, 16, 16), torch.randn(16, 16, 3, 3)

    def step() -> float:
        features = images
        for _ in range(20):
            features = torch.relu(torch.conv2d(features, weights, padding=1)) * 0.1
        return float(features.mean())

    return step


def _bring_into(server: MlflowServer, state: State) -> None:
    if state == "killed":
        server.kill()
        return
    server.start()
    server.signal(signal.SIGSTOP if state == "frozen" else signal.SIGCONT)


def _num_points(database: Path, run_id: str) -> int:
    with closing(sqlite3.connect(database)) as connection:
        (count,) = connection.execute("select count(*) from metrics where run_uuid = ?", (run_id,)).fetchone()
        return int(count)
