"""What the simulation is told about the nodes, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Fleet:
    """Nodes of one kind. Times between events and until return are exponential, with these means."""

    nodes: int
    """All there are, spares included."""
    largest: int
    """Nodes that the worker group uses at most, and at least:"""
    smallest: int
    mtbf_s: float
    """Of one node."""
    repair_s: float
    preempted_every_s: float | None = None
    """Of one node; None: never."""
    notice_s: float = 0.0
    replaced_s: float = 600.0
    """Until another node stands in for a preempted one."""


@dataclass(frozen=True)
class Policy:
    """What this system does, and how long it takes."""

    checkpoint_every_s: float
    snapshot_s: float
    write_s: float
    restart_s: float
    resize_every_s: float


@dataclass
class Ledger:
    """Where the wall clock went, s. All parts add up to `wall_s`."""

    useful_s: float = 0.0
    """The run's steps at the speed of the largest group."""
    smaller_group_s: float = 0.0
    """More time for the same steps while nodes were missing."""
    redone_s: float = 0.0
    """Steps done again, after the last checkpoint."""
    checkpoint_s: float = 0.0
    restart_s: float = 0.0
    waiting_s: float = 0.0
    """Fewer nodes than the smallest group."""

    @property
    def wall_s(self) -> float:
        return sum(getattr(self, field.name) for field in fields(Ledger))

    @property
    def goodput(self) -> float:
        return self.useful_s / self.wall_s


@dataclass
class Outcome:
    ledger: Ledger
    node_s: float
    """Nodes that the group held, over time."""
    failures: int
    preemptions: int
    resizes: int


Speed = Callable[[int], float]
"""Nodes in the group -> optimizer steps per second."""
