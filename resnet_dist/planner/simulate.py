"""A run with faults, by discrete events: nodes fail, are preempted and return; the group resumes from checkpoints."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from random import Random

from resnet_dist.errors import UserError
from resnet_dist.planner.hardware import SNAPSHOT_BYTES_S, WRITE_BYTES_S

SHORTEST_S = 60.0


@dataclass(frozen=True)
class CheckpointCost:
    num_bytes: int
    snapshot_s: float
    """Pause of the training loop."""
    write_s: float
    """Duration of the write in the background; until it ends, the previous checkpoint counts."""


def checkpoint_cost(num_bytes: int) -> CheckpointCost:
    return CheckpointCost(num_bytes, num_bytes / SNAPSHOT_BYTES_S, num_bytes / WRITE_BYTES_S)


def best_interval_s(cost: CheckpointCost, between_interruptions_s: float) -> float:
    """Young 1974: sqrt(2 x pause x mean time between interruptions); at least a minute and two writes."""
    by_young = math.sqrt(2 * cost.snapshot_s * between_interruptions_s)
    return max(by_young, 2 * cost.write_s, SHORTEST_S)


@dataclass(frozen=True)
class Fleet:
    """Nodes of one kind. Times between events and until return are exponential, with these means."""

    nodes: int
    """All nodes, spares included."""
    largest: int
    """Nodes of the worker group at most, and at least:"""
    smallest: int
    mtbf_s: float
    """Mean time between failures of one node."""
    repair_s: float
    preempted_every_s: float | None = None
    """Mean time between preemptions of one node; None: never."""
    notice_s: float = 0.0
    replaced_s: float = 600.0
    """Until another node replaces a preempted one."""


@dataclass(frozen=True)
class Policy:
    """Reactions of the system, and their durations."""

    checkpoint_every_s: float
    snapshot_s: float
    write_s: float
    restart_s: float
    resize_every_s: float


@dataclass
class TimeSpent:
    """Parts of the wall-clock time, s; they add up to `wall_s`."""

    useful_s: float = 0.0
    """The run's steps at the speed of the largest group."""
    smaller_group_s: float = 0.0
    """Extra time for the same steps while nodes were missing."""
    redone_s: float = 0.0
    """Steps since the last checkpoint that had to be done again."""
    checkpoint_s: float = 0.0
    restart_s: float = 0.0
    waiting_s: float = 0.0
    """Waiting with fewer nodes than the smallest group needs."""

    @property
    def wall_s(self) -> float:
        return sum(getattr(self, field.name) for field in fields(TimeSpent))

    @property
    def goodput(self) -> float:
        return self.useful_s / self.wall_s


@dataclass
class SimulatedRun:
    spent: TimeSpent
    node_s: float
    """Nodes that the group held, over time."""
    failures: int
    preemptions: int
    resizes: int


Speed = Callable[[int], float]
"""Nodes in the group -> optimizer steps per second."""


class EventKind(Enum):
    FAILURE = 0
    PREEMPTION = 1
    RETURN = 2
    RESIZE_CHECK = 3
    """The elastic group checks whether it can grow."""


@dataclass
class WorkerGroup:
    """A running worker group; `ready` is when its first step begins."""

    number: int
    nodes: frozenset[int]
    formed: float
    ready: float
    rate: float
    policy: Policy

    @property
    def cycle_s(self) -> float:
        return self.policy.checkpoint_every_s + self.policy.snapshot_s

    def steps(self, now: float) -> float:
        return max(0.0, now - self.ready) * self.policy.checkpoint_every_s / self.cycle_s * self.rate

    def saved_steps(self, now: float) -> float:
        """Steps done at the newest checkpoint that is complete in storage."""
        written = math.floor((now - self.ready - self.policy.write_s) / self.cycle_s)
        return max(0, written) * self.policy.checkpoint_every_s * self.rate

    def done_at(self, steps: float) -> float:
        return self.ready + steps / self.rate * self.cycle_s / self.policy.checkpoint_every_s


def simulate(fleet: Fleet, policy: Policy, speed: Speed, total_steps: float, seed: int) -> SimulatedRun:
    """One run from its first start to its last step."""
    return _Run(fleet, policy, speed, total_steps, Random(seed)).run()


class _Run:
    def __init__(self, fleet: Fleet, policy: Policy, speed: Speed, total_steps: float, random: Random) -> None:
        self.fleet, self.policy, self.speed, self.random = fleet, policy, speed, random
        self.left = total_steps
        self.full_rate = speed(fleet.largest)
        self.up = set(range(fleet.nodes))
        self.events: list[tuple[float, int, EventKind, int]] = []
        self.number = itertools.count()
        self.result = SimulatedRun(TimeSpent(), 0.0, 0, 0, 0)
        for node in range(fleet.nodes):
            self._schedule_loss(node, 0.0)

    def run(self) -> SimulatedRun:
        now, group = 0.0, self._form(0.0)
        total_steps = self.left
        limit_s = 30 * 86400 + 50 * total_steps / self.full_rate
        idle_since = 0.0
        while True:
            at, _, kind, node = heapq.heappop(self.events)
            if group is not None and (end := group.done_at(self.left)) <= at:
                self._account(group, end, self.left)
                return self.result
            now = max(now, at)  # an event during the last checkpoint is noticed after it
            if now > limit_s:
                raise UserError(
                    f"after {now / 86400:.0f} days {self.left / total_steps:.0%} of the run is still to do: nodes are "
                    "lost faster than the group makes progress; checkpoint more often, or use fewer nodes"
                )
            interrupts = self._apply(kind, node, now, group)
            if group is not None and interrupts:
                now = self._stop(group, now, kind)
                group, idle_since = None, now
            if group is None and len(self.up) >= self.fleet.smallest:
                self.result.spent.waiting_s += now - idle_since
                group = self._form(now)

    def _apply(self, kind: EventKind, node: int, now: float, group: WorkerGroup | None) -> bool:
        """Updates which nodes are up; returns whether the group has to stop."""
        if kind is EventKind.RETURN:
            self.up.add(node)
            self._schedule_loss(node, now)
            self._schedule_resize_check(group, now)
            return False
        if kind is EventKind.RESIZE_CHECK:
            grows = group is not None and node == group.number and len(self.up) > len(group.nodes)
            self.result.resizes += grows
            return grows
        self.up.discard(node)
        used = group is not None and node in group.nodes
        if kind is EventKind.FAILURE:
            self.result.failures += used
            self._push(now + self.random.expovariate(1 / self.fleet.repair_s), EventKind.RETURN, node)
        else:
            self.result.preemptions += used
            self._push(now + self.random.expovariate(1 / self.fleet.replaced_s), EventKind.RETURN, node)
        return used

    def _form(self, now: float) -> WorkerGroup | None:
        if len(self.up) < self.fleet.smallest:
            return None
        nodes = frozenset(itertools.islice(self.up, self.fleet.largest))
        group = WorkerGroup(
            next(self.number), nodes, now, now + self.policy.restart_s, self.speed(len(nodes)), self.policy
        )
        self._schedule_resize_check(group, now)
        return group

    def _schedule_resize_check(self, group: WorkerGroup | None, now: float) -> None:
        """Schedules the group's next resize check, if there is a free node."""
        if group is None or not len(group.nodes) < min(len(self.up), self.fleet.largest):
            return
        every = self.policy.resize_every_s
        checks = math.floor((now - group.formed) / every) + 1
        self._push(group.formed + checks * every, EventKind.RESIZE_CHECK, group.number)

    def _stop(self, group: WorkerGroup, now: float, kind: EventKind) -> float:
        """Ends the group; the time at which the next one can form."""
        save_s = self.policy.snapshot_s + self.policy.write_s
        if kind is EventKind.PREEMPTION and self.fleet.notice_s >= save_s and now > group.ready:
            self._account(group, now, min(group.steps(now), self.left))
            self.result.spent.checkpoint_s += save_s
            self.result.node_s += save_s * len(group.nodes)
            return now + save_s
        self._account(group, now, min(group.saved_steps(now), self.left))
        return now

    def _account(self, group: WorkerGroup, now: float, kept_steps: float) -> None:
        spent = self.result.spent
        ran = max(0.0, now - group.ready)
        worked = ran * self.policy.checkpoint_every_s / group.cycle_s
        kept = kept_steps / group.rate
        spent.restart_s += min(now, group.ready) - group.formed
        spent.checkpoint_s += ran - worked
        spent.redone_s += worked - kept
        spent.useful_s += kept_steps / self.full_rate
        spent.smaller_group_s += kept - kept_steps / self.full_rate
        self.result.node_s += (now - group.formed) * len(group.nodes)
        self.left -= kept_steps

    def _schedule_loss(self, node: int, now: float) -> None:
        """Draws whether a failure or a preemption takes this node away next, and when."""
        failure = self.random.expovariate(1 / self.fleet.mtbf_s)
        preemption = (
            self.random.expovariate(1 / self.fleet.preempted_every_s) if self.fleet.preempted_every_s else math.inf
        )
        first = min(failure, preemption)
        self._push(now + first, EventKind.FAILURE if failure <= preemption else EventKind.PREEMPTION, node)

    def _push(self, at: float, kind: EventKind, node: int) -> None:
        heapq.heappush(self.events, (at, next(self.number), kind, node))
