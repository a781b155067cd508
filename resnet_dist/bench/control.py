"""`resnet-dist bench control`: what a thousand workers cost the control actor, and how soon Ctrl-C reaches one of them.

The actor is the real one, in a local Ray; the workers are tasks in a few processes that ask as often as workers do.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median
from typing import Any

import ray

from data_prep.runtime.ray_connection import start_local
from resnet_dist.bench.paired import markdown
from resnet_dist.launch.control import RunControl, WorkerStatus, ask_every_s

_PROCESSES = 4
_POLL_EVERY_S = 0.5
_LIMIT_S = 120.0


class MeasuredControl(RunControl):
    num_calls = 0

    def should_stop(self, rank: int, address: str, node_id: str) -> bool:
        self.num_calls += 1
        return super().should_stop(rank, address, node_id)

    def used(self) -> tuple[float, int]:
        """CPU time of all threads of the actor's process, s, and calls of workers."""
        return time.process_time(), self.num_calls


class Askers:
    """Some of the run's workers, as tasks of one process."""

    async def ask(self, control: Any, ranks: range, world_size: int, every_s: float) -> tuple[list[float], list[float]]:
        """Asks until the answer is yes. Returns the latency of every call, and when each worker heard; seconds."""
        latencies_s: list[float] = []

        async def worker(rank: int) -> float:
            await asyncio.sleep(every_s * (rank + 1) / world_size)
            while True:
                asked_s = time.monotonic()
                stop = await control.should_stop.remote(
                    rank, f"10.0.{rank // 2048}.{rank // 8 % 256}", f"node-{rank // 8}"
                )
                answered_s = time.monotonic()
                latencies_s.append(answered_s - asked_s)
                if stop:
                    return answered_s
                await asyncio.sleep(every_s)

        return latencies_s, list(await asyncio.gather(*map(worker, ranks)))


def bench_control(num_workers: int, *, every_s: float | None = None, seconds: float = 20.0) -> str:
    """A Markdown table. `every_s`: how often each worker asks; None: as often as in training."""
    start_local(num_cpus=_PROCESSES, dashboard=False)
    try:
        control = ray.remote(MeasuredControl).options(num_cpus=0).remote()
        every_s = ask_every_s(num_workers) if every_s is None else every_s
        askers = [ray.remote(Askers).options(num_cpus=0).remote() for _ in range(_PROCESSES)]
        num = -(-num_workers // _PROCESSES)
        shares = [range(first, min(first + num, num_workers)) for first in range(0, num_workers, num)]
        answers = [
            asker.ask.remote(control, share, num_workers, every_s) for asker, share in zip(askers, shares, strict=False)
        ]
        time.sleep(max(2.0, every_s))  # until all ask
        began_cpu_s, began_calls = ray.get(control.used.remote(), timeout=_LIMIT_S)
        began_s = time.monotonic()
        polls_s = []
        while time.monotonic() - began_s < seconds:
            polls_s.append(_poll(control, stop=False))
            time.sleep(_POLL_EVERY_S)
        ended_cpu_s, ended_calls = ray.get(control.used.remote(), timeout=_LIMIT_S)
        cpu_s, num_calls = ended_cpu_s - began_cpu_s, max(1, ended_calls - began_calls)
        elapsed_s = time.monotonic() - began_s
        stopped_s = time.monotonic()
        _poll(control, stop=True)
        heard = ray.get(answers, timeout=_LIMIT_S)
    finally:
        ray.shutdown()
    latencies_s = sorted(latency for latencies, _ in heard for latency in latencies)
    first_heard_s = min(at for _, workers in heard for at in workers) - stopped_s
    cells = [
        f"{num_workers:,}",
        f"{every_s:g}",
        f"{num_calls / elapsed_s:,.0f}",
        f"{100 * cpu_s / elapsed_s:.1f} %",
        f"{1e3 * cpu_s / num_calls:.2f}",
        f"{1e3 * median(latencies_s):.1f}",
        f"{1e3 * latencies_s[int(0.99 * len(latencies_s))]:.1f}",
        f"{1e3 * median(polls_s):.1f}",
        f"{1e3 * max(polls_s):.1f}",
        f"{first_heard_s:.2f}",
    ]
    return markdown(
        [
            "workers",
            "each asks every, s",
            "calls a second",
            "the actor's CPU, of one core",
            "CPU ms a call",
            "call, ms: median",
            "99 %",
            "the driver's, ms: median",
            "longest",
            "Ctrl-C to the first worker, s",
        ],
        [cells],
    )


def _poll(control: Any, *, stop: bool) -> float:
    """The driver's exchange with the actor; how long it took, s."""
    began_s = time.monotonic()
    status: WorkerStatus = ray.get(control.poll.remote(1, stop=stop), timeout=_LIMIT_S)
    assert not status.evaluations
    return time.monotonic() - began_s
