"""What ran on the GPU and when, from PyTorch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from resnet_dist.bench.gpu.result import Skipped

Span = tuple[float, float]
"""Start and end, us."""


class GpuWork(NamedTuple):
    """Names and times."""

    kernels: list[tuple[str, Span]]
    copies: list[tuple[str, Span]]
    """Between memories, for example `Memcpy HtoD (Pinned -> Device)`."""


def start_profiler() -> None:
    """Call it before a CUDA graph is captured: the profiler knows a graph's kernels only if it has been used before."""
    with profile(activities=[ProfilerActivity.CUDA]):
        torch.cuda.synchronize()


def gpu_work(run: Callable[[], object]) -> GpuWork:
    """What `run` does on the GPU. Raises Skipped if the profiler sees no kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    # Without the ranges that torch.optim names, which span kernels
    work = [e for e in profiler.events() or () if e.device_type.name == "CUDA" and "#" not in e.name]
    events = [(e.name, (float(e.time_range.start), float(e.time_range.end))) for e in work]
    kernels = [event for event in events if not event[0].startswith(("Memcpy", "Memset"))]
    if not kernels:
        raise Skipped(
            "the profiler sees no kernel: CUPTI is missing, or the driver lets only root profile "
            "(NVreg_RestrictProfilingToAdminUsers)"
        )
    return GpuWork(kernels, [event for event in events if event[0].startswith("Memcpy")])


def layout_kernels(run: Callable[[], object]) -> dict[str, int]:
    """How many kernels that change between NCHW and NHWC `run` starts, by name."""
    names = [name for name, _ in gpu_work(run).kernels]
    return dict(Counter(name[:60] for name in names if "nchwToNhwc" in name or "nhwcToNchw" in name))


def merged(spans: Sequence[Span]) -> list[Span]:
    """The union of the spans, as spans in order that do not touch."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def total(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def hidden_share(copies: Sequence[Span], kernels: Sequence[Span]) -> float:
    """The share of the copies' time in which some kernel runs.

    >>> hidden_share([(0, 10), (20, 30)], [(5, 22), (21, 25)])
    0.5
    """
    busy = merged(kernels)
    hidden = sum(max(0.0, min(end, e) - max(start, s)) for start, end in copies for s, e in busy)
    return hidden / total(copies)
