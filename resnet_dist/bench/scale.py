"""What a group costs each worker as it grows: connections, start, memory, small exchanges. Over gloo, on one machine.

Light processes that share one import of PyTorch. A worker of a real run has cores of its own, and these share the
machine's, so what is extrapolated is a worker's own CPU time and open files, not the seconds on the clock.
"""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from resnet_dist.bench.paired import Subject, markdown, print_result
from resnet_dist.data.node_cache import NodeCache
from resnet_dist.errors import Fault
from resnet_dist.training.collectives import prepare_connections

SIZES = (2, 8, 16, 32, 64, 128)
KINDS = {"all at the start": "0", "when needed": "1"}
"""How workers connect -> TORCH_GLOO_LAZY_INIT."""
_TARGET = 1000
_REPEATS = 3
_LIMIT_S = 120.0
_EXCHANGES = ("vote", "sum", "barrier", "store")


def bench_scale(sizes: Sequence[int]) -> str:
    """A table for groups of these sizes, and what follows for 1,000 workers."""
    sizes = sorted(set(sizes))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a warning for each name that nobody knows
    with Subject("the groups", "resnet_dist.bench.scale", *map(str, sizes)) as groups:
        found = {(kind, size): groups.answer() for size in sizes for kind in KINDS}
    head = ["connections", "workers", "start, s", "start, CPU ms a worker", "of rank 0", "open files a worker"]
    head += ["of rank 0", "MB a worker", "vote, ms", "64 KiB sum, ms", "barrier, ms", "wait for all at the store, ms"]
    head += ["64 KiB sum, CPU ms a worker"]
    rows = []
    for kind in KINDS:
        rows += [[kind, str(size), *_cells(found[kind, size])] for size in sizes]
        if len(sizes) > 1:
            rows.append([kind, f"{_TARGET:,} (slope)", *_extrapolated(found[kind, sizes[-2]], found[kind, sizes[-1]])])
    return markdown(head, rows)


def _cells(group: dict[str, Any]) -> list[str]:
    times = [f"{1000 * group[name]:.1f}" for name in _EXCHANGES]
    return [
        f"{group['start_s']:.2f}",
        f"{1000 * group['start_cpu_s']:.0f}",
        f"{1000 * group['first_start_cpu_s']:.0f}",
        f"{group['files']:.0f}",
        f"{group['first_files']:.0f}",
        f"{group['megabytes']:.1f}",
        *times,
        f"{1000 * group['sum_cpu_s']:.1f}",
    ]


def _extrapolated(smaller: dict[str, Any], larger: dict[str, Any]) -> list[str]:
    """On the line through the two largest groups. Empty where a figure is the shared machine's, not a worker's."""

    def at_target(name: str, scale: float = 1.0) -> str:
        slope = (larger[name] - smaller[name]) / (larger["size"] - smaller["size"])
        return f"{scale * (larger[name] + max(0.0, slope) * (_TARGET - larger['size'])):,.0f}"

    start = [at_target("start_cpu_s", 1000), at_target("first_start_cpu_s", 1000)]
    memory = [at_target(name) for name in ("files", "first_files", "megabytes")]
    return ["", *start, *memory, *[""] * len(_EXCHANGES), at_target("sum_cpu_s", 1000)]


# In the process of the groups, and in their workers


def main(sizes: Sequence[int]) -> None:
    for size in sizes:
        for lazy in KINDS.values():
            print_result(_measured(size, lazy))


def _measured(size: int, lazy: str) -> dict[str, Any]:
    """Forks the workers of one group. Raises Fault if not all of them report."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    reading, writing = os.pipe()
    workers = []
    for rank in range(size):
        if not (worker := os.fork()):
            status = 1
            try:
                os.close(reading)
                report = _work(rank, size, port, lazy)
                os.write(writing, f"{json.dumps(report)}\n".encode())  # shorter than a pipe's atomic write
                dist.barrier()  # rank 0 has the store, and must not end before the others
                status = 0
            finally:
                os._exit(status)
        workers.append(worker)
    os.close(writing)
    with os.fdopen(reading) as reports:
        of_rank = sorted((json.loads(line) for line in reports), key=lambda report: report["rank"])
    for worker in workers:
        os.waitpid(worker, 0)
    if len(of_rank) < size:
        raise Fault(f"{size - len(of_rank)} of {size} workers ended early; the reason is above")
    first, *others = of_rank  # rank 0 also has the group's store
    group = {name: median(report[name] for report in others) for name in first}
    group |= {"first_files": first["files"], "first_start_cpu_s": first["start_cpu_s"], "size": size}
    return group | {"start_s": max(report["start_s"] for report in of_rank)}


def _work(rank: int, size: int, port: int, lazy: str) -> dict[str, float]:
    os.nice(5)
    os.environ |= {"TORCH_GLOO_LAZY_INIT": lazy, "GLOO_SOCKET_IFNAME": "lo"}
    # Each worker looks up the name of rank 0's address. Where no name server answers that takes 5 s by default.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    torch.set_num_threads(1)
    prepare_connections(rank, size)
    files, began_s, cpu_s = _open_files(), time.perf_counter(), _cpu_s()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_LIMIT_S),
    )
    flags, table = torch.zeros(2), torch.zeros(8192, dtype=torch.float64)
    dist.all_reduce(flags)  # part of the start: connections that are made when needed are made now
    dist.broadcast(flags, src=0)
    report = {"rank": float(rank), "start_s": time.perf_counter() - began_s, "start_cpu_s": _cpu_s() - cpu_s}
    report["vote"] = _median_s(lambda: dist.all_reduce(flags))
    cpu_s = _cpu_s()
    report["sum"] = _median_s(lambda: dist.all_reduce(table))
    report["sum_cpu_s"] = (_cpu_s() - cpu_s) / _REPEATS
    report["barrier"] = _median_s(lambda: dist.barrier())
    dist.barrier()
    began_s = time.perf_counter()
    NodeCache([], Path(), _LIMIT_S).fill()
    report["store"] = time.perf_counter() - began_s
    return report | {"files": float(_open_files() - files), "megabytes": _private_megabytes()}


def _median_s(exchange: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        exchange()
        times.append(time.perf_counter() - began_s)
    return median(times)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _private_megabytes() -> float:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return sum(int(kilobytes) for kilobytes in re.findall(r"Private_\w+:\s+(\d+) kB", text)) / 1024


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]])
