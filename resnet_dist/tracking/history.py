"""What a run has logged, read back from its spool: complete also when the server never saw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from resnet_dist.tracking.events import Metrics, Text
from resnet_dist.tracking.segments import SpoolReader, spool_folder


@dataclass(frozen=True)
class History:
    points: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    """(step, value) of every metric, in the order of steps."""
    texts: Mapping[str, str] = field(default_factory=dict)
    times_ms: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Unix time of every (metric, step)."""


def read_history(run_dir: Path, run_id: str) -> History:
    """Everything in the spool of rank 0; empty if there is none."""
    folder = spool_folder(run_dir, run_id)
    points: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, str] = {}
    times_ms: dict[tuple[str, int], int] = {}
    reader = SpoolReader(folder)
    while events := reader.read():
        for event in events:
            if isinstance(event, Metrics):
                for key, value in event.values.items():
                    points.setdefault(key, []).append((event.step, value))
                    times_ms[key, event.step] = event.time_ms
            elif isinstance(event, Text):
                texts[event.path] = event.content
    return History(points, texts, times_ms)
